"""Whether a model may have batch norms, told from its configuration, without open_clip or torch.

With them the answer for a sample depends on the samples that it is computed with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siftclip.errors import InputError
from siftclip.files import read_json_object

_CONFIG_NAME = "open_clip_config.json"
_RUN_FOLDER = "model"  # of a run directory


def may_have_batch_norms(name: str, architecture: Mapping[str, Any] | None = None) -> bool:
    """Return whether a model has batch norms; true where its configuration does not tell.

    open_clip's own towers have them in ModifiedResNet alone, which has a list of layers. A tower of
    timm may be anything, and only timm, whose import takes seconds, knows by its name; a repository
    of a hub is not asked. Text towers of Hugging Face, those that open_clip knows, have none.

    Args:
        name: as `load_clip_model` takes it.
        architecture: open_clip's, in place of what the name stands for.
    """
    config = _configuration(name) if architecture is None else architecture
    vision = None if config is None else config.get("vision_cfg")
    if not isinstance(vision, Mapping):
        return True
    return bool(vision.get("timm_model_name")) or isinstance(vision.get("layers"), (list, tuple))


def _configuration(name: str) -> Mapping[str, Any] | None:
    """Find open_clip's configuration of a model in files that are here."""
    folder = Path(name.removeprefix("local-dir:"))
    for path in (folder / _RUN_FOLDER / _CONFIG_NAME, folder / _CONFIG_NAME):
        if path.is_file():
            config = _object(path).get("model_cfg")
            return config if isinstance(config, Mapping) else None
    package = importlib.util.find_spec("open_clip")
    for place in (package and package.submodule_search_locations) or ():
        path = Path(place) / "model_configs" / f"{name}.json"
        if path.is_file():
            return _object(path)
    return None


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except InputError:  # told by whoever builds the model
        return {}
