"""Methods that add keys and values to attention."""
