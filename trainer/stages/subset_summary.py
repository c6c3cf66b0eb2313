"""What `siftclip subset` prints."""

from __future__ import annotations

from collections.abc import Sequence

from siftclip.datamodules.selection.registry import SubsetEntry, SubsetInput
from siftclip.datamodules.selection.selection import SUBSET_NAME, WEIGHTS_NAME
from siftclip.redaction import printable, shown
from siftclip.tables import NOTHING, text_table
from siftclip.trainer.stages.selection_summary import counted
from siftclip.trainer.stages.subset import SubsetExported, SubsetMade, SubsetState, Verified


def describe_made(made: SubsetMade) -> str:
    """Describe a subset that was imported or combined."""
    lines = _lines(made.entry)
    if made.present is not None:
        distinct = made.entry.manifest["kept_distinct"]
        lines.append(f"coverage   {made.present} of {distinct} are in the pool")
    if not made.is_new:
        lines.append("unchanged  it was there already, with the same samples")
    return "\n".join([*lines, *_way_on(made.entry)])


def describe_entry(entry: SubsetEntry) -> str:
    """Describe a subset, and what made it."""
    making = entry.manifest["made"]
    lines = [*_lines(entry), f"digest     {entry.digest}"]
    for given in making["inputs"]:
        lines += _input_lines(given)
    lines.append(f"siftclip   {printable(making['siftclip'])}")
    return "\n".join([*lines, *_way_on(entry)])


def _lines(entry: SubsetEntry) -> list[str]:
    manifest = entry.manifest
    making, pool = manifest["made"], manifest["pool"]
    lines = [
        f"subset     {manifest['name']}",
        f"samples    {counted(manifest['kept_samples'], manifest['kept_distinct'])}",
        f"made       {_making(entry)}, {printable(making['time'])}",
    ]
    where = "not noted" if pool is None else f"{pool['root']} ({pool['fingerprint']})"
    return [*lines, f"pool       {printable(where)}"]


def _making(entry: SubsetEntry) -> str:
    making = entry.manifest["made"]
    places = " and ".join(given["place"] for given in making["inputs"])
    if making["operation"] == "sample":
        text = f"{making.get('samples')} draws from {places}, seed {making.get('seed')}"
    else:
        text = f"{making['operation']} of {places}"
    return printable(text)


def _input_lines(given: SubsetInput) -> list[str]:
    lines = [
        f"from       {given['kind']} {given['place']}: "
        f"{counted(given['samples'], given['distinct'])}",
        *(f"           {name} {digest}" for name, digest in given["files"].items()),
    ]
    about = given.get("selection", {})
    if "selector" in about:
        lines.append(f"           selected by {about['selector']} {about.get('parameters', '')}")
    return [shown(printable(line)) for line in lines]


def _way_on(entry: SubsetEntry) -> list[str]:
    weights = entry.folder / WEIGHTS_NAME
    return [
        f"train with selector=external selector.path={entry.folder / SUBSET_NAME}"
        + (f" loss.weights.path={weights}" if weights.is_file() else "")
    ]


def describe_list(states: Sequence[SubsetState]) -> str:
    """Return a table of subsets."""
    if not states:
        return "no subsets: siftclip subset import FILE NAME makes one"
    rows = []
    for state in states:
        if state.entry is None:
            rows.append([state.name, NOTHING, NOTHING, NOTHING, f"damaged: {state.fault}"])
            continue
        manifest, pool = state.entry.manifest, state.entry.manifest["pool"]
        rows.append(
            [
                state.name,
                f"{manifest['kept_samples']:,}",
                f"{manifest['kept_distinct']:,}",
                NOTHING if pool is None else pool["fingerprint"][:8],
                _making(state.entry),
            ]
        )
    header = ["subset", "samples", "distinct", "pool", "made"]
    return "\n".join(text_table(header, rows, right=[1, 2]))


def describe_exported(exported: SubsetExported) -> str:
    """Describe a file that was written."""
    samples = counted(exported.counted.samples, len(exported.counted.uids))
    return f"samples    {samples}\nformat     {exported.format}\nwritten    {exported.path}"


def describe_verified(verified: Verified) -> str:
    """Return a line for each check."""
    lines = [f"subset     {printable(verified.subset)}", f"pool       {verified.pool.root}"]
    for finding in verified.findings:
        lines.append(f"{'FAULT' if finding.is_fault else 'ok':<11}{finding.check}: {finding.text}")
    return "\n".join(lines)
