"""Methods that train tensors the model already has."""
