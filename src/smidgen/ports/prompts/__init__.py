"""Vectors among the tokens of a text."""
