"""Sums of deltas: weighted, averaged, TIES, DARE."""
