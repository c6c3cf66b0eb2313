"""What `siftclip reproduce` prints, step by step."""

from __future__ import annotations

from typing import Any

from siftclip.redaction import printable, shown
from siftclip.tables import NOTHING, text_table
from siftclip.trainer.outputs.differences import (
    LossDifference,
    ResultDifference,
    SelectionDifference,
    ValueDifference,
)
from siftclip.trainer.outputs.making import state_of_run
from siftclip.trainer.runtime.environment import CODE, MACHINE, TARS
from siftclip.trainer.stages.reproduce import Reproduced, Reproduction, Selected

_LONGEST = 60  # characters of a value
_FEW = 12  # hexadecimal digits of a digest


def describe_begin(reproduction: Reproduction) -> str:
    """Say what is repeated, and which options and files are others."""
    original = reproduction.original
    lines = [f"run        {printable(str(original.path))} ({state_of_run(original)})"]
    lines += [_differs(option) for option in reproduction.options]
    lines += [f"left out   {shown(text)}" for text in reproduction.left_out]
    for file in reproduction.missing:
        if file.here is None:
            name = printable(file.name)
            lines.append(f"missing    {name}: {_text(file.there)} is not there; type {name}=PATH")
        else:
            lines.append(_differs(file))
    return "\n".join(lines)


def describe_selected(selected: Selected) -> str:
    """Say what differs before the first step is trained."""
    lines = []
    if selected.environment is None:
        lines.append("unknown    what the run was computed with: it has no versions.json")
    else:
        lines += [_differs(each, note=_note(each)) for each in selected.environment]
        if not selected.environment:
            lines.append("same       code, versions, machine, threads and ranks")
    if selected.sessions > 1:
        lines.append(
            f"note       the run itself was continued {selected.sessions - 1} times on something "
            "else; compared is its last session"
        )
    if selected.pool is not None:
        lines.append(_differs(selected.pool))
    elif selected.is_known:
        lines.append(f"same       pool {selected.selected.pool.root}")
    lines.append(_selection(selected.selection))
    if not selected.is_known:
        lines.append("unknown    what the weights depend on: the run has no identity.json")
    elif selected.identity:
        lines.append(f"differs    what the weights depend on: {'; '.join(selected.identity)}")
    else:
        lines.append("same       all options and files that the weights depend on")
    if selected.steps is not None:
        lines.append(f"budget     {selected.steps} steps, as the run's budget lasted there")
    lines.append(f"trains in  {selected.run.path}")
    return "\n".join(lines)


def _note(difference: ValueDifference) -> str:
    """Say what follows from a difference."""
    if difference.name in CODE:
        return "other code may give other results"
    if difference.name in MACHINE:
        return "as another seed after some hundred steps"
    return "written or copied since" if difference.name == TARS else ""


def describe_reproduced(reproduced: Reproduced) -> str:
    """Say what came out the same, and what not."""
    lines = []
    if reproduced.was_there:
        lines.append(
            f"reused     {reproduced.run.path} was finished already; reuse=false trains it again"
        )
    lines += [
        _selection(reproduced.selection),
        _losses(reproduced.losses),
        _weights(reproduced.weights),
        *_results(reproduced),
        f"run        {reproduced.run.path}",
    ]
    return "\n".join(lines)


def _selection(selection: SelectionDifference | None) -> str:
    if selection is None:
        return "unknown    the selection: the run does not have it"
    if selection.is_same:
        return f"same       selection, {selection.samples_here} samples"
    parts = [
        f"{selection.samples_there} samples there, {selection.samples_here} here",
        f"{selection.only_there} distinct ones only there, {selection.only_here} only here",
    ]
    if not selection.only_there and not selection.only_here:
        parts[1] = "the same ones in other numbers or with other weights"
    return f"differs    selection: {'; '.join(parts)}"


def _losses(losses: LossDifference) -> str:
    if not losses.steps:
        return "unknown    losses: no step is in both logs"
    rest = f"; {losses.unmatched} steps are in one log alone" if losses.unmatched else ""
    if losses.first is None:
        return f"same       losses of {losses.steps} logged steps, to the bit{rest}"
    return (
        f"differs    losses: from step {losses.first} on, by {losses.largest:.2g} of the loss at "
        f"most (step {losses.at_step}; {losses.steps} logged steps){rest}"
    )


def _weights(weights: ValueDifference | None) -> str:
    if weights is None:
        return "same       weights, to the bit"
    if weights.there is None or weights.here is None:
        where = "there" if weights.there is None else "here"
        return f"unknown    weights: {weights.name} is not {where}"
    return f"differs    weights: {weights.there[:_FEW]} there, {weights.here[:_FEW]} here (SHA-256)"


def _results(reproduced: Reproduced) -> list[str]:
    results = reproduced.results
    if not reproduced.is_evaluated:
        hint = "; eval.root=FOLDER evaluates it" if results else ""
        return [f"unknown    results: not evaluated here{hint}"]
    if results and all(each.there == each.here for each in results):
        return [f"same       results of {len(results)} tasks"]
    rows = [[each.task, each.metric, *_cells(each)] for each in results]
    return text_table(["task", "metric", "there", "here", "difference"], rows, right=[2, 3, 4])


def _cells(result: ResultDifference) -> list[str]:
    values = (result.there, result.here)
    cells = [NOTHING if value is None else f"{value:.4f}" for value in values]
    if result.there is None or result.here is None:
        return [*cells, NOTHING]
    difference = result.here - result.there
    return [*cells, "0" if difference == 0 else f"{difference:+.4f}"]


def _differs(difference: ValueDifference, *, note: str = "") -> str:
    values = f"{_text(difference.there)} there, {_text(difference.here)} here"
    return f"differs    {printable(difference.name)}: {values}{f' ({note})' if note else ''}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    text = shown(printable(str(value)))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
