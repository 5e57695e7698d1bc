"""Experiments: where fine-tuning happens, what Fisher information says, what carries over."""
