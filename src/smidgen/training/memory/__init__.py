"""Peak memory by estimate, and the largest batch that fits."""
