"""The ways a model is touched, and the record of it. Hooks live here and in `efficiency`, nowhere else."""
