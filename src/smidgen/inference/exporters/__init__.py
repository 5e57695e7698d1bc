"""A trained result as files of other programs, each checked against the attached model."""
