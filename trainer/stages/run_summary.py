"""Ends a run: what it was trained on, and what it took, in its log and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from siftclip.trainer.builders.selection import PoolSelection
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.budget import Budget
from siftclip.trainer.settings.online import OnceSettings, OnlineSettings
from siftclip.trainer.stages.tracking import selection_statistics

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def conclude_run(
    run: RunDir,
    selected: PoolSelection,
    budget: Budget,
    loggers: Sequence[Logger],
    *,
    seed: int,
    online: str,
) -> None:
    """Log statistics of the selection, and mark the run as finished.

    Args:
        run: whose training is done.
        selected: what it has trained on.
        budget: of the training.
        loggers: of the run.
        seed: of the run.
        online: what has selected in the loop, see `online_name`.
    """
    from siftclip.trainer.runtime.loggers import FileLogger

    manifest, costs = selected.selection.manifest, run.final_costs()
    drawn = costs.get("drawn_samples", budget.trained_samples)
    passes = drawn / len(selected.rows)
    for logger in loggers:
        # the others have had the selection from the beginning
        of_selection = selection_statistics(selected) if isinstance(logger, FileLogger) else {}
        logger.log_metrics({**of_selection, "train/passes": passes}, step=budget.total_steps)
    run.finish(
        {
            "selector": manifest["selector"],
            "seed": seed,
            "selection": selected.selection.digest,
            "pool": selected.pool.fingerprint,
            "steps": budget.total_steps,
            "trained_samples": budget.trained_samples,
            "requested_samples": budget.samples_seen,
            "online": online,
            **costs,
            "passes": passes,
            "selected_samples": len(selected.selection),
            "coverage": selected.coverage.fraction,
            "copies_fraction": run.copies_fraction(),
            "offline_selection_seconds": round(manifest["cost"]["seconds"], 3),
            **{name: round(value, 3) for name, value in run.seconds().items()},
        }
    )


def online_name(online: OnlineSettings) -> str:
    """Say in a few words what selects in the loop."""
    if isinstance(online, OnceSettings):
        return "once"
    return f"{online.cadence} {online.selector.name}"
