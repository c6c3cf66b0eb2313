"""The report of a check: a JSON file and a table, written anew after each item."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_checks.harness import Outcome

JSON_NAME, TABLE_NAME = "gpu_check.json", "gpu_check.md"


def write_report(folder: Path, about: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write both files, each complete at any time."""
    record = {**about, "items": [asdict(outcome) for outcome in outcomes]}
    _replace(folder / JSON_NAME, json.dumps(record, indent=1, default=str) + "\n")
    _replace(folder / TABLE_NAME, table(about, outcomes))


def table(about: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The items as a markdown table, and what each has found below."""
    lines = [" ".join(f"{name} {value};" for name, value in about.items()), ""]
    lines += ["| item | status | seconds | found |", "|---|---|---|---|"]
    lines += [_row(outcome) for outcome in outcomes]
    return "\n".join(lines) + "\n"


def line(outcome: Outcome) -> str:
    """An item for the terminal."""
    return f"{outcome.status:8} {outcome.name:18} {outcome.seconds:6.1f} s  {_found(outcome)}"


def _row(outcome: Outcome) -> str:
    found = _found(outcome).replace("|", "/").replace("\n", " ")
    return f"| {outcome.name} | {outcome.status} | {outcome.seconds:.1f} | {found} |"


def _found(outcome: Outcome) -> str:
    facts = [f"{name}: {_text(value)}" for name, value in outcome.facts.items()]
    return "; ".join([*([outcome.error] if outcome.error else []), *facts])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_text(part)}" for name, part in value.items()) + ")"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
