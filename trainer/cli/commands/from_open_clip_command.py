"""`siftclip from-open-clip FLAGS`: a command line of open_clip's training as ours."""

from __future__ import annotations

import sys

FAILURE = 2  # exit status for faults of the user's input
USAGE = """usage: siftclip from-open-clip [--] COMMAND LINE OF OPEN_CLIP

Prints our command for it, and what has no counterpart as comments; nothing is run.
  siftclip from-open-clip torchrun --nproc_per_node 4 -m open_clip_train.main \\
    --model ViT-B-32 --batch-size 320 --train-data '/data/cc12m/{0000..2175}.tar' \\
    --train-num-samples 10968539 --epochs 32

All flags: docs/open_clip.md"""


def main() -> None:
    """Print the command."""
    words = sys.argv[2:]
    words = words[1:] if words[:1] == ["--"] else words
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    # Here, since importing it takes a moment, which `--help` need not cost.
    from siftclip.errors import InputError
    from siftclip.trainer.migration.open_clip_command import translated

    try:
        print(translated(words))
    except InputError as error:
        print(f"siftclip from-open-clip: error: {error}", file=sys.stderr)
        raise SystemExit(FAILURE) from None
