"""`siftclip subset verify`: whether a subset still fits its pool."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import SubsetVerifyCommand


@application("subset verify", SubsetVerifyCommand, positional=("subset_verify.subset",))
def main(settings: SubsetVerifyCommand) -> None:
    """Print what each check has found; end with an error if one has found a fault."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.errors import InputError
    from siftclip.trainer.stages.subset import verify_stage
    from siftclip.trainer.stages.subset_summary import describe_verified

    verified = verify_stage(settings)
    print(describe_verified(verified), flush=True)
    if verified.faults:
        checks = ", ".join(dict.fromkeys(finding.check for finding in verified.faults))
        raise InputError(f"{verified.subset} does not fit {verified.pool.root}: {checks}.")
