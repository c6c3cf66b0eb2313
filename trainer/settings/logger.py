"""Where the metrics of a run go, beside the files that it always writes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Ge

from siftclip.errors import InputError
from siftclip.trainer.settings.fields.marks import AtMost, Credentials, Example, Words
from siftclip.trainer.settings.fields.section import Count, Section

WandbMode: TypeAlias = Literal["auto", "online", "offline"]
XAxis: TypeAlias = Literal["step", "samples", "flops", "seconds"]
Artifact: TypeAlias = Literal["selection", "model", "evaluation", "report", "tables"]

WANDB_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
MOST_CHARACTERS = 128  # of a name, in Weights & Biases
_MOST_OF_TAG = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerSettings(Section):
    """Weights & Biases, TensorBoard and MLflow, any of them at once.

    Beside the files that are always written: metrics.jsonl and metrics.csv. trainer.loggers adds
    any other of Lightning's.
    """

    PLACE: ClassVar[str] = "logger"

    wandb: bool = True
    """Log to Weights & Biases."""

    tensorboard: bool = False
    """Log to TensorBoard, into tensorboard/ of the run's folder."""

    mlflow: bool = False
    """Log to MLflow, see mlflow_uri."""

    mode: WandbMode = "auto"
    """Of Weights & Biases; auto: online if you are logged in, else offline."""

    project: str = "siftclip"
    """Project in Weights & Biases, experiment in MLflow."""

    entity: Annotated[str | None, Example("my-team")] = None
    """User or team in Weights & Biases; null: your default one."""

    group: Annotated[str | None, Example("ablation")] = None
    """Group of runs; null: the comparison that a run belongs to, if any."""

    job_type: str | None = None
    """Kind of run; null: train, or eval of siftclip eval watch."""

    name: str | None = None
    """Name of the run; null: that of its folder, or arm and seed in a comparison."""

    id: Annotated[str | None, Example("vit-b32-s0")] = None
    """Id of the run in Weights & Biases; null: drawn at its first start, and kept in its folder."""

    tags: Annotated[tuple[str, ...], Example("[vit,small]")] = ()
    """Tags of the run."""

    notes: str | None = None
    """What the run is for, in your words."""

    x_axis: XAxis = "step"
    """What charts of Weights & Biases count by; each row has all four."""

    artifacts: Annotated[
        tuple[Artifact, ...],
        Words("a list of some of [selection, model, evaluation, report, tables]"),
        Example("[selection,evaluation,report,tables]"),
    ] = ()
    """Files that go to Weights & Biases, with where they come from; tables: those of its runs."""

    samples: Annotated[int, Ge(0), AtMost(10_000)] = 0
    """Samples of the pool in a table, with image and caption: so many kept, so many left out."""

    gradients_every_n_steps: Count | None = None
    """Steps between two histograms of each weight's gradient; null: none."""

    mlflow_uri: Annotated[str | None, Credentials(), Example("sqlite:////data/mlflow.db")] = None
    """Database or server of MLflow; null: MLFLOW_TRACKING_URI, else mlflow.db in output_dir."""

    def check(self) -> None:
        if not re.fullmatch(r"[^/\\#?%:]{1,128}", self.project):
            raise InputError(
                "logger.project must be a name of 1 to 128 characters without / \\ # ? % and :. "
                f"Got {self.project!r}."
            )
        if self.entity is not None and not re.fullmatch(r"[\w.-]{1,128}", self.entity):
            raise InputError(
                "logger.entity must be the name of a user or a team: 1 to 128 letters, digits, _ . "
                f"and -. Got {self.entity!r}."
            )
        for option in ("group", "job_type", "name"):
            text = getattr(self, option)
            if text is not None and not _is_label(text, MOST_CHARACTERS):
                raise InputError(
                    f"logger.{option} must be one line of 1 to {MOST_CHARACTERS} characters. Got "
                    f"{text!r}."
                )
        if self.id is not None and not WANDB_ID.fullmatch(self.id):
            raise InputError(
                f"logger.id must consist of 1 to 128 letters, digits, _ . and -. Got {self.id!r}."
            )
        if not all(_is_label(tag, _MOST_OF_TAG) for tag in self.tags):
            raise InputError(
                f"logger.tags must each be one line of 1 to {_MOST_OF_TAG} characters. Got "
                f"{list(self.tags)!r}."
            )

        uri = self.mlflow_uri
        if uri is not None and "://" not in uri and not uri.startswith("databricks"):
            raise InputError(
                "logger.mlflow_uri must be the address of a database or a server, such as "
                f"sqlite:////data/mlflow.db or https://example.org. Got {uri!r}."
            )

    def of_arm(self, comparison: str, *, arm: str, seed: int) -> LoggerSettings:
        """Return the settings of one run of a comparison: its group, and a name of its own.

        Args:
            comparison: its name, the group of all runs unless another one is set.
            arm: of the run; with the seed it is the name, behind one that is set for all.
            seed: of the run.

        Raises:
            InputError: one id is set for all runs.
        """
        if self.id is not None:
            raise InputError(
                "logger.id names a single run, and a comparison has one for each arm and seed. "
                f"Leave it out; logger.group names them all. Got {self.id!r}."
            )
        name = f"{arm}-s{seed}" if self.name is None else f"{self.name}-{arm}-s{seed}"
        group = comparison if self.group is None else self.group
        return replace(self, group=group[:MOST_CHARACTERS], name=name[:MOST_CHARACTERS])


def _is_label(text: str, most: int) -> bool:
    return bool(text.strip()) and len(text) <= most and text.isprintable()
