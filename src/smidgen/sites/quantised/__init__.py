"""Linear maps whose weight is stored in 4 or 8 bits: one file for each package that stores them, `maps` for all others."""
