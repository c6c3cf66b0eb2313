"""The options of `siftclip subset`, a group for each of its commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from siftclip.errors import InputError
from siftclip.trainer.settings.fields.marks import Example, Needs
from siftclip.trainer.settings.fields.section import Count, LocalPath, Name, Section

_SUBSET = Needs("must name a subset, or a file or folder with one.")
Which = Annotated[str, _SUBSET, Example("best")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetImportSettings(Section):
    """The file that siftclip subset import reads."""

    PLACE: ClassVar[str] = "subset_import"

    path: Annotated[
        LocalPath, Needs("must name a file or folder: siftclip subset import FILE NAME.")
    ]
    """A .npy, .parquet or text file with uids, a list of tars, a run, or a selection's folder."""

    name: Name | None = None
    """Name of the subset; null: that of the file, without its suffix."""

    format: Literal["auto", "datacomp", "parquet", "text", "shards"] = "auto"
    """auto: by the suffix, and a text by its first line."""

    overwrite: bool = False
    """Replace another subset of that name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetExportSettings(Section):
    """The file that siftclip subset export writes."""

    PLACE: ClassVar[str] = "subset_export"

    subset: Which
    """Name of a subset, or a file or folder with one."""

    path: Annotated[LocalPath, Needs("must name a file: siftclip subset export NAME FILE.")]
    """The file: .npy, .parquet or .txt."""

    format: Literal["auto", "datacomp", "parquet", "text", "shards"] = "auto"
    """auto: by the suffix; shards: the list of tars, where whole tars are selected."""

    overwrite: bool = False
    """Write over what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetShowSettings(Section):
    """The subset that siftclip subset show describes."""

    PLACE: ClassVar[str] = "subset_show"

    name: Annotated[Name, Needs("must name a subset: siftclip subset show NAME.")]
    """Name of a subset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetVerifySettings(Section):
    """The subset that siftclip subset verify checks."""

    PLACE: ClassVar[str] = "subset_verify"

    subset: Which
    """Name of a subset, or a file or folder with one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetCombineSettings(Section):
    """What siftclip subset combine makes of one subset, or of two."""

    PLACE: ClassVar[str] = "subset_combine"

    name: Annotated[Name, Needs("must be given: siftclip subset combine NAME union A B.")]
    """Name of the new subset."""

    operation: Annotated[
        Literal["union", "intersection", "difference", "sample"],
        Needs("must be given: siftclip subset combine NAME union A B."),
    ]
    """Of samples kept m and n times: max(m, n), min(m, n), m where n is 0; or draws from A."""

    a: Which
    """Name of a subset, or a file or folder with one."""

    b: Annotated[str | None, Example("other")] = None
    """The other one; null for sample."""

    samples: Count | None = None
    """Of sample: how many draws, with replacement; seed decides them."""

    overwrite: bool = False
    """Replace another subset of that name."""

    def check(self) -> None:
        place = self.PLACE
        if self.operation == "sample":
            if self.samples is None:
                raise InputError(f"{place}.samples must be given: how many are drawn.")
            if self.b is not None:
                raise InputError(
                    f"{place}.b must be null, since a sample is drawn from one subset. "
                    f"Got {self.b!r}."
                )
            return
        if self.b is None:
            raise InputError(
                f"{place}.b must be given: siftclip subset combine NAME {self.operation} A B."
            )
        if self.samples is not None:
            raise InputError(
                f"{place}.samples must be null: {self.operation} draws nothing. Got {self.samples}."
            )
