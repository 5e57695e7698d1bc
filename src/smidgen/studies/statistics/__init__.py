"""Statistics of comparisons: summaries, paired differences, equivalence, what a study could have seen."""
