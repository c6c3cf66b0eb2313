"""A run directory: everything that one run leaves behind, and the only thing a report reads.

config.yaml      the resolved configuration
identity.json    everything that the trained weights depend on
versions.json    the code, versions, processors and threads that it ran on
sessions.jsonl   the same for each later session in which something of that was another
selection.npy    the selection in DataComp's format; selection.json its manifest
metrics.jsonl    a record every N steps; metrics.csv the same
checkpoints/     to continue from
model/           the trained model, as open_clip's `local-dir:` loads it
eval_results.jsonl  one line per task
model.json       what was trained: architecture, activation, preprocessing, tokenizer
budget.json      how long the run is
summary.json     written last: the run is finished
.lock            while a process trains: which one, and since when
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftclip.damaged import set_aside_if_damaged
from siftclip.datamodules.models.load import MODEL_FOLDER, WEIGHTS_NAME
from siftclip.datamodules.models.weight_needs import CONFIG_NAME
from siftclip.datamodules.models.weights import require_whole_weights
from siftclip.datamodules.selection.selection import Selection, write_selection
from siftclip.errors import InputError
from siftclip.files import has_content, read_json_object, write_json, write_text
from siftclip.locks import LOCK_NAME
from siftclip.redaction import begins_as_url
from siftclip.trainer.runtime.run_records import (
    read_budget,
    read_metrics,
    read_summary,
    require_shown,
)
from siftclip.trainer.settings.budget import Budget
from siftclip.writing import make_folder, move

if TYPE_CHECKING:
    import pandas as pd

METRICS_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb_id"
RESULTS_NAME = "eval_results.jsonl"
_SHARE = "online/share_"
IDENTITY_NAME = "identity.json"
SUMMARY_NAME = "summary.json"
_CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")
# Where Lightning looks for the rank of a process: torchrun's, its own launcher's, and others'.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_rank_zero() -> bool:
    """Return whether this process writes what all ranks share."""
    # Lightning's own function, which gets a rank when Lightning is imported. That takes seconds, so
    # until then the same variables are asked here.
    from lightning_utilities.core.rank_zero import rank_zero_only

    rank = getattr(rank_zero_only, "rank", None)
    if rank is None:
        ranks = (os.environ.get(name) for name in _RANK_VARIABLES)
        rank = int(next((rank for rank in ranks if rank is not None), 0))
    return rank == 0


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Find the `step-N.ckpt` in a folder, by the step after which each was written, ascending."""
    names = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("step-*.ckpt"))
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def step_of(checkpoint: Path) -> int:
    """Return the step after which a `step-N.ckpt` was written."""
    return int(checkpoint.stem.split("-")[1])


