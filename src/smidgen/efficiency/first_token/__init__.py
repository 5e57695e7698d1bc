"""The last block computed for the one token that the head reads."""
