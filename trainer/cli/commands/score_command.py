"""`siftclip score`: scores of a pool's samples, from features."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import SelectSections


@application("score", SelectSections)
def main(settings: SelectSections) -> None:
    """Score the pool and print the quantiles."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.datamodules.selection.pool_source import summarise
    from siftclip.trainer.builders.selection import score_stage

    outcome = score_stage(settings)
    source = outcome.source
    if source.ranks.rank != 0:
        return
    print(f"pool       {source.pool.root}: {len(source)} samples")
    quantiles = summarise(outcome.scores).items()
    print(f"scores     {'  '.join(f'{name} {value:.4f}' for name, value in quantiles)}")
    print(f"written    {outcome.folder}")
