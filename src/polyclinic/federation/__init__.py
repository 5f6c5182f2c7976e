"""How server and sites talk: messages, channels, and the site's side of an op."""
