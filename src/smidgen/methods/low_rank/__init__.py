"""Methods that add a product of low rank to a weight."""
