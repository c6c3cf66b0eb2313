"""siftclip: training CLIP models with data selection inside the training loop.

    import siftclip

    pool = siftclip.Pool("/data/pool")
    features = siftclip.embed(pool, "ViT-B-32", "openai")
    selection = siftclip.select(pool, features, siftclip.selectors.NegCLIPLoss(fraction=0.3))
    run = siftclip.train(selection, "ViT-B-32", samples_seen=128_000_000)
    results = siftclip.evaluate(run, "/data/tasks")

The public names are in `__init__.pyi`. Each is imported when it is first asked for.

In a checkout the subpackages are the folders at the repository root: the lines below put it on
this package's search path, and the links beside this file say the same to tools that read code
without running it. In an installed wheel the folders are here and nothing is added.
"""

from siftclip.interrupts import answer_if_command as _answer_if_command

_answer_if_command()  # before the imports below and those of a command, which take seconds

from pathlib import Path as _Path  # noqa: E402 - see above

__version__ = "0.1.0"

_here = _Path(__file__).resolve().parent
_root = _here.parent.parent
if _here == _root / "src" / "siftclip":
    __path__.insert(0, str(_root))

from lazy_loader import attach_stub as _attach_stub  # noqa: E402 - they need the whole __path__

from siftclip.aliases import install as _install  # noqa: E402

_install()
__getattr__, __dir__, __all__ = _attach_stub(__name__, __file__)
