"""`siftclip eval`: zero-shot tasks on a run, a checkpoint or a model."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("eval")
def main(config: DictConfig) -> None:
    """Evaluate and print the table."""
    # Here, since importing Lightning and open_clip takes seconds, which `--help` need not cost.
    from siftclip.trainer.evaluation import eval_stage, tasks_from
    from siftclip.trainer.models import clip_model_from
    from siftclip.trainer.run_dir import RunDir
    from siftclip.trainer.stages import output_root

    tasks_from(config)  # before a model is loaded
    clip = clip_model_from(config.model, "model", trained=True)
    run = RunDir(path=Path(str(config.model.name)))
    results = run.results
    if not run.has_model:  # not a run directory
        label = str(config.model.name).replace("/", "-").replace(":", "-")
        results = output_root(config) / "eval" / label / run.results.name
    report = eval_stage(config, clip, results_path=results)
    print(report.table())
    print(f"\nwritten    {results}")
