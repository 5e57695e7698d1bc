"""One file for each family of sites: what a plan asks about them."""
