"""The options of `siftclip runs`, `report` and `reproduce`: a group for each command or two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from siftclip.trainer.settings.fields.marks import AtMost, Example, Needs, Words
from siftclip.trainer.settings.fields.section import LocalPath, NotNegative, Positive, Section

_KINDS = Words("a kind, or a list of kinds such as [checkpoints,scores]")
_RUN = "must name a run, or what else siftclip runs list shows: siftclip runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsSettings(Section):
    """What siftclip runs rm and siftclip runs gc ask before they remove something."""

    PLACE: ClassVar[str] = "runs"

    yes: bool = False
    """Remove without asking; needed where there is no terminal to ask on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsListSettings(Section):
    """What siftclip runs list shows."""

    PLACE: ClassVar[str] = "runs_list"

    kinds: Annotated[str | tuple[str, ...] | None, _KINDS, Example("[runs,scores]")] = None
    """runs, selections, scores, features, targets, subsets, reports, results, copies; null: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsShowSettings(Section):
    """What siftclip runs show describes."""

    PLACE: ClassVar[str] = "runs_show"

    run: Annotated[str, Needs(f"{_RUN} show RUN.")]
    """A run, or what else lies there: its path, or the name of its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsRmSettings(Section):
    """What siftclip runs rm removes."""

    PLACE: ClassVar[str] = "runs_rm"

    run: Annotated[
        str | tuple[str, ...],
        Needs(f"{_RUN} rm RUN."),
        Words("the path or name of a run, or a list of them: [RUN,RUN]"),
        Example("clip_score-s0-6b8b783e"),
    ]
    """A run, or what else lies there: its path, or the name of its folder; or a list."""

    force: bool = False
    """Also what others refer to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsGcSettings(Section):
    """What siftclip runs gc frees."""

    PLACE: ClassVar[str] = "runs_gc"

    kinds: Annotated[str | tuple[str, ...], _KINDS, Example("[checkpoints,scores]")] = ()
    """checkpoints, scores, selections, features, damaged, replaced, temporary; []: only show."""

    older_than_hours: NotNegative = 24
    """Younger scores, selections and features stay: a command may be about to use them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceSettings(Section):
    """The run that siftclip reproduce repeats."""

    PLACE: ClassVar[str] = "reproduce"

    run: Annotated[LocalPath, Needs("must name a run directory: siftclip reproduce RUN.")]
    """A run directory, also a copy of one from another machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSettings(Section):
    """The runs that siftclip report describes."""

    PLACE: ClassVar[str] = "report"

    runs: Annotated[
        tuple[str, ...],
        Needs("must name a comparison's folder or run directories: siftclip report RUNS."),
        Words("a list of folders: [RUN,RUN]"),
    ]
    """A comparison's folder, run directories, or folders of them; also copies from elsewhere."""

    folder: LocalPath | None = None
    """Where the report is written; null: the comparison's folder, or compare/NAME in output_dir."""

    serve: bool = False
    """Show it at http://127.0.0.1:PORT, and write it anew while runs train."""

    port: Annotated[int, Ge(0), AtMost(65535)] = 8765
    """Of serve; 0: any that is free."""

    interval_seconds: Positive = 30
    """Of serve: seconds between two reports."""
