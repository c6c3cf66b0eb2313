"""`python -m siftclip.trainer.cli COMMAND`, for torchrun: torchrun ... -m siftclip.trainer.cli."""

from siftclip.trainer.cli.main import main

if __name__ == "__main__":
    main()
