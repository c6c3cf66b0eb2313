"""`siftclip reproduce`: a run is trained again from its directory, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from siftclip.trainer.cli.application import application
from siftclip.trainer.cli.explanations import typed_value
from siftclip.trainer.settings.commands import ReproduceCommand

_RUN = "reproduce.run"


def words_of_run(words: Sequence[str]) -> list[str]:
    """Return the overrides that compose what the named run has, in front of those that are typed.

    Raises:
        InputError: there is no run, or it names what must be typed.
    """
    run = typed_value(words, _RUN)
    if not isinstance(run, str):
        return []
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.reproduce import read_kept

    _, kept = read_kept(Path(run))
    kept.register()
    return kept.words(words)


@application("reproduce", ReproduceCommand, positional=(_RUN,), prepare=words_of_run)
def main(settings: ReproduceCommand) -> None:
    """Say what differs, train, and say what came out the same."""
    from siftclip.trainer.runtime.run_dir import is_rank_zero
    from siftclip.trainer.stages.reproduce import begin, select_again, train_again
    from siftclip.trainer.stages.reproduce_summary import (
        describe_begin,
        describe_reproduced,
        describe_selected,
    )

    reproduction = begin(settings)
    if is_rank_zero():
        print(describe_begin(reproduction), flush=True)
    selected = select_again(reproduction)
    if is_rank_zero():
        print(describe_selected(selected), flush=True)
    reproduced = train_again(reproduction, selected)
    if is_rank_zero():
        print(f"\n{describe_reproduced(reproduced)}")
