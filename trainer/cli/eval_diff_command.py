"""`siftclip eval diff`: two results, task by task."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("eval diff", positional=["diff.a", "diff.b"])
def main(config: DictConfig) -> None:
    """Print the differences and how sure they are."""
    from siftclip.trainer.eval_diff import diff_stage

    print(diff_stage(config).table())
    if config.diff.output is not None:
        print(f"\nwritten: {config.diff.output}")
