"""`siftclip eval`: zero-shot tasks on a run, a checkpoint or a model."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import EvalCommand


@application("eval", EvalCommand, positional=["model.name", "model.pretrained"])
def main(settings: EvalCommand) -> None:
    """Evaluate and print the table."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.errors import InputError
    from siftclip.trainer.api.evaluation import evaluate_settings
    from siftclip.trainer.stages.evaluation import details_folder

    evaluated = evaluate_settings(settings)
    if evaluated.ranks.rank > 0:
        return
    summary, results = evaluated.summary, evaluated.results
    print(summary.table())
    print(f"\nwritten    {results}")
    print(f"table      {results.with_suffix('.csv')}")
    wants_details = settings.eval.details or settings.eval.predictions
    if wants_details and details_folder(results).is_dir():  # no task may have succeeded
        print(f"details    {details_folder(results)}")
    if summary.failures:
        names = ", ".join(failure.key for failure in summary.failures)
        raise InputError(f"{len(summary.failures)} tasks failed: {names}. The reasons are above.")
