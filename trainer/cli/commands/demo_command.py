"""`siftclip demo`: all of it on handwritten digits, in a few minutes on a CPU."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import DemoCommand
from siftclip.trainer.settings.read_command import compose


@application("demo", DemoCommand)
def main(settings: DemoCommand) -> None:
    """Run the demo and say what to look at."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.demo.stage import demo_stage

    outcome = demo_stage(settings, list(HydraConfig.get().overrides.task), compose)
    folder = outcome.comparison.folder
    print(f"\n{outcome.comparison.table}\n")
    print("zero-shot accuracy in percent; digits and scenes of these tasks are in no training set")
    print(f"report     {folder / 'report.html'}")
    print(f"           {folder / 'report.md'}")
    print(f"data       {outcome.data}")
    print(f"took       {outcome.seconds:.0f} s")
    outcome.comparison.require_complete()
