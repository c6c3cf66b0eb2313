"""What a run tells its loggers beside its metrics: what it is made from, and what it has made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siftclip.datamodules.pool.reader import (
    BadSampleError,
    RawSample,
    SampleReader,
    decode_caption,
    decode_image,
)
from siftclip.datamodules.selection.selection import MANIFEST_NAME, SUBSET_NAME
from siftclip.reading import read_text
from siftclip.redaction import shown
from siftclip.trainer.builders.selection import PoolSelection
from siftclip.trainer.runtime.run_dir import WANDB_ID_NAME, RunDir
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.logger import MOST_CHARACTERS, LoggerSettings

# What imports Lightning or wandb is imported where it is needed: that takes seconds.
if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from siftclip.trainer.runtime.tracking.wandb_artifacts import Lineage

_THUMBNAIL_PIXELS = 256  # of the longer side of an image in a table
_SCORE_PARTS = 64  # of a histogram
_DIGITS = 16  # of a digest, in names


def selection_statistics(selected: PoolSelection) -> dict[str, float]:
    """Return the numbers of a selection, by the names they are logged under."""
    manifest = selected.selection.manifest
    return {
        "selection/samples": len(selected.selection),
        "selection/distinct": len(selected.selection.uids),
        "selection/fraction": manifest["kept_fraction"],
        "selection/coverage": selected.coverage.fraction,
        **{
            f"selection/score_{name}": value
            for name, value in manifest["score_quantiles_kept"].items()
        },
    }


def begin_tracking(
    loggers: Sequence[Logger],
    settings: LoggerSettings,
    run: RunDir,
    selected: PoolSelection,
    *,
    max_image_pixels: int,
) -> None:
    """Tell the loggers what is known before the first step, and what earlier starts have logged.

    So that a run which is still training, or has crashed, says what it is trained on. In
    `metrics.jsonl` these numbers come last, as they always did.

    Args:
        loggers: of the run, on its first rank.
        settings: what is to be shown.
        run: that begins, or continues.
        selected: what it trains on.
        max_image_pixels: larger images are not shown.
    """
    from siftclip.trainer.runtime.loggers import FileLogger, catch_up, log_histograms, log_tables

    others = [logger for logger in loggers if not isinstance(logger, FileLogger)]
    if not others:
        return
    for logger in others:
        logger.log_metrics(selection_statistics(selected), step=0)
    tables: dict[str, list[dict[str, Any]]] = {"selection/scores": score_table(selected)}
    if settings.samples:
        tables["selection/examples"] = example_table(
            selected, count=settings.samples, max_image_pixels=max_image_pixels
        )
    log_tables(others, tables, step=0)
    log_histograms(others, _score_histogram(selected), step=0)
    _log_artifacts(others, settings, inputs=[selection_lineage(selected, settings, run)])
    catch_up(others, run.records())


def end_tracking(loggers: Sequence[Logger], settings: LoggerSettings, run: RunDir) -> None:
    """Tell the loggers what the run has made, once it is finished; see `begin_tracking`."""
    from siftclip.trainer.runtime.loggers import log_summary

    _log_artifacts(loggers, settings, outputs_of=run)
    log_summary(loggers, run.records())


def log_report(
    settings: LoggerSettings,
    folder: Path,
    *,
    comparison: str,
    runs: Sequence[RunDir],
    results: Sequence[Mapping[str, Any]],
) -> None:
    """Log the report of a comparison to Weights & Biases, as a run in the group of its runs.

    Where `logger.artifacts` has it, since the page holds images and captions of the pool.

    The page, the table of results, and an artifact that is made from the evaluations of the runs.
    A report that is written again is added to the same run of wandb. Call it on the first rank.

    Args:
        settings: of the comparison.
        folder: of the report, with report.html, report.md and results.csv.
        comparison: its name.
        runs: that it is of.
        results: the rows of `results.csv`, all with the same keys.
    """
    if not settings.wandb or "report" not in settings.artifacts:
        return
    from siftclip.trainer.runtime.loggers import RunKind, wandb_run
    from siftclip.trainer.runtime.tracking.wandb_artifacts import Lineage, log_lineage

    name = f"{settings.name or comparison}-report"[:MOST_CHARACTERS]
    group = settings.group or comparison[:MOST_CHARACTERS]
    artifacts = (*settings.artifacts, "tables")
    settings = replace(
        settings, group=group, job_type="report", name=name, id=None, artifacts=artifacts
    )
    logger = wandb_run(folder, settings, RunKind(name=name, job_type="report"), config={})
    files = [folder / name for name in ("report.html", "report.md", "results.csv")]
    logger.log_page("report/page", files[0])
    logger.log_records("report/results", results, step=None)
    ids = {
        run: read_text(run.path / WANDB_ID_NAME).strip()
        for run in runs
        if (run.path / WANDB_ID_NAME).is_file()
    }
    evaluations = [evaluation_lineage(run, run_id) for run, run_id in ids.items()]
    evaluations = [each for each in evaluations if each.files]
    record = {"comparison": comparison, "runs": [run.path.name for run in runs]}
    report = Lineage(
        kind="report",
        identity=comparison,
        record=record,
        files=files,
        copies=True,
        sources=evaluations,
    )
    log_lineage(logger, inputs=evaluations, outputs=[report])
    logger.end("finished")


def score_table(selected: PoolSelection) -> list[dict[str, Any]]:
    """Return a row for each quantile of the scores: of the pool, and of what is kept."""
    manifest = selected.selection.manifest
    of_pool, of_kept = manifest.get("score_quantiles_pool") or {}, manifest["score_quantiles_kept"]
    return [
        {"quantile": int(name.removeprefix("q")), "pool": of_pool.get(name), "kept": value}
        for name, value in of_kept.items()
    ]


def example_table(
    selected: PoolSelection, *, count: int, max_image_pixels: int
) -> list[dict[str, Any]]:
    """Return rows with image and caption: of samples that are kept, best first, and left out.

    Which ones is no matter of chance: the kept ones stand at equal distances in the order of their
    scores, or of their uids where there are none, the others at equal distances in the pool.
    Samples that cannot be read have no row.

    Args:
        selected: from its pool.
        count: how many at most that are kept, and how many that are left out.
        max_image_pixels: of an image.
    """
    selection, pool = selected.selection, selected.pool
    scores = selection.scores
    order = np.arange(len(selection.uids)) if scores is None else np.argsort(-scores, kind="stable")
    kept = order[_spread(len(order), count)]
    rows = pool.table.find(selection.uids[kept])
    is_left_out = np.ones(len(pool), dtype=bool)
    is_left_out[selected.rows] = False
    left_out = np.flatnonzero(is_left_out)
    left_out = left_out[_spread(len(left_out), count)]
    shown_rows = np.concatenate([rows[rows >= 0], left_out])
    shown_scores = [None if scores is None else float(scores[at]) for at in kept[rows >= 0]]
    shown_scores += [None] * len(left_out)
    reader = SampleReader(pool=pool, max_image_pixels=max_image_pixels)
    read = dict(reader.read(shown_rows))
    reader.close()
    table = []
    for number, (row, score) in enumerate(zip(shown_rows.tolist(), shown_scores, strict=True)):
        sample = _shown_sample(read[number], max_image_pixels, pool.options.max_caption_bytes)
        if sample is not None:
            is_kept = number < len(shown_rows) - len(left_out)
            tar, key = pool.shards[pool.shard_of_row[row]].name, pool.keys[row]
            place = shown(f"{tar}:{key.decode(errors='replace')}")
            table.append({"kept": is_kept, "score": score, "sample": place, **sample})
    return table


def _spread(length: int, count: int) -> np.ndarray:
    """Return at most `count` of the numbers below `length`, at equal distances: int64."""
    return np.unique(np.linspace(0, max(0, length - 1), min(count, length)).astype(np.int64))


def _shown_sample(
    sample: RawSample | BadSampleError, max_image_pixels: int, max_caption_bytes: int
) -> dict[str, Any] | None:
    if isinstance(sample, BadSampleError):
        return None
    try:
        image = decode_image(sample.image, max_image_pixels)
        caption = decode_caption(sample.caption, max_caption_bytes)
    except BadSampleError:
        return None
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    return {"caption": shown(caption), "image": image}


def _score_histogram(selected: PoolSelection) -> dict[str, Any]:
    from siftclip.trainer.runtime.tracking.continued import Histogram

    scores = selected.selection.scores
    scores = np.empty(0) if scores is None else scores[np.isfinite(scores)].astype(np.float64)
    if not len(scores):
        return {}
    low, high = float(scores.min()), float(scores.max())
    high = max(high, low + 1e-6 * max(abs(low), 1.0))  # bins must have a width in float64
    counts, _ = np.histogram(scores, bins=_SCORE_PARTS, range=(low, high))
    return {"selection/score": Histogram(counts=counts.tolist(), low=low, high=high)}


# ---- artifacts ----------------------------------------------------------------------------------
def selection_lineage(selected: PoolSelection, settings: LoggerSettings, run: RunDir) -> Lineage:
    """Describe the selection of a run with the pool and the features that it was made from."""
    from siftclip.trainer.runtime.tracking.wandb_artifacts import Lineage

    manifest, features = selected.selection.manifest, selected.settings.features
    of_pool = Lineage(
        kind="pool",
        identity=selected.pool.fingerprint,
        record={
            "root": manifest["pool"]["root"],
            "fingerprint": selected.pool.fingerprint,
            "samples": len(selected.pool),
            "tars": len(selected.pool.shards),
        },
    )
    model = None if features.model is None else to_plain(features.model)
    of_features = [
        Lineage(
            kind="features",
            identity=str(digest)[:_DIGITS],
            record={"name": features.name, "model": model, "digest": digest},
            sources=[of_pool],
        )
        for digest in manifest.get("identity", {}).get("features", ())
    ]
    names = ("selector", "kept_samples", "kept_distinct", "kept_fraction")
    has_files = "selection" in settings.artifacts
    return Lineage(
        kind="selection",
        identity=f"{manifest['selector']}-{selected.selection.digest[:_DIGITS]}",
        record={
            **{name: manifest[name] for name in names},
            "digest": selected.selection.digest,
        },
        files=[run.path / SUBSET_NAME, run.path / MANIFEST_NAME] if has_files else [],
        sources=[of_pool, *of_features],
    )


def evaluation_lineage(run: RunDir, run_id: str) -> Lineage:
    """Describe the results of a run, which have files once tasks were evaluated."""
    from siftclip.trainer.runtime.tracking.wandb_artifacts import Lineage

    names = (run.results.name, f"{run.results.stem}.csv", f"{run.results.stem}_model.json")
    files = _own_files(run.path / name for name in names)
    record = {"run": run_id}
    return Lineage(kind="evaluation", identity=run_id, record=record, files=files, copies=True)


def _model_lineage(run: RunDir, run_id: str) -> Lineage:
    from siftclip.trainer.runtime.tracking.wandb_artifacts import Lineage

    summary = run.summary or {}
    names = ("selector", "selection", "seed", "steps", "trained_samples")
    return Lineage(
        kind="model",
        identity=run_id,
        record={"run": run_id, **{name: summary.get(name) for name in names}},
        files=_own_files(sorted(run.model.iterdir())),
    )


def _own_files(paths: Iterable[Path]) -> list[Path]:
    """Leave out what is not there, and links, which lead to files of others."""
    return [path for path in paths if path.is_file() and not path.is_symlink()]


_MAKERS = {"model": _model_lineage, "evaluation": evaluation_lineage}


def _log_artifacts(
    loggers: Sequence[Logger],
    settings: LoggerSettings,
    *,
    inputs: Sequence[Lineage] = (),
    outputs_of: RunDir | None = None,
) -> None:
    """Log artifacts to Weights & Biases, as far as they are wanted."""
    from siftclip.trainer.runtime.tracking.wandb_artifacts import log_lineage
    from siftclip.trainer.runtime.tracking.wandb_runs import WandbRun

    for logger in loggers:
        if isinstance(logger, WandbRun) and settings.artifacts:
            makers = [make for name, make in _MAKERS.items() if name in settings.artifacts]
            made = [make(outputs_of, str(logger.version)) for make in makers if outputs_of]
            log_lineage(logger, inputs=inputs, outputs=[each for each in made if each.files])
