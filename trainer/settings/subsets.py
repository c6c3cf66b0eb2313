"""The options of `siftclip subset`, a group for each of its commands, of `show` and of `diff`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from siftclip.errors import InputError
from siftclip.trainer.settings.fields.marks import AtMost, Example, Needs
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowSettings(Section):
    """What siftclip show and siftclip diff look at."""

    PLACE: ClassVar[str] = "show"

    selection: Annotated[str | None, Example("best")] = None
    """A subset's name, a run, or a file or folder with a selection; null: the whole pool."""

    other: Annotated[str | None, Example("other")] = None
    """Of siftclip diff: the selection that it is compared with."""

    scores: LocalPath | None = None
    """Parquet file with a column uid and scores; null: those of a run's selector, or its own."""

    column: Annotated[str | None, Example("clip_l14_similarity_score")] = None
    """Column of show.scores, by default score; or, without a file, of the pool's metadata."""

    text: Annotated[str | None, Example("dog")] = None
    """Only samples whose caption holds this, whatever its case."""

    min_score: float | None = None
    """Only samples with at least this score."""

    max_score: float | None = None
    """Only samples with at most this score."""

    cluster: Annotated[str | Count | None, Example("3")] = None
    """Only samples of this cluster of images: its number or its words, as the page names it."""

    language: Annotated[str | None, Example("en")] = None
    """Only samples whose caption is in this language, as CLD3 tells (extra: text)."""

    features: LocalPath | None = None
    """Folder of features (.npz) to cluster by; null: the run's, else those of the pool."""

    samples: Annotated[int, Ge(1), AtMost(1000)] = 96
    """How many samples a page shows at most, drawn from those that pass; seed decides which."""

    export: Name | None = None
    """Keep all samples that pass, shown or not, as a subset of this name."""

    images: bool = True
    """Put small copies of images into the page, blurred until clicked; else captions."""

    truth: LocalPath | None = None
    """Parquet file with uid and kind: the page counts kinds."""

    page: LocalPath | None = None
    """Where the page is written; null: show/NAME.html in output_dir."""
