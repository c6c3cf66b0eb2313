"""`siftclip eval`: zero-shot tasks on a run, a checkpoint or a model."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import EvalCommand


@application("eval", EvalCommand, positional=["model.name", "model.pretrained"])
def main(settings: EvalCommand) -> None:
    """Evaluate and print the table."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.errors import InputError
    from siftclip.trainer.builders.models import clip_model_from
    from siftclip.trainer.stages.evaluation import (
        details_folder,
        eval_share,
        eval_stage,
        results_path_for,
        tasks_from,
    )

    tasks_from(settings.eval)  # before a model is loaded
    results = results_path_for(settings)
    share = eval_share(settings.trainer, may_launch=True)
    clip = clip_model_from(settings.model, trained=True)
    summary = eval_stage(settings, clip, results_path=results, share=share)
    if share.ranks.rank > 0:
        return
    print(summary.table())
    print(f"\nwritten    {results}")
    print(f"table      {results.with_suffix('.csv')}")
    if settings.eval.details or settings.eval.predictions:
        print(f"details    {details_folder(results)}")
    if summary.failures:
        names = ", ".join(failure.key for failure in summary.failures)
        raise InputError(f"{len(summary.failures)} tasks failed: {names}. The reasons are above.")
