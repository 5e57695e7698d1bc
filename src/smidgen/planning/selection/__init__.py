"""What to keep of what a recipe could train: Select in a recipe, budgets, and the Selection that comes out."""
