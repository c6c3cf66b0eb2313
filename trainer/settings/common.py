"""Options at the top level, which all commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siftclip.trainer.settings.fields.section import LocalPath, Section, Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonSettings(Section):
    """What all commands share."""

    seed: Seed = 0
    """Of the initial weights, the order, the augmentation and random selectors."""

    output_dir: LocalPath = "outputs"
    """Scores, selections, runs and comparisons are written below this folder."""

    plan: bool = False
    """siftclip train: measure a few steps and print what the run will cost, without training."""

    run_dir: LocalPath | None = None
    """Folder of the run; null: one below output_dir whose name stands for what is run."""

    progress: bool = True
    """Show progress bars; false, and any output but a terminal, gets a line every 30 s instead."""

    reuse: bool = True
    """Reuse what an earlier command has kept; false computes it again, and replaces it."""

    @property
    def output_root(self) -> Path:
        """Where everything is written."""
        return Path(self.output_dir)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOptions(Section):
    """What siftclip select has beside them."""

    overlap: bool = True
    """Print the overlap with what CLIP score would keep."""
