"""`siftclip train`: a CLIP on a selection, streamed from the original tars."""

from __future__ import annotations

import os

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from siftclip.trainer.cli.application import application
from siftclip.trainer.runtime.launch import require_launcher
from siftclip.trainer.settings.commands import TrainCommand


@application("train", TrainCommand)
def main(settings: TrainCommand) -> None:
    """Train and say where the run is."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.errors import InputError
    from siftclip.trainer.runtime.run_dir import is_rank_zero
    from siftclip.trainer.stages.evaluation import failed_tasks, run_summary
    from siftclip.trainer.stages.train import plan_stage, train_stage

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        require_launcher("train --multirun", settings.trainer, os.environ)
    if settings.common.plan:
        table = plan_stage(settings).table()
        if is_rank_zero():
            print(table)
        return
    run = train_stage(settings)
    failed: list[str] = []
    if is_rank_zero():
        if settings.eval.root is not None:
            print(f"{run_summary(settings.eval, run).table()}\n")
            print(f"results    {run.results}")
            failed = failed_tasks(settings.eval, run)
        print(f"run        {run.path}")
        print(f"cost       {run.cost_line()}")
        print(f"model      {run.model} (open_clip: local-dir:{run.model})")
        if failed:
            raise InputError(
                f"The model is trained, but {len(failed)} tasks failed: {', '.join(failed)}. The "
                "reasons are above; the same command tries them again."
            )
