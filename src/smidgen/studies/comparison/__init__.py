"""Fair comparisons: a study, its runs in a folder, and what they say."""
