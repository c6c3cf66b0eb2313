"""`siftclip eval download`: evaluation sets from the Hugging Face hub."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import DownloadCommand


@application("eval download", DownloadCommand, positional=["download.folder"])
def main(settings: DownloadCommand) -> None:
    """Download and say what was done."""
    from siftclip.errors import InputError
    from siftclip.trainer.stages.eval_download import download_stage

    failed = []
    for outcome in download_stage(settings):
        print(
            f"{'failed' if outcome.failed else 'ready':<8} {outcome.name}: {outcome.words}",
            flush=True,
        )
        failed += [outcome.name] if outcome.failed else []
    print(f"evaluate with eval.root={settings.download.folder}")
    if failed:
        raise InputError(
            f"{len(failed)} tasks are not complete: {', '.join(failed)}. "
            "The same command continues."
        )
