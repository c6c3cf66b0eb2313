"""Where samples come from: pools, tar indices, features, selection files, order, streaming.

The public names are in `__init__.pyi`. Each is imported when it is first asked for.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
