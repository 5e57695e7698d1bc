"""Images and sounds: files, folders and archives of them, and what is read from a file."""
