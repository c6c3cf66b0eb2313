"""siftclip: training CLIP models with data selection inside the training loop.

In a checkout the subpackages are the folders at the repository root: the lines below put it on
this package's search path, and the links beside this file say the same to tools that read code
without running it. In an installed wheel the folders are here and nothing is added.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_here = _Path(__file__).resolve().parent
_root = _here.parent.parent
if _here == _root / "src" / "siftclip":
    __path__.insert(0, str(_root))

from siftclip.aliases import install as _install  # noqa: E402 - found once __path__ is complete

_install()
