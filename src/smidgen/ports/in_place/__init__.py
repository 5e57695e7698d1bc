"""The base's own tensors: masters and chosen values in their place, and what must not move."""
