"""Look at it: figures and text."""
