"""Methods that add vectors to the input."""
