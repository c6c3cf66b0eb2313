"""`siftclip eval`: zero-shot tasks on a run, a checkpoint or a model."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("eval", positional=["model.name", "model.pretrained"])
def main(config: DictConfig) -> None:
    """Evaluate and print the table."""
    # Here, since importing Lightning and open_clip takes seconds, which `--help` need not cost.
    from siftclip.selectors.errors import InputError
    from siftclip.trainer.evaluation import eval_share, eval_stage, tasks_from
    from siftclip.trainer.models import clip_model_from
    from siftclip.trainer.run_dir import RunDir
    from siftclip.trainer.stages import output_root

    tasks_from(config)  # before a model is loaded
    clip = clip_model_from(config.model, "model", trained=True)
    run = RunDir(path=Path(str(config.model.name)))
    results = run.results
    if not run.has_model or config.model.pretrained is not None:  # not the run's own model
        parts = [str(config.model.name), config.model.pretrained, _weights_choice(config)]
        label = "-".join(str(part) for part in parts if part)
        label = label.replace("/", "-").replace(":", "-").strip("-")
        results = output_root(config) / "eval" / label / run.results.name
    share = eval_share(config, may_launch=True)
    summary = eval_stage(config, clip, results_path=results, share=share)
    if share.ranks.rank == 0:
        print(summary.table())
        print(f"\nwritten    {results}")
        print(f"table      {results.with_suffix('.csv')}")
    if summary.failures:
        names = ", ".join(failure.key for failure in summary.failures)
        raise InputError(f"{len(summary.failures)} tasks failed: {names}. The reasons are above.")


def _weights_choice(config: DictConfig) -> str:
    weights = str(config.model.get("weights", "auto"))
    return "" if weights == "auto" else weights
