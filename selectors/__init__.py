"""Selectors: which samples of a pool, or of a super-batch, are worth training on.

This folder is the package `siftclip.selectors`. It shares its name with the standard library's
`selectors`, which subprocess, asyncio and multiprocessing import. When the repository root is first
on `sys.path` (`python -c`, `python -m`, notebooks), plain `import selectors` arrives here; the
branch below then hands over to the standard library.

The public names are in `__init__.pyi`. Each is imported when it is first asked for.
"""

if __name__ == "selectors":  # pragma: no cover - runs in child processes only
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    _root = os.path.realpath(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    _path = [p for p in sys.path if os.path.realpath(p or os.curdir) != _root]
    _spec = PathFinder.find_spec("selectors", _path)
    if _spec is None or _spec.loader is None:
        raise ImportError("the standard library's selectors module was not found")
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["selectors"] = _module
    _spec.loader.exec_module(_module)
else:
    from lazy_loader import attach_stub

    __getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
