"""`siftclip target`: embed target tasks."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import TargetCommand


@application("target", TargetCommand)
def main(settings: TargetCommand) -> None:
    """Embed the tasks and say where the features are."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.target import target_stage

    folder, paths = target_stage(settings)
    for path in paths:
        print(f"features   {path}")
    print(f"select with selector.target.path={folder}")
