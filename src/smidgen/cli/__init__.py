"""The command line: one API call a command, and a view of its result."""
