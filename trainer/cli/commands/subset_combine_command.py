"""`siftclip subset combine`: union, intersection or difference of two subsets, or a sample."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import SubsetCombineCommand

_WORDS = ("name", "operation", "a", "b")


@application(
    "subset combine",
    SubsetCombineCommand,
    positional=tuple(f"subset_combine.{word}" for word in _WORDS),
)
def main(settings: SubsetCombineCommand) -> None:
    """Combine, and say what came out."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.subset import combine_stage
    from siftclip.trainer.stages.subset_summary import describe_made

    print(describe_made(combine_stage(settings)))
