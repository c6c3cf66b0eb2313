"""What a selection in the loop depends on: its options, its code, and the files that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from siftclip.datamodules.features.files import feature_file_stamp
from siftclip.datamodules.features.store import MissingArrayError
from siftclip.datamodules.identity.identities import selector_identity, stored_targets
from siftclip.datamodules.selection.columns import column_stamp
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.errors import InputError
from siftclip.selectors.core.source import TRAINING_LOSS
from siftclip.trainer.builders.models import model_files
from siftclip.trainer.builders.needs import LEARNER, REFERENCE, SCORER, Needs
from siftclip.trainer.builders.online_options import (
    has_live_reference,
    loop_selector,
)
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.online import (
    EveryStepSettings,
    LoopSettings,
    OnceSettings,
    OnlineSettings,
)


def online_identity(
    online: OnlineSettings, source: PoolSource, *, world_size: int
) -> dict[str, Any]:
    """Return all of `online` that trained weights depend on, with the files that it reads."""
    identity: dict[str, Any] = stored_targets(to_plain(online))
    if isinstance(online, OnceSettings):
        return identity
    for name in ("diagnostics", "batch_size"):  # decide about no weight
        identity.pop(name, None)
    if identity.get("groups") == "auto":
        identity["groups"] = world_size
    aliases = reference_aliases(online)
    parts: list[Any] = [{}, {}]  # the files of a scorer and of a live reference
    nodes = [online.selector]
    if isinstance(online, EveryStepSettings):
        parts = [model_files(online.scorer), model_files(online.reference.model)]
        first = online.first_stage.selector
        nodes += [] if first is None else [first]
    code: dict[str, str] = {}
    for node in nodes:
        built = loop_selector(online, node)
        of_selector = selector_identity(built.selector)
        code |= of_selector["code"]
        parts.append(of_selector["files"])
        needs = Needs.of(built.selector)
        live = {key for name in (LEARNER, SCORER) for key in needs.of_model(name)}
        if REFERENCE not in {key.rpartition("_")[0] for key in aliases}:
            live |= set(needs.of_model(REFERENCE))
        keys = {key: aliases.get(key, key) for key in sorted(needs.features - live)}
        check_cached(source, keys)
        parts += [source.store((key,)).fingerprint for key in keys.values()]
        parts += [feature_file_stamp(file) for file in needs.files]
        with built.objects.told_as_options():
            for column in sorted(needs.columns - {TRAINING_LOSS}, key=repr):
                parts += column_stamp(source.pool, column)
    return {**identity, "code": code, "files": parts}


def reference_aliases(online: LoopSettings) -> dict[str, str]:
    """Map selectors' names of the reference's arrays to the pool's names of its cached ones."""
    if has_live_reference(online):
        return {}
    name = online.reference.features.name
    return {f"{REFERENCE}_{kind}": f"{name}_{kind}" for kind in ("img", "txt")}


def check_cached(source: PoolSource, keys: Mapping[str, str]) -> None:
    """Check that a feature set has each array; `keys` as `CachedFirstStage.keys`."""
    for name, key in keys.items():
        try:
            source.store((key,))
        except MissingArrayError as error:
            if name == key:
                raise
            raise InputError(
                f"online.reference.features.name asks for the array {error.key!r}, which "
                f"{error.path} lacks. It holds {error.there}."
            ) from None
