"""The options that belong to one command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from siftclip.trainer.settings.evaluation import Names
from siftclip.trainer.settings.fields.marks import AtMost, Example, Needs, Open, Words
from siftclip.trainer.settings.fields.section import (
    Count,
    KeySplit,
    LocalPath,
    Name,
    Samples,
    Section,
    Weights,
    Workers,
)

_SIDE = Needs("must name a run directory or its eval_results.jsonl: siftclip eval diff A B.")
_RUNS = Words("a list of run directories: [RUN,RUN]")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings(Section):
    """The arms of a comparison."""

    PLACE: ClassVar[str] = "compare"

    name: Name = "compare"
    """Folder of the report."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per arm and seed."""

    arms: Annotated[
        Mapping[str, tuple[str, ...]], Open(), Example('{half: ["selector.fraction=0.5"]}')
    ] = field(default_factory=dict)
    """NAME: a list of overrides, which come after those of the command line."""

    baseline: Name | None = None
    """Arm that the others are compared with; null: the first one."""

    aa: bool = False
    """Train the baseline with as many other seeds, too, from which it does not truly differ."""

    parallel: Annotated[int, Ge(1), AtMost(1024)] = 1
    """Runs that are trained at once, each in a process of its own with its share of the devices."""

    only: tuple[str, ...] = ()
    """Train these alone, as ARM or ARM/SEED, and write no report; empty: all."""

    part: str | None = None
    """i/n: train every n-th run from the i-th on, for jobs that share a folder; null: all."""

    ask_above_hours: Annotated[float, Gt(0)] | None = 1.0
    """At a terminal, ask before training for longer than this by the plan; null: never ask."""

    truth: str | None = None
    """Parquet file with uid and kind: the report counts kinds among the selected."""

    columns: tuple[str, ...] = ()
    """Columns of the printed table: averages of eval.groups or tasks; empty: all."""

    images: bool = True
    """Put small copies of some images into the report, blurred until clicked; else captions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings(Section):
    """How much data the demo writes."""

    PLACE: ClassVar[str] = "demo"

    pool_samples: Samples = 12000
    """Samples of the pool."""

    teacher_samples: Samples = 6000
    """Samples of the clean split that the teacher is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings(Section):
    """What siftclip data bench measures."""

    PLACE: ClassVar[str] = "bench"

    samples: Samples = 2000
    """Samples that each measurement reads or loads."""

    steps: Annotated[int, Ge(1), AtMost(10**6)] = 20
    """Steps of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactSettings(Section):
    """The copy of a selection that siftclip data compact makes."""

    PLACE: ClassVar[str] = "compact"

    output: Annotated[
        LocalPath, Needs("must name the folder of the copy, such as compact.output=/data/copy.")
    ]
    """A new folder, or one where an interrupted call began."""

    shard_samples: Count = 10000
    """Samples per tar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffSettings(Section):
    """The two results that siftclip eval diff compares."""

    PLACE: ClassVar[str] = "diff"

    a: Annotated[str, _SIDE]
    """A run directory, or a file eval_results.jsonl."""

    b: Annotated[str, _SIDE]
    """The other one."""

    seeds_a: Annotated[str | tuple[str, ...] | None, _RUNS] = None
    """Other seeds of A: a list of run directories; null: those beside A; []: none."""

    seeds_b: Annotated[str | tuple[str, ...] | None, _RUNS] = None
    """Other seeds of B."""

    resamples: Annotated[int, Ge(1), AtMost(10**6)] = 10000
    """Resamples of the test sets."""

    output: LocalPath | None = None
    """A .csv file for the differences; null: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadSettings(Section):
    """What siftclip eval download fetches."""

    PLACE: ClassVar[str] = "download"

    folder: Annotated[LocalPath, Needs("must name a folder: siftclip eval download FOLDER.")]
    """The folder that eval.root is to be."""

    repositories: tuple[Name, ...] = ()
    """Others in clip_benchmark's layout; DataComp's come then only where eval.tasks names them."""

    splits: tuple[Name, ...] = ("test",)
    """Splits of these repositories."""

    workers: Workers = 4
    """Files at once."""

    verify: bool = False
    """Hash again what is there, and fetch what is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings(Section):
    """The run that siftclip eval watch evaluates."""

    PLACE: ClassVar[str] = "watch"

    run: Annotated[LocalPath, Needs("must name a run directory: siftclip eval watch RUN.")]
    """A run directory; it need not be finished."""

    weights: Weights = "auto"
    """ema, raw, or auto: the average if there is one."""

    interval_seconds: Annotated[float, Gt(0), AtMost(10**9)] = 30
    """Seconds between two looks for new checkpoints."""

    once: bool = False
    """Evaluate what is there, and do not wait for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings(Section):
    """What siftclip export writes."""

    PLACE: ClassVar[str] = "export"

    source: Annotated[LocalPath, Needs("must be given, such as export.source=outputs/train/RUN.")]
    """A run directory, a model folder, or a .ckpt in a run directory."""

    format: Literal["open_clip", "local_dir", "datacomp"] = "open_clip"
    """The layout to write."""

    path: Annotated[LocalPath, Needs("must be given, such as export.path=model.pt.")]
    """A .pt file for open_clip, else a folder."""

    weights: Weights = "auto"
    """ema: the moving average; raw: what the optimizer trained; auto: see --help."""

    overwrite: bool = False
    """Write over what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings(Section):
    """The tasks that siftclip target embeds."""

    PLACE: ClassVar[str] = "target"

    root: Annotated[LocalPath, Example("/data/tasks")]
    """A folder of tasks in clip_benchmark's webdataset layout, or one task."""

    tasks: Names | None = None
    """Which of them; null: all."""

    split: Name = "train"
    """What is selected for must not be the test split that is evaluated."""

    key_split: KeySplit = "first_dot"
    """The dot that ends a sample's key in its members' names: first_dot is webdataset's rule."""

    folder: LocalPath | None = None
    """Where to write; null: targets/NAME in output_dir."""
