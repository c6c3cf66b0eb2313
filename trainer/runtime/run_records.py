"""Reads back the numbers that a run has written, and refuses those that cannot be."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from siftclip.errors import DamagedError, InputError
from siftclip.eval.results.result_checks import (
    require_count,
    require_number,
    require_share,
    require_text,
)
from siftclip.files import read_json, read_jsonl
from siftclip.reading import read_text, reason_of

_TEXTS = ("selector", "selection", "pool", "online")
_COUNTS = ("seed", "steps", "trained_samples", "requested_samples", "selected_samples")
_SHOWN = (
    *("online", "steps", "trained_samples", "loaded_samples", "selected_samples", "coverage"),
    *("passes", "train_seconds", "data_wait_seconds", "scoring_seconds", "selection_seconds"),
)
_WAY_OUT = "Delete it, and the command that trained the run writes it again."
_BUDGET_WAY_OUT = "Delete it, and the command that trains the run works it out again."
_AMOUNTS = ("_samples", "_seconds", "flops", "passes", "_time")  # ends of names
_SHARE = "/share_"
_MAX_DEPTH = 100  # of YAML
_MAX_PLAIN = 1 << 14  # characters of a value of YAML that may be a number
_MAX_CONFIG_BYTES = 1 << 22  # that of a run has ten thousand


def read_summary(path: Path) -> dict[str, Any]:
    """Read what a finished run says about itself.

    Raises:
        InputError: the file is missing or damaged, or a number in it cannot be.
    """
    try:
        record = read_json(path)
    except InputError as error:
        raise DamagedError(error, _WAY_OUT) from None
    return _checked(path, record)


def require_shown(path: Path, summary: Mapping[str, Any]) -> None:
    """Raise InputError unless a summary has all that reports show of a finished run."""
    missing = [name for name in _SHOWN if name not in summary]
    if missing:
        raise InputError(
            f"{path} must hold the summary of a finished run, but {missing[0]} is missing. "
            f"{_WAY_OUT}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a run.

    Raises:
        InputError: the file is missing or damaged, or has aliases, with which a small file can grow
            without end.
    """
    text = read_text(path, most=_MAX_CONFIG_BYTES)
    try:
        _require_plain(text)
        config = yaml.load(text, Loader=yaml.CSafeLoader)
    except Exception as error:  # the constructors of tags raise what they come across
        problem = reason_of(error)
        raise InputError(f"{path} is not the configuration of a run: {problem}.") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not the configuration of a run: {reprlib.repr(config)}.")
    return config


def _require_plain(text: str) -> None:
    """Raise ValueError for YAML that must not be loaded, before anything is made of it.

    The loader is recursive and in C, takes the last of equal keys, and the square of the length of
    a number in base 60.
    """
    above: list[_Open] = []
    for event in yaml.parse(text, yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases, which Siftclip never writes")
        if isinstance(event, yaml.CollectionEndEvent):
            above.pop()
        elif isinstance(event, yaml.NodeEvent):
            if above:
                above[-1].add(event)
            if isinstance(event, yaml.CollectionStartEvent):
                above.append(_Open(isinstance(event, yaml.MappingStartEvent)))
        if len(above) > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


@dataclass(slots=True)
class _Open:
    """A mapping or a list of YAML whose end has not come yet."""

    is_mapping: bool
    nodes: int = 0
    keys: set[str] = field(default_factory=set)

    def add(self, node: yaml.NodeEvent) -> None:
        is_key = self.is_mapping and self.nodes % 2 == 0
        self.nodes += 1
        if not isinstance(node, yaml.ScalarEvent):
            return
        if not node.style and len(node.value) > _MAX_PLAIN:
            raise ValueError(f"it has a value of {len(node.value)} characters without quotes")
        if is_key and node.value in self.keys:
            raise ValueError(f"it has {reprlib.repr(node.value)} twice")
        if is_key:
            self.keys.add(node.value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run's log, each with its `step`; none if there is no file.

    Raises:
        InputError: the file is damaged, or a number in it cannot be.
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        place = f"{path}, record {number},"
        if "step" not in record:
            raise InputError(f"{place} must have a step. It has {reprlib.repr(sorted(record))}.")
        try:
            require_count("step", record["step"])
            for name, value in record.items():
                _check_amount(name, value)
        except ValueError as error:
            raise InputError(f"{place} cannot be: {error}.") from None
    return records


def read_budget(path: Path) -> dict[str, int]:
    """Read the lengths of a run, `samples_seen` and `global_batch_size`.

    Raises:
        InputError: the file is missing or damaged, or a number in it cannot be.
    """
    wanted = ("samples_seen", "global_batch_size")
    try:
        record = read_json(path)
    except InputError as error:
        raise InputError(f"{error} {_BUDGET_WAY_OUT}") from None
    if not isinstance(record, Mapping) or record.keys() != {*wanted}:
        raise InputError(
            f"{path} must hold {' and '.join(wanted)}. Got {reprlib.repr(record)}. "
            f"{_BUDGET_WAY_OUT}"
        )
    try:
        return {name: require_count(name, record[name], least=1) for name in wanted}
    except ValueError as error:
        raise InputError(f"{path} cannot be: {error}.") from None


def _checked(path: Path, record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{path} must hold a summary. Got {reprlib.repr(record)}.")
    try:
        for name, value in record.items():
            if name in _TEXTS:
                require_text(name, value)
            elif name in _COUNTS:
                require_count(name, value)
            elif name == "coverage":
                require_share(name, value)
            else:
                _check_amount(name, value)
    except ValueError as error:
        raise DamagedError(f"{path} cannot be: {error}.", _WAY_OUT) from None
    return record


def _check_amount(name: str, value: object) -> None:
    if _SHARE in name:
        require_share(name, value)
    else:
        require_number(name, value, least=0 if name.endswith(_AMOUNTS) else -float("inf"))
