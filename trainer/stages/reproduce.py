"""The reproduce stage: a run is trained again from its directory, and what came out is compared.

In three steps, between which the command says what it knows: what the run is and which options and
files are others here (`begin`), what code, machine, pool and selection are (`select_again`), and
what came out the same (`train_again`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from siftclip.datamodules.identity.identities import differences, named_files
from siftclip.datamodules.models.load import WEIGHTS_NAME
from siftclip.datamodules.selection.selection import MANIFEST_NAME, Selection, read_selection
from siftclip.errors import InputError
from siftclip.eval.results.files import read_results
from siftclip.files import read_json_object
from siftclip.redaction import HIDDEN, begins_as_url
from siftclip.trainer.builders.objective import open_loss_data
from siftclip.trainer.builders.selection import PoolSelection, select_stage
from siftclip.trainer.outputs.differences import (
    LossDifference,
    ResultDifference,
    SelectionDifference,
    ValueDifference,
    compare_files,
    compare_losses,
    compare_results,
    compare_selections,
    environment_differences,
)
from siftclip.trainer.outputs.kinds import NESTED
from siftclip.trainer.runtime.environment import environments
from siftclip.trainer.runtime.run_dir import RunDir, is_rank_zero
from siftclip.trainer.runtime.run_records import read_config
from siftclip.trainer.settings.budget import limit_from
from siftclip.trainer.settings.commands import ReproduceCommand
from siftclip.trainer.settings.composed import Composed
from siftclip.trainer.settings.kept_config import OF_THE_MACHINE, KeptConfig, kept_config
from siftclip.trainer.stages.train import (
    check_training,
    run_dir_for,
    run_environment,
    run_identity,
    train_stage,
)

# Options whose value is the path of a file or folder that is read
_PATHS = {
    *("root", "path", "offline", "clusters", "truth", "covariance", "text_target", "entities"),
    *("entries", "pretrained", "pretrained_image", "pretrained_text"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """A run that is to be repeated, and what is known before anything is opened."""

    original: RunDir
    settings: ReproduceCommand
    options: tuple[ValueDifference, ...]  # others than the run's, as they were typed
    left_out: tuple[str, ...]  # what of its configuration is not taken over
    missing: tuple[ValueDifference, ...]  # files and folders that are not here, or others


def read_kept(run: Path) -> tuple[dict[str, Any], KeptConfig]:
    """Read the configuration of a run, and what of it a command can be composed from.

    Raises:
        InputError: there is no run, or its configuration is damaged or none.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"reproduce.run={str(run)!r} must be the directory of a run. It has no config.yaml."
        )
    config = read_config(path)
    return config, kept_config(config, owner=str(path))


def begin(settings: ReproduceCommand) -> Reproduction:
    """Read what the run was, and compare the options.

    A run that lies in `output_dir` itself is repeated in a folder of its own in there, so that
    nothing of it is reused.

    Raises:
        InputError: there is no run, or an option is wrong.
    """
    original = RunDir(path=Path(settings.reproduce.run))
    config, kept = read_kept(original.path)
    settings = _apart(settings, original)
    here = settings.composed.values
    return Reproduction(
        original=original,
        settings=settings,
        options=tuple(_other_options(config, kept, here)),
        left_out=kept.left_out,
        missing=(
            *_missing_paths({name: here.get(name) for name in kept.groups}),
            *_other_files(original),
        ),
    )


def _apart(settings: ReproduceCommand, original: RunDir) -> ReproduceCommand:
    """Write elsewhere than where the run lies."""
    common, place = settings.common, original.path.resolve()
    if common.run_dir is not None:
        if Path(common.run_dir).resolve() == place:
            raise InputError(f"run_dir={common.run_dir!r} is the run that is repeated.")
        return settings
    root = common.output_root
    while place.is_relative_to(root.resolve()):
        root = root / NESTED
    common = replace(common, output_dir=str(root))
    composed = Composed(values={**settings.composed.values, "output_dir": str(root)})
    return replace(settings, common=common, composed=composed)


def _other_options(
    config: Mapping[str, Any], kept: KeptConfig, here: Mapping[str, Any]
) -> Iterator[ValueDifference]:
    """Yield options that are others here than in the run's configuration.

    What that does not have, as an earlier version wrote it, has its default, and is no difference.
    """
    groups = (*kept.groups, "seed", "budget")
    written = dict(_leaves({name: config.get(name) for name in groups}))
    theirs = {**dict(_leaves({**kept.groups})), **written}
    ours = dict(_leaves({name: here.get(name) for name in groups}))
    for name in dict.fromkeys([*theirs, *ours]):
        if name.startswith(OF_THE_MACHINE) or HIDDEN in str(theirs.get(name)):
            continue
        if theirs.get(name) != ours.get(name):
            yield ValueDifference(name=name, there=theirs.get(name), here=ours.get(name))


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{place}.{name}" if place else str(name))
    elif value not in ({}, [], None):  # nothing, however it is written
        yield place, value


