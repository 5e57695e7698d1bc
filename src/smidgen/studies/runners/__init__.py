"""Where the trials of a search run."""
