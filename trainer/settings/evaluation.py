"""The evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

from siftclip.trainer.settings.fields.marks import Example, Open, Words
from siftclip.trainer.settings.fields.section import (
    Count,
    KeySplit,
    LocalPath,
    Name,
    NotNegative,
    Resamples,
    Samples,
    Section,
    Seed,
)

Protocol: TypeAlias = Literal["zero_shot", "linear_probe", "few_shot"]
_NAMES = Words("a name, or a list of names such as [cifar10,mnist]")
Names: TypeAlias = Annotated[str | tuple[str, ...], _NAMES]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings(Section):
    """What linear probes are fitted on, and how."""

    PLACE: ClassVar[str] = "eval.probe"

    train_split: Name = "train"
    """The split that probes are fitted on."""

    l2: NotNegative | None = None
    """The penalty; null: searched on a fifth of the train split."""

    shots: tuple[Count, ...] = (1, 4, 16)
    """Of few_shot: samples per class."""

    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Of few_shot: draws that are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DuringSettings(Section):
    """Evaluation while training."""

    PLACE: ClassVar[str] = "eval.during"

    every_n_steps: Count | None = None
    """Steps between two evaluations; null: none."""

    tasks: Annotated[str | tuple[str, ...] | None, _NAMES] = None
    """Names of tasks; null: eval.tasks."""

    max_samples: Count | None = None
    """Samples of each task, the same ones each time; null: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings(Section):
    """Which tasks are evaluated, and how; eval=NAME chooses a suite."""

    PLACE: ClassVar[str] = "eval"

    root: Annotated[LocalPath | None, Example("/data/tasks")] = None
    """Folder of tasks in clip_benchmark's webdataset layout; null: no evaluation."""

    suite: str | None = None
    """What the tasks together are; tasks of a suite that are not there are reported."""

    tasks: Annotated[str | tuple[str, ...] | None, _NAMES, Example("[cifar10,mnist]")] = None
    """Names of tasks; null: all that are there."""

    key_split: KeySplit = "first_dot"
    """The dot that ends a sample's key in its members' names: first_dot is webdataset's rule."""

    groups: Annotated[Mapping[str, Names], Open(), Example("{mine: [cifar10, mnist]}")] = field(
        default_factory=dict
    )
    """Averages: NAME: [TASK, TASK:METRIC, ...]."""

    protocols: Annotated[str | tuple[str, ...], _NAMES, Example("[zero_shot,linear_probe]")] = (
        "zero_shot",
    )
    """zero_shot, linear_probe, few_shot; probes need one class per image and a train split."""

    batch_size: Samples = 256
    """Images, and texts, that a tower takes at once."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the towers: fp32 is DataComp's; bf16 and fp16 are faster, and give other numbers."""

    resamples: Resamples = 1000
    """Of the test sets, for the 95 % intervals; 0: no intervals."""

    classnames: Annotated[Mapping[str, str], Open(), Example("{cifar10: names.txt}")] = field(
        default_factory=dict
    )
    """TASK: a file with other class names."""

    templates: Annotated[Mapping[str, str], Open(), Example("{cifar10: templates.txt}")] = field(
        default_factory=dict
    )
    """TASK: a file with other templates."""

    probe: ProbeSettings = field(default_factory=ProbeSettings)
    """What linear probes are fitted on, and how."""

    cache_dir: LocalPath | None = None
    """Keep features of images and classes here for later runs, found by content."""

    details: bool = False
    """Also write accuracies by class and the confusion matrix."""

    predictions: bool = False
    """Also write what was predicted for each sample."""

    during: DuringSettings = field(default_factory=DuringSettings)
    """Evaluation while training."""

    @property
    def cache(self) -> Path | None:
        """Where features are kept, if they are."""
        return Path(self.cache_dir) if self.cache_dir else None
