"""Where fine-tuning happens: components, changes, Fisher mass, and the reports that show them.

Kept empty, so that the command line can name these modules without loading torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
