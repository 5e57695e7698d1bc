"""Text: encoding, collation, causal language modelling."""
