"""Lets every built-in selector decide about the same samples on the ranks of a gloo group.

Started by test_selectors_on_ranks.py under torchrun with the name of a file, to which each rank
adds its number and writes the multiplicities of each selector as JSON.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from siftclip.ranks import ProcessGroup, Ranks
from siftclip.selectors.core.checks import SelectorFactory, synthetic_chunk, synthetic_files
from siftclip.selectors.core.memory_source import MemorySource


def built_in() -> dict[str, SelectorFactory]:
    """The factories of the contract's test."""
    path = Path(__file__).with_name("test_selector_contract.py")
    found: dict[str, SelectorFactory] = runpy.run_path(str(path))["BUILT_IN"]
    return found


def decide(ranks: Ranks) -> dict[str, list[int]]:
    """What each selector keeps of 257 samples in parts of 40."""
    answers = {}
    for name, make in built_in().items():
        selector = make()
        chunk = synthetic_chunk(selector.requires)
        files = synthetic_files(selector.requires)
        source = MemorySource(chunk, files=files, part_samples=40, chunk_samples=16, ranks=ranks)
        answers[name] = selector.select(source).multiplicities.tolist()
    return answers


def main() -> None:
    """Decide on this rank and print."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answers = decide(ProcessGroup(torch.device("cpu")))
    with open(f"{sys.argv[1]}.{dist.get_rank()}", "w") as file:
        json.dump(answers, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
