"""`siftclip embed`: compute image and text embeddings of a pool."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import EmbedCommand


@application("embed", EmbedCommand)
def main(settings: EmbedCommand) -> None:
    """Embed the pool and say where the features are."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.embed import embed_stage

    folder = embed_stage(settings)
    print(f"features   {folder}")
