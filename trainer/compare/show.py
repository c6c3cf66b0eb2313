"""The stages of `siftclip show` and `siftclip diff`: selections that one can look at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from siftclip.datamodules.pool.image_sizes import read_image_sizes
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.selection.columns import read_pool_column
from siftclip.datamodules.selection.registry import (
    SubsetInput,
    find_subset,
    pool_of_manifest,
    pool_record,
    tar_records,
    write_named,
)
from siftclip.datamodules.selection.selection import MANIFEST_NAME, read_selection
from siftclip.datamodules.selection.subset_files import SubsetFile
from siftclip.errors import InputError
from siftclip.files import has_content, write_text
from siftclip.hashing import uid_order
from siftclip.purposes import GeneratorPurpose
from siftclip.selectors.core.source import ExternalColumn
from siftclip.trainer.builders.selection import pool_from
from siftclip.trainer.compare.page.captions import read_captions
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import ShowCommand, TrainCommand
from siftclip.trainer.stages.reproduce import read_kept
from siftclip.trainer.stages.subset import noted_pool, subsets_root

# What imports pandas is imported where it is needed: that takes a second.
if TYPE_CHECKING:
    from siftclip.trainer.compare.page.groups import ImageFeatures
    from siftclip.trainer.compare.page.pool_view import PoolView

log = logging.getLogger(__name__)

Compose = Callable[[Sequence[str]], TrainCommand]
_MOST_CAPTIONS = 20_000  # of a set whose words are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What was looked at."""

    text: str  # lines for a terminal
    page: Path
    view: PoolView
    passing: np.ndarray  # int64 [m], rows that pass the filters
    shown: np.ndarray  # int64 [k], those of them that the page shows


def show_stage(settings: ShowCommand, compose: Compose) -> Looked:
    """Look at a selection, or at a pool.

    Args:
        settings: of the command.
        compose: makes the settings of a run from overrides, for the scores of its selector.

    Raises:
        InputError: there is no such selection, none of it is in the pool, or nothing passes.
    """
    if settings.show.other is not None:
        raise InputError("show.other is for siftclip diff: siftclip diff A B.")
    return _look(settings, [settings.show.selection], compose)


def diff_stage(settings: ShowCommand, compose: Compose) -> Looked:
    """Look at what two selections differ in; see `show_stage`."""
    show = settings.show
    if show.selection is None or show.other is None:
        raise InputError("show.selection and show.other must be given: siftclip diff A B.")
    from siftclip.trainer.compare.passing import FILTERS

    typed = [name for name in (*FILTERS, "export") if getattr(show, name) is not None]
    if typed:
        raise InputError(f"show.{typed[0]} is for siftclip show, which looks at one selection.")
    return _look(settings, [show.selection, show.other], compose)


def _look(settings: ShowCommand, references: Sequence[str | None], compose: Compose) -> Looked:
    show, common = settings.show, settings.common
    root = subsets_root(common)
    with options_of(under("show", "selection", "other")):
        found = [None if name is None else find_subset(root, name) for name in references]
    pool = _pool(settings, found, references)
    from siftclip.trainer.compare.page.groups import group_samples
    from siftclip.trainer.compare.page.pool_view import PoolView, kinds_of
    from siftclip.trainer.compare.page.selection_page import describe, selection_page, summarise
    from siftclip.trainer.compare.passing import passing_rows

    kept: dict[str, np.ndarray] = {}
    scores: dict[str, np.ndarray] = {}
    names = _names(pool, references)
    runs = [_composed_run(settings, reference, compose) for reference in references]
    for name, reference, subset, run in zip(names, references, found, runs, strict=True):
        kept[name] = np.ones(len(pool), dtype=np.int64)
        if subset is not None and reference is not None:
            kept[name] = _times(pool, subset[0], reference)
        own = _scores(settings, pool, reference, run)
        if own is not None:
            scores[name] = own
    sizes = None
    with suppress(InputError):  # its metadata may say nothing of them
        sizes = read_image_sizes(pool, progress=common.progress)
    view = PoolView(
        pool=pool,
        kept=kept,
        scores=scores,
        kinds=None if show.truth is None else kinds_of(Path(show.truth), pool),
        sizes=sizes,
        max_image_pixels=settings.data.max_image_pixels,
        images=show.images,
        groups=group_samples(
            pool, _features(settings, pool, runs), progress=settings.common.progress
        ),
    )
    passing = passing_rows(show, view, names[0], progress=common.progress)
    generator = np.random.default_rng([common.seed, GeneratorPurpose.GALLERY])
    count = min(show.samples, len(passing))
    shown = np.sort(passing[generator.permutation(len(passing))[:count]])
    if show.export is not None:
        inputs = [subset[1] for subset in found if subset is not None]
        _export(settings, view, names[0], passing, inputs)
    words: list[list[str]] = []
    if len(names) == 2:
        words = [_captions(settings, view, *pair) for pair in (names, names[::-1])]
    page = Path(show.page) if show.page is not None else _page(common.output_root, names)
    summary = summarise(view, words)
    write_text(page, selection_page(view, summary, shown))
    text = describe(view, summary, passing, exported=show.export)
    return Looked(text=text, page=page, view=view, passing=passing, shown=shown)


def _pool(
    settings: ShowCommand,
    found: Iterable[tuple[SubsetFile, SubsetInput] | None],
    references: Sequence[str | None],
) -> Pool:
    wanted = settings.pool
    if wanted is None:
        first = next(iter(found))
        if first is None:
            raise InputError("pool.root must name the pool: siftclip show pool.root=/data/pool.")
        wanted = noted_pool(pool_of_manifest(first[0].manifest), str(references[0]))
    return pool_from(wanted, progress=settings.common.progress)


