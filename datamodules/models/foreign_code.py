"""Models of others bring numbers and words; code that lies beside them is never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

from siftclip.errors import InputError

_MODULE = "transformers.dynamic_module_utils"


@contextmanager
def without_foreign_code() -> Iterator[None]:
    """Keep transformers from running a model's own code, and from asking whether to, in the block.

    Configurations of Hugging Face name such code as `auto_map`. Transformers asks on the terminal,
    unless `trust_remote_code` says yes, which open_clip's configuration of a tokenizer may.

    Raises:
        InputError: something cannot be loaded without.
    """
    try:
        from transformers import dynamic_module_utils  # noqa: F401 - whether it is installed
    except ImportError:
        yield
        return
    with (
        patch(f"{_MODULE}.TIME_OUT_REMOTE_CODE", 0),  # it then asks nobody, and calls
        patch(f"{_MODULE}._raise_timeout_error", _refuse),
        patch(f"{_MODULE}.get_cached_module_file", _refuse),
        patch(f"{_MODULE}.get_class_in_module", _refuse),
    ):
        yield


def _refuse(*args: Any, **options: Any) -> NoReturn:
    raise InputError(
        "The model, or its tokenizer, names Python code of its own (auto_map in config.json or "
        "tokenizer_config.json, or trust_remote_code), which Siftclip never runs. Take one of a "
        "kind that transformers itself has, without auto_map."
    )
