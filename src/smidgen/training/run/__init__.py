"""One run: the loop, its feed of batches, checkpoint, folder and record."""
