"""How updates are combined: one interface, several backends, and what each party gets to see."""
