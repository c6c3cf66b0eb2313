"""The authors' outputs, and the record of how well ours agree with them."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk
from siftclip.selectors.kernels import hardware

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"
RECORD = "SIFTCLIP_CONFORMANCE_RECORD"  # a file that gets one JSON line a case

Conformance = Callable[..., None]


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Mapping[str, np.ndarray]]:
    """The arrays of a reference file by its name without ending; skips where there are none."""
    if not REFERENCE.is_dir():
        pytest.skip(f"{REFERENCE} is not on this machine")
    return lambda name: dict(np.load(REFERENCE / f"{name}.npz", allow_pickle=False))


@pytest.fixture(scope="session")
def conformance() -> Conformance:
    """Check scores and kept rows of a case against the authors', and docs/conformance.md with it.

    Scores are bounded by `limit`. Kept rows may differ where the authors' scores are within
    `cut_limit` of the cut: which of two near ties comes first is up to the CPU.

    Where the environment names a file in SIFTCLIP_CONFORMANCE_RECORD, what was found is added to
    it instead, for `conformance_table.py`.
    """
    table = runpy.run_path(str(Path(__file__).with_name("conformance_table.py")))
    documented = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text().splitlines()

    def check(
        case: str,
        *,
        scores: np.ndarray | None = None,
        expected_scores: np.ndarray | None = None,
        limit: float = 1e-5,
        cut_limit: float = 0.0,  # rows may differ whose scores are that near to the cut
        kept: np.ndarray | None = None,  # rows
        expected_kept: np.ndarray | None = None,  # rows
        differing: int = 0,  # rows in one of the two sets alone that the note explains
        note: str = "",
    ) -> None:
        record: dict[str, Any] = {"case": case, "note": note}
        if scores is not None and expected_scores is not None:
            difference = np.abs(scores.astype(np.float64) - expected_scores.astype(np.float64))
            record["largest_difference"] = float(difference.max())
            record["limit"] = limit
            assert difference.max() <= limit, f"{case}: {difference.max()}"
        if kept is not None and expected_kept is not None:
            common, union = np.intersect1d(kept, expected_kept), np.union1d(kept, expected_kept)
            record["jaccard"] = len(common) / max(1, len(union))
            record["kept"] = len(np.unique(kept))
            others = np.setxor1d(kept, expected_kept)
            if cut_limit and expected_scores is not None:
                assert len(np.unique(kept)) == len(np.unique(expected_kept))
                gaps = np.abs(expected_scores[others] - expected_scores[expected_kept].min())
                others = others[gaps > cut_limit]
            assert len(others) == differing, f"{case}: {len(others)}"
        if RECORD in os.environ:
            with open(os.environ[RECORD], "a") as file:
                file.write(json.dumps(record) + "\n")
        else:
            row = table["conformance_row"](record)
            assert any(table["tells_the_same"](line, row) for line in documented), (
                f"docs/conformance.md does not say this: {row}; see conformance_table.py"
            )

    return check


def _reference_source(
    inputs: Mapping[str, np.ndarray], name: str, *, part_samples: int | None = None
) -> MemorySource:
    """The pool of a reference input, with the feature keys `{name}_img` and `{name}_txt`."""
    samples = len(inputs["img"])
    chunk = Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=np.stack([inputs["uid_hi"], inputs["uid_lo"]], axis=1),
        features={
            f"{name}_img": torch.from_numpy(inputs["img"]),
            f"{name}_txt": torch.from_numpy(inputs["txt"]),
        },
        column=inputs["css_f16"].astype(np.float64),
    )
    return MemorySource(chunk, part_samples=part_samples)


@pytest.fixture(scope="session")
def reference_source() -> Callable[..., MemorySource]:
    """Makes the pool of a reference input: `(inputs, "l14", part_samples=None)`."""
    return _reference_source


@pytest.fixture
def int8_where_exact() -> Iterator[bool]:
    """Take this CPU for one with int8 instructions, if its products are exact: they are slow."""
    exact, has = hardware._int8_is_exact(), hardware._cpu_has
    with pytest.MonkeyPatch.context() as patch:
        if exact:
            patch.setattr(hardware, "_cpu_has", lambda name: name == "vnni" or has(name))
        yield exact


@pytest.fixture
def int8(int8_where_exact: bool) -> None:
    """Skip a test where int8 products are not exact."""
    if not int8_where_exact:
        pytest.skip("int8 products of this CPU are not exact")
