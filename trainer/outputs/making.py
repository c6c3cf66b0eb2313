"""What made an entry, and how far it is: in a few words, from its own records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from siftclip.errors import InputError
from siftclip.files import read_json_object
from siftclip.redaction import printable
from siftclip.trainer.outputs.kinds import KindName
from siftclip.trainer.outputs.scan import Entry
from siftclip.trainer.runtime.run_dir import RunDir, step_of
from siftclip.trainer.runtime.run_records import read_config


def made_by(entry: Entry) -> str:
    """Say what made an entry; what cannot be read is unknown."""
    describe = _MAKERS.get(entry.kind.name)
    try:
        text = "" if describe is None else describe(entry.path)
    except InputError:
        return "not known"
    return printable(text)


def state_of(entry: Entry) -> str:
    """Say how far an entry is: finished, at a step, being written, damaged."""
    if entry.holders():
        return "being written"
    if entry.kind.name == "runs":
        return state_of_run(RunDir(path=entry.path))
    last = _COMPLETE.get(entry.kind.name)
    return "finished" if last is None or entry.has_file(last) else "not finished"


# The file that is written last
_COMPLETE: Mapping[KindName, str] = {
    "selections": "selection.json",
    "subsets": "selection.json",
    "reports": "report.html",
}


def state_of_run(run: RunDir) -> str:
    """Say how far a run is."""
    try:
        if run.summary is not None:
            return "finished" if run.is_finished else "damaged weights"
        latest, budget = run.latest_checkpoint(), run.budget()
    except InputError:
        return "damaged"
    if latest is None:
        return "no checkpoint"
    return f"step {step_of(latest)}" + ("" if budget is None else f" of {budget.total_steps}")


def _of_run(folder: Path) -> str:
    config = read_config(folder / "config.yaml")
    selector, model, scale = (_mapping(config, name) for name in ("selector", "model", "scale"))
    online = _mapping(config, "online")
    name = str(selector.get("name"))
    if "selector" in online:
        name += f" + {online.get('cadence')} {_mapping(online, 'selector').get('name')}"
    return f"{name}, {model.get('name')}, {scale.get('samples_seen')} samples"


def _of_selection(folder: Path) -> str:
    manifest = read_json_object(folder / "selection.json")
    return f"{manifest.get('selector')}, {manifest.get('kept_samples')} samples"


def _of_scores(folder: Path) -> str:
    selector = _mapping(read_json_object(folder / "identity.json"), "selector")
    return str(selector.get("class")).rpartition(".")[2]


def _of_features(folder: Path) -> str:
    manifest = read_json_object(folder / "features.json")
    return f"{manifest.get('name')}, {_mapping(manifest, 'model').get('name')}"


def _of_subset(folder: Path) -> str:
    manifest = read_json_object(folder / "selection.json")
    making = _mapping(manifest, "made")
    return f"{making.get('operation')}, {manifest.get('kept_samples')} samples"


def _of_copy(folder: Path) -> str:
    manifest = read_json_object(folder / "compact.json")
    return f"{manifest.get('samples')} samples of {manifest.get('pool_root')}"


_MAKERS: Mapping[KindName, Callable[[Path], str]] = {
    "runs": _of_run,
    "selections": _of_selection,
    "scores": _of_scores,
    "features": _of_features,
    "subsets": _of_subset,
    "copies": _of_copy,
}


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}
