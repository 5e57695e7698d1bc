"""What each trained value is worth to the task: scores to choose by."""
