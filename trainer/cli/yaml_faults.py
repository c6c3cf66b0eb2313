"""A YAML file of the user's own, in `--config-dir`, that Hydra cannot load: one line that names it.

Hydra lets through what PyYAML and OmegaConf raise, and their messages may not say which file it is.
"""

from __future__ import annotations

import traceback

import yaml
from hydra.errors import HydraException

from siftclip.reading import reason_of

YAML_FAULTS = (yaml.YAMLError, OSError, RecursionError, ValueError)  # of a file that is loaded
_DEFAULTS = "defaults_list.py"  # of Hydra
_LOADER = "file_config_source.py"  # of Hydra; no other place of it opens these files


def fault_of_yaml(error: Exception) -> str | None:
    """Say which YAML could not be loaded, and why; None if the error is of something else."""
    if isinstance(error, HydraException) or not isinstance(error, YAML_FAULTS):
        return None  # some of Hydra's own are OSErrors, too
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = frame.f_locals.get("full_path")
        if frame.f_code.co_filename.endswith(_LOADER) and isinstance(path, str):
            return f"{path} is not a configuration in YAML: {reason_of(error)}."
    return _fault_of_defaults(error)


def _fault_of_defaults(error: Exception) -> str | None:
    """Explain a list of defaults that is none, or that leads back to its own file."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if frame.f_code.co_filename.endswith(_DEFAULTS)]
    if not frames:
        return None
    if isinstance(error, RecursionError):
        paths = (frame.f_locals.get("path") for frame in reversed(frames))
        path = next((path for path in paths if isinstance(path, str)), "a configuration")
        return f"{path}: its defaults lead back to itself."
    return f"{reason_of(error)}." if str(error).startswith("Invalid defaults list") else None
