"""What a run is of whose identity.json is lost: its config.yaml says it."""

from __future__ import annotations

import json

import yaml

from siftclip.errors import InputError
from siftclip.trainer.runtime.run_dir import IDENTITY_NAME, RunDir
from siftclip.trainer.runtime.run_records import read_config
from siftclip.trainer.settings.composed import Composed

# Groups of options that decide about a run
_DECIDING = ("selector", "model", "loss", "optim", "scale", "online", "budget", "seed")


def require_same_config(run: RunDir, composed: Composed) -> None:
    """Compare the configuration of a run with the one that it is asked for.

    Raises:
        InputError: it was begun with other options, or says nothing.
    """
    before, now = (
        json.loads(json.dumps({name: config.get(name) for name in _DECIDING}, default=str))
        for config in (read_config(run.config), yaml.safe_load(composed.to_yaml()))
    )
    if before != now:
        different = ", ".join(name for name in _DECIDING if before[name] != now[name])
        raise InputError(
            f"run_dir={str(run.path)!r} holds a run whose {IDENTITY_NAME} is lost, and its "
            f"config.yaml has other options: {different}. Name another run_dir, or delete that one."
        )
