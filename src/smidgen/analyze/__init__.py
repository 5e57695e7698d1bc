"""Where fine-tuning happens: components, changes, Fisher mass, and the reports that show them.

Kept empty, so that the command line can name these modules without loading torch.
"""
