"""`siftclip export`: a trained model in the layouts of open_clip and DataComp."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("export")
def main(config: DictConfig) -> None:
    """Export, and say what was written and how to load it."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.export import describe_export, export_stage

    print(describe_export(export_stage(config)))
