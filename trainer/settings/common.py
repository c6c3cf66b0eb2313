"""Options at the top level, which all commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siftclip.errors import InputError
from siftclip.redaction import begins_as_url
from siftclip.trainer.settings.fields.section import Section, Seed


def require_local(option: str, place: str | None) -> None:
    """Refuse a URL for a folder, of which one with its password in its name would be made.

    Raises:
        InputError: it is a URL.
    """
    if place is not None and begins_as_url(place):
        raise InputError(f"{option} must be a folder of this machine. Got {place!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonSettings(Section):
    """What all commands share."""

    seed: Seed = 0
    """Of the initial weights, the order, the augmentation and random selectors."""

    output_dir: str = "outputs"
    """Scores, selections, runs and comparisons are written below this folder."""

    plan: bool = False
    """siftclip train: measure a few steps and print what the run will cost, without training."""

    run_dir: str | None = None
    """Folder of the run; null: one below output_dir whose name stands for what is run."""

    progress: bool = True
    """Show progress bars; false, and any output but a terminal, gets a line every 30 s instead."""

    reuse: bool = True
    """Reuse what an earlier command has kept; false computes it again, and replaces it."""

    def check(self) -> None:
        require_local("output_dir", self.output_dir)
        require_local("run_dir", self.run_dir)

    @property
    def output_root(self) -> Path:
        """Where everything is written."""
        return Path(self.output_dir)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOptions(Section):
    """What siftclip select has beside them."""

    overlap: bool = True
    """Print the overlap with what CLIP score would keep."""
