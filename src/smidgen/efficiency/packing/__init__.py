"""Several short examples in one row, each computed as if alone."""