def _names(pool: Pool, references: Sequence[str | None]) -> list[str]:
    """Return what the page calls the selections: the last part of each, told apart."""
    names = [Path(str(pool.root) if name is None else name).name or "pool" for name in references]
    return (
        [f"{name} ({'AB'[at]})" for at, name in enumerate(names)]
        if len({*names}) < len(names)
        else names
    )


def _times(pool: Pool, subset: SubsetFile, reference: str) -> np.ndarray:
    """Return how often each row is kept: int64 [n]."""
    from siftclip.trainer.compare.page.pool_view import times_kept

    rows = pool.table.find(subset.counted.uids)
    there = rows >= 0
    if not there.any():
        raise InputError(
            f"None of the {len(rows)} uids of {reference} is in the pool {pool.root}. Is this the "
            "pool that they are of?"
        )
    if not there.all():
        log.warning("%s: %d of %d uids are not in the pool", reference, (~there).sum(), len(rows))
    return times_kept(rows, subset.counted.multiplicities, len(pool))


def _composed_run(
    settings: ShowCommand, reference: str | None, compose: Compose
) -> TrainCommand | None:
    """Compose the settings of a run again; None of what is none, or whose classes are not known."""
    run = Path(reference or "")
    if reference is None or not has_content(RunDir(path=run).config):
        return None
    _, config = read_kept(run)
    try:
        config.register()
        return compose([*config.words([]), f"progress={str(settings.common.progress).lower()}"])
    except InputError as error:
        log.warning("no scores of %s are shown: %s", run, error)
        return None


def _features(
    settings: ShowCommand, pool: Pool, runs: Sequence[TrainCommand | None]
) -> ImageFeatures | None:
    """Find features of the images: those that are named, of a run, or of the pool."""
    from siftclip.trainer.compare.page.groups import first_features
    from siftclip.trainer.compare.page.pool_view import feature_places

    if settings.show.features is not None:
        found = first_features(pool, [(Path(settings.show.features), None)])
        if found is None:
            raise InputError(
                f"show.features must name a folder with features of the pool's images, as siftclip "
                f"embed makes them. Got {settings.show.features!r}."
            )
        return found
    embedded = sorted((pool.options.cache_folder / "features").glob("*"))
    places: list[tuple[Path | None, str | None]] = []
    for run in runs:
        places += [] if run is None else feature_places(run, pool)
    return first_features(pool, [*places, (None, None), *((path, None) for path in embedded)])


def _scores(
    settings: ShowCommand, pool: Pool, reference: str | None, run: TrainCommand | None
) -> np.ndarray | None:
    """Return the scores of a selection, float32 [n]; None where there are none."""
    show = settings.show
    if show.scores is not None or show.column is not None:
        column = ExternalColumn(path=show.scores, column=show.column or "score")
        with options_of({"path": "show.scores", "column": "show.column"}):
            return read_pool_column(pool, column).astype(np.float32)
    if reference is None:
        return None
    folder = Path(reference)
    if run is not None:
        found = _scores_of_run(settings, folder, pool, run)
        if found is not None:
            return found
    if not has_content(folder / MANIFEST_NAME):
        return None
    selection = read_selection(folder)
    if selection.scores is None:
        return None
    rows = pool.table.find(selection.uids)
    scores = np.full(len(pool), np.nan, dtype=np.float32)
    scores[rows[rows >= 0]] = selection.scores[rows >= 0]
    return scores


def _scores_of_run(
    settings: ShowCommand, folder: Path, pool: Pool, run: TrainCommand
) -> np.ndarray | None:
    """Read the scores of a run's selector, where they are kept."""
    from siftclip.trainer.compare.page.pool_view import kept_scores

    roots = [settings.common.output_root]
    if folder.absolute().parent.name == "train":
        roots.append(folder.absolute().parents[1])
    return next(
        (
            found
            for root in roots
            if (found := kept_scores(run, pool, output_root=root)) is not None
        ),
        None,
    )


def _captions(settings: ShowCommand, view: PoolView, own: str, other: str) -> list[str]:
    """Read captions of what one selection keeps alone: all, or as many as are counted."""
    rows = np.flatnonzero((view.kept[own] > 0) & (view.kept[other] == 0))
    if len(rows) > _MOST_CAPTIONS:
        generator = np.random.default_rng([settings.common.seed, GeneratorPurpose.GALLERY, 1])
        rows = np.sort(rows[generator.permutation(len(rows))[:_MOST_CAPTIONS]])
    texts = read_captions(view.pool, rows, progress=settings.common.progress)
    return [text for text in texts if text is not None]


def _export(
    settings: ShowCommand,
    view: PoolView,
    name: str,
    rows: np.ndarray,
    inputs: Sequence[SubsetInput],
) -> None:
    """Keep what passes as a subset."""
    uids, times = view.pool.uids[rows], view.kept[name][rows]
    order = uid_order(uids)
    with options_of({"name": "show.export"}):
        write_named(
            subsets_root(settings.common),
            str(settings.show.export),
            CountedUids(uids[order], times[order]),
            operation="show",
            inputs=inputs,
            pool=pool_record(view.pool),
            tars=tar_records(view.pool),
        )


def _page(output_root: Path, names: Iterable[str]) -> Path:
    safe = ["".join(c if c.isalnum() or c in "_.-" else "_" for c in name) for name in names]
    return output_root / "show" / f"{'-against-'.join(safe)}.html"
