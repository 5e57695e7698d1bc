"""Several results on one model: the rows of a batch each have their own."""
