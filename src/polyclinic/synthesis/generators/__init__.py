"""What makes samples, behind one interface (``base.py``); each file has both sides, as a method has."""