def _missing_paths(groups: Mapping[str, Any]) -> Iterator[ValueDifference]:
    """Yield the files and folders that options name, and that are not there."""
    for option, value in _leaves(groups):
        values = value if isinstance(value, list) else [value]
        for text in values:
            is_path = option.rpartition(".")[2] in _PATHS or option == "features.more"
            if not isinstance(text, str) or not is_path or begins_as_url(text):
                continue
            is_tag = option.rpartition(".")[2].startswith("pretrained") and "/" not in text
            if not is_tag and not Path(text).exists():
                yield ValueDifference(name=option, there=text, here=None)


def _other_files(original: RunDir) -> Iterator[ValueDifference]:
    """Yield the files that the selection's manifest knows by content, and that are others here."""
    path = original.path / MANIFEST_NAME
    identity = read_json_object(path).get("identity") if path.is_file() else None
    files = identity.get("files") if isinstance(identity, Mapping) else None
    for name, digest in files.items() if isinstance(files, Mapping) else ():
        now = named_files([name]).get(name)
        if now != digest and Path(name).exists():  # one that is missing is told by its option
            yield ValueDifference(name=name, there=digest, here=now)


# ---- before training ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """What is known once the pool is open and the selection made, before training."""

    run: RunDir  # that will be trained, or is there already
    selected: PoolSelection
    environment: tuple[ValueDifference, ...] | None  # None: the run does not say
    sessions: int  # of the run, each on something else than the one before
    pool: ValueDifference | None
    selection: SelectionDifference | None  # None: the run does not have it
    identity: tuple[str, ...]  # what else the weights depend on, and is another
    is_known: bool  # whether the run says what its weights depend on
    steps: int | None  # taken from the run, where its budget is measured


def select_again(reproduction: Reproduction) -> Selected:
    """Open the pool, select, and compare all that the weights depend on.

    Raises:
        InputError: an option or a file is wrong, or a record of the run is damaged.
    """
    settings, original = reproduction.settings, reproduction.original
    check_training(settings)
    selected = select_stage(settings)
    bound = settings.pool.max_bad_fraction
    loss_data = open_loss_data(settings.loss, selected, max_bad_fraction=bound)
    identity = json.loads(json.dumps(run_identity(settings, selected, loss_data), default=str))
    run = run_dir_for(settings, selected, identity)
    before = original.identity()
    sessions = environments(original.path)
    now = run_environment(settings.trainer, settings.data, selected.pool)
    theirs = _selection_of(original)
    words = [] if before is None else differences(before, identity)
    return Selected(
        run=run,
        selected=selected,
        environment=tuple(environment_differences(sessions[-1], now)) if sessions else None,
        sessions=len(sessions),
        pool=_other_pool(before, selected),
        selection=None if theirs is None else compare_selections(theirs, selected.selection),
        identity=tuple(words),
        is_known=before is not None,
        steps=_take_budget(settings, original, run),
    )


def _selection_of(run: RunDir) -> Selection | None:
    return read_selection(run.path) if (run.path / MANIFEST_NAME).is_file() else None


def _other_pool(
    before: Mapping[str, Any] | None, selected: PoolSelection
) -> ValueDifference | None:
    here = f"{selected.pool.fingerprint}/{selected.pool.members_digest}"
    if before is None:
        return None
    there = f"{before.get('pool')}/{before.get('members')}"
    return None if here == there else ValueDifference(name="pool", there=there, here=here)


def _take_budget(settings: ReproduceCommand, original: RunDir, run: RunDir) -> int | None:
    """Give the new run the steps of the old one, where measuring would find others."""
    budget = original.budget()
    if limit_from(settings.budget) is None or budget is None or run.budget() is not None:
        return None
    if budget.global_batch_size != settings.scale.global_batch_size:
        return None
    if is_rank_zero():
        run.keep_budget(budget)
    return budget.total_steps


# ---- afterwards ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduced:
    """What came out, against what had come out before."""

    original: RunDir
    run: RunDir
    was_there: bool  # trained by an earlier call
    selection: SelectionDifference | None  # None: the run does not have it
    weights: ValueDifference | None  # None: the same to the bit
    losses: LossDifference
    results: tuple[ResultDifference, ...]
    is_evaluated: bool  # whether tasks were named


def train_again(reproduction: Reproduction, selected: Selected) -> Reproduced:
    """Train, or continue, and compare with the run.

    Raises:
        InputError: see `train_stage`; or a record of one of the runs is damaged.
    """
    settings, original = reproduction.settings, reproduction.original
    was_there = settings.common.reuse and selected.run.is_finished
    run = train_stage(settings, selected=selected.selected)
    return Reproduced(
        original=original,
        run=run,
        was_there=was_there,
        selection=selected.selection,
        weights=compare_files(original.model / WEIGHTS_NAME, run.model / WEIGHTS_NAME),
        losses=compare_losses(original.records(), run.records()),
        results=tuple(compare_results(read_results(original.results), read_results(run.results))),
        is_evaluated=settings.eval.root is not None,
    )