def require_own_folder(run_dir: str, pool_root: str) -> None:
    """Refuse a folder that holds more than a run, which may be moved as a whole.

    Raises:
        InputError: it holds the pool, the home folder or the folder in which one is.
    """
    place, here = Path(run_dir).resolve(), Path.cwd()
    held = {"all there is": Path(place.anchor), "the home folder": Path.home()}
    held |= {} if place == here else {"the folder in which this was typed": here}
    held |= {} if begins_as_url(pool_root) else {"the pool": Path(pool_root).resolve()}
    for what, folder in held.items():
        if folder.is_relative_to(place):
            raise InputError(
                f"run_dir must be a folder of the run alone. Got {run_dir!r}, which holds {what}."
            )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunDir:
    """Paths and small files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / MODEL_FOLDER

    @property
    def lock(self) -> Path:
        """Of the one process that trains, see `siftclip.locks`."""
        return self.path / LOCK_NAME

    @property
    def config(self) -> Path:
        """Its configuration, as it was composed."""
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        return self.path / RESULTS_NAME

    @property
    def has_model(self) -> bool:
        """Whether training has finished and the model is written."""
        return has_content(self.model / CONFIG_NAME)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run says about itself; None while it is not finished."""
        path = self.path / SUMMARY_NAME
        return read_summary(path) if has_content(path) else None

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished, and its weights, where they are kept, are whole."""
        try:
            finished = self.summary is not None
            if finished and os.path.lexists(self.model / WEIGHTS_NAME):
                require_whole_weights(self.model / WEIGHTS_NAME)
        except InputError:
            return False
        return finished

    def set_damaged_aside(self) -> None:
        """Set aside what the end of the run writes again, where it is damaged."""
        summary, weights = self.path / SUMMARY_NAME, self.model / WEIGHTS_NAME
        if os.path.lexists(summary):
            with set_aside_if_damaged(summary):
                read_summary(summary)
        if os.path.lexists(weights):
            with set_aside_if_damaged(weights, self.model / CONFIG_NAME):
                require_whole_weights(weights)

    @property
    def shown_summary(self) -> dict[str, Any]:
        """The summary of a finished run, with all that reports show.

        Raises:
            InputError: it is not finished, or its summary lacks something.
        """
        summary = self.summary or {}
        require_shown(self.path / SUMMARY_NAME, summary)
        return summary

    def latest_checkpoint(self) -> Path | None:
        """Find the checkpoint of the highest step."""
        steps = checkpoints_in(self.checkpoints)
        return steps[max(steps)] if steps else None

    def budget(self) -> Budget | None:
        """Read how long the run is, once that is known."""
        path = self.path / "budget.json"
        return Budget(**read_budget(path)) if has_content(path) else None

    def keep_model(self, record: dict[str, Any]) -> None:
        """Write down what is trained, `model_record`, as it was built for its weights."""
        write_json(self.path / "model.json", record)

    def keep_budget(self, budget: Budget) -> None:
        """Write down how long the run is: what was measured for it need not come out again."""
        write_json(
            self.path / "budget.json",
            {"samples_seen": budget.samples_seen, "global_batch_size": budget.global_batch_size},
        )

    def records(self) -> list[dict[str, Any]]:
        """Read the log so far, see `read_metrics`."""
        return read_metrics(self.path / METRICS_NAME)

    @property
    def metrics(self) -> pd.DataFrame:
        """The log so far as a table of pandas: a row for each record, `step` its first column."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def __repr__(self) -> str:
        if self.summary is not None:
            state = "finished"
        else:
            latest = self.latest_checkpoint()
            state = "not begun" if not self.has_started else "no checkpoint yet"
            state = state if latest is None else f"at step {step_of(latest)}"
        return f"RunDir({str(self.path)!r}, {state})"

    def costs(self) -> dict[str, float]:
        """Read samples and FLOPs of the whole run, by name, from the last record of the log."""
        costs: dict[str, float] = {}
        for record in self.records():
            costs.update({k[5:]: v for k, v in record.items() if k.startswith("cost/")})
        return costs

    def final_costs(self) -> dict[str, float]:
        """Read `costs` of a run that has no step left to train.

        Raises:
            InputError: the log does not say them.
        """
        costs = self.costs()
        if "loaded_samples" not in costs:
            raise InputError(
                f"{self.path / METRICS_NAME} has no record of what the run has cost, and no step "
                "is left to train. Put a copy of that file back; or train again from the first "
                f"step with reuse=false, which moves what there is to {self.path}.replaced-TIME."
            )
        return costs

    def copies_fraction(self) -> float:
        """Return the share of batches that held a sample twice, of the worst selection."""
        shares = (record.get("data/copies_fraction", 0.0) for record in self.records())
        return max(shares, default=0.0)

    def cost_line(self) -> str:
        """Say in a line what a finished run has cost."""
        summary = self.shown_summary
        flops = f"{summary['flops']:.3g}" if "flops" in summary else "unknown"
        return (
            f"{summary['trained_samples']:,.0f} samples trained, {summary['loaded_samples']:,.0f} "
            f"loaded; {flops} FLOPs; {summary['train_seconds']:.1f} s, of these waiting "
            f"{summary['data_wait_seconds']:.1f}, scoring {summary['scoring_seconds']:.1f}, "
            f"selecting {summary['selection_seconds']:.1f}"
        )

    def shares_chosen(self) -> dict[str, float]:
        """Average the share of each kind among what was chosen in the loop, over the log."""
        shares: dict[str, dict[int, float]] = {}
        for record in self.records():
            for name, value in record.items():
                if name.startswith(_SHARE) and not name.endswith("_offered"):
                    shares.setdefault(name.removeprefix(_SHARE), {})[record["step"]] = value
        return {kind: sum(values.values()) / len(values) for kind, values in shares.items()}

    def seconds(self) -> dict[str, float]:
        """Return a time breakdown of training: seconds over all processes that worked on the run.

        `train_seconds` is all of it; `data_wait_seconds`, `scoring_seconds` and
        `selection_seconds` are parts of it, and what is left of them the training steps
        themselves. Steps that were repeated after a restart count once: the time that the run would
        have taken without the restart.
        """
        windows = {
            record["step"]: record for record in self.records() if "train/batch_time" in record
        }
        steps = sorted(windows)
        lengths = [step - before for step, before in zip(steps, [0, *steps], strict=False)]

        def total(name: str) -> float:
            return float(
                sum(
                    windows[step].get(name, 0.0) * n for step, n in zip(steps, lengths, strict=True)
                )
            )

        return {
            "train_seconds": total("train/batch_time"),
            "data_wait_seconds": total("train/data_time"),
            "scoring_seconds": total("train/scoring_time"),
            "selection_seconds": total("train/selection_time"),
        }

    @property
    def has_started(self) -> bool:
        """Whether a run was begun here, also by an earlier version, which kept a digest alone."""
        return any(has_content(self.path / name) for name in (IDENTITY_NAME, "identity"))

    def identity(self) -> dict[str, Any] | None:
        """Read what the run depends on; None if nothing was run here, or by an earlier version."""
        path = self.path / IDENTITY_NAME
        try:
            return read_json_object(path) if has_content(path) else None
        except InputError as error:
            way_out = "Delete it: what the run is of is then read from its config.yaml."
            raise InputError(f"{error} {way_out}") from None

    def set_aside(self) -> Path:
        """Move all files, so that the run can begin anew; returns the folder that has them now.

        The lock stays where it is.
        """
        path = Path(os.path.abspath(self.path))  # which has a name, unlike "."
        aside = path.with_name(f"{path.name}.replaced-{datetime.now():%Y%m%d-%H%M%S}")
        make_folder(aside)
        for path in self.path.iterdir():
            if path != self.lock:
                move(path, aside / path.name)
        return aside

    def start(self, config: str, selection: Selection, identity: dict[str, Any]) -> None:
        """Write down what the run is, before its first step; `config` goes into config.yaml."""
        write_text(self.config, config)
        write_selection(selection, self.path)
        write_json(self.path / IDENTITY_NAME, identity)

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        write_json(self.path / SUMMARY_NAME, summary)
