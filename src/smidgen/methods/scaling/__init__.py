"""Methods that scale and shift what modules give."""
