"""A YAML file of the user's own, in `--config-dir`, that Hydra cannot load: one line that names it.

Hydra lets through what PyYAML and OmegaConf raise, and their messages may not say which file it is.
"""

from __future__ import annotations

import traceback

import yaml
from hydra.errors import HydraException

from siftclip.reading import reason_of

YAML_FAULTS = (yaml.YAMLError, OSError, RecursionError, ValueError)  # of a file that is loaded
_LOADER = "file_config_source.py"  # of Hydra; no other place of it opens these files


def fault_of_yaml(error: Exception) -> str | None:
    """Say which YAML could not be loaded, and why; None if the error is of something else."""
    if isinstance(error, HydraException) or not isinstance(error, YAML_FAULTS):
        return None  # some of Hydra's own are OSErrors, too
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = frame.f_locals.get("full_path")
        if frame.f_code.co_filename.endswith(_LOADER) and isinstance(path, str):
            return f"{path} is not a configuration in YAML: {reason_of(error)}."
    return None
