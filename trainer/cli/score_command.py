"""`siftclip score`: scores of a pool's samples, from features."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.datamodules.scoring import summarise
from siftclip.selectors.errors import InputError
from siftclip.trainer.cli.application import application
from siftclip.trainer.stages import score_stage


@application("score")
def main(config: DictConfig) -> None:
    """Score the pool and print the quantiles."""
    outcome = score_stage(config)
    scores = outcome.scored.scores
    if scores is None:
        raise InputError(
            f"selector={outcome.name} chooses sets and has no scores of single samples. "
            "Use siftclip select."
        )
    print(f"pool       {outcome.pool.root}: {len(outcome.pool)} samples")
    quantiles = "  ".join(f"{name} {value:.4f}" for name, value in summarise(scores).items())
    print(f"scores     {quantiles}")
    print(f"written    {outcome.scored.folder}")
