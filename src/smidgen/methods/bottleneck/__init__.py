"""Methods that put a bottleneck beside or behind a sublayer."""
