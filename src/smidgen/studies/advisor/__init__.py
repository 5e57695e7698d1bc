"""Which recipe for a task, found within a budget of time."""
