"""`siftclip show`: a selection, or a pool, as a page and in a few lines."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import ShowCommand


@application("show", ShowCommand, positional=("show.selection",))
def main(settings: ShowCommand) -> None:
    """Write the page, print the lines and say where the page is."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.cli.explanations import composed
    from siftclip.trainer.compare.show import show_stage
    from siftclip.trainer.settings.commands import TrainCommand

    looked = show_stage(settings, lambda words: composed(TrainCommand, "train", words))
    print(looked.text)
    print(f"\npage       {looked.page}")
