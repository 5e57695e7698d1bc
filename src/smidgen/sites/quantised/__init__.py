"""Linear maps whose weight is stored in 4 or 8 bits: a file for each package that does it, `maps` for all others."""
