"""The benchmarks run: nothing is timed here, but what is not run rots."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(run_python: Any, tmp_path: Path) -> Callable[..., str]:
    """`run(script, *arguments)`: what a benchmark prints."""

    def start(script: str, *arguments: str) -> str:
        result = run_python(str(BENCHMARKS / script), *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-2000:]
        return str(result.stdout)

    return start


@pytest.mark.slow
def test_benchmark_pool_and_its_measurements(run: Callable[..., str], tmp_path: Path) -> None:
    pool = str(tmp_path / "pool")
    options = ["--samples", "600", "--shard-samples", "200", "--workers", "1"]
    run("tools/make_pool.py", pool, *options)
    assert len(list((tmp_path / "pool" / "shards").glob("*.tar"))) == 3
    assert "| siftclip, one process |" in run("indexing.py", pool, "--rounds", "1")
    assert "| all | 0.3" in run("shuffling.py", pool, "--fractions", "1.0")


def test_benchmark_of_handing_over(run: Callable[..., str]) -> None:
    tables = run("handing_over.py", "--batches", "1", "--rounds", "1")
    assert tables.count("| uint8 |") == 3
    assert "the same floats" in tables


def test_benchmarks_of_training(run: Callable[..., str], model_folder: Path) -> None:
    alone = ["--threads", "1"]  # the cores are shared with other tests
    step = run("training_step.py", *alone, "--batch", "4", "--steps", "2", "--rounds", "1")
    assert "| ours |" in step
    batch = ["--batch", "2", "--micro-batch", "1"]
    options = ["--model", str(model_folder), *batch, "--way", "both"]
    assert "scale" in run("large_batch.py", *alone, *options)


@pytest.mark.slow
def test_benchmark_of_the_start(run: Callable[..., str]) -> None:
    first = "train, to its first line"
    table = run("start_up.py", "--rounds", "1", "--only", "siftclip --help", first)
    assert "| siftclip --help |  | " in table
    assert f"| {first} |  | " in table


def test_benchmark_of_the_checks(run: Callable[..., str]) -> None:
    table = run("checks.py", "--samples", "10_000", "--units", "50", "--rounds", "1")
    assert "| order of a pass of 10,000 samples | " in table
    assert "| 38 results of 50 units, read and checked | " in table


@pytest.mark.slow
def test_benchmark_of_the_losses_memory(run: Callable[..., str]) -> None:
    options = ["--threads", "1", "--batch", "64", "--repeats", "1"]
    assert '"bytes"' in run("loss_memory.py", *options, "--side", "open_clip")
    # a limit between what the two sides need; a side runs in a new Python, which takes seconds
    table = run("loss_memory.py", *options, "--rounds", "1", "--limit-gib", "0.001")
    ours, theirs = table.splitlines()[-2:]
    assert ours.startswith("| siftclip | ")
    assert "not run" not in ours
    assert theirs == "| open_clip | 1 by arithmetic, not run | | |"


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """A script as a module."""
    sys.path.insert(0, str(BENCHMARKS))  # where the script finds its neighbours
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where its dataclasses look for it
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def selector_speed() -> Iterator[ModuleType]:
    with loaded("selector_speed") as module:
        yield module


def test_mutants_are_other_code_at_one_place() -> None:
    with loaded("tools/mutants") as mutants:
        path = BENCHMARKS.parent / "src" / "siftclip" / "hashing.py"
        source, found = path.read_bytes(), mutants.mutants_of(path)
        whole = ast.dump(ast.parse(source))
        assert len({mutant.name for mutant in found}) == len(found) > 20
        for mutant in found:
            after = source[: mutant.start] + mutant.after.encode() + source[mutant.end :]
            assert ast.dump(ast.parse(after)) != whole, mutant.name
        tests = mutants.tests_by_module()
        assert (
            tests["siftclip.selectors.methods.normsim"][0]
            == "tests/selectors/methods/test_normsim.py"
        )
        assert (
            "tests/trainer/losses/test_reference.py" in tests["siftclip.trainer.losses.reference"]
        )
        outcomes = {"eval/a.py:1": "killed", "eval/a.py:2": "survived", "eval/b.py:3": "time-out"}
        assert "| eval | 3 | 2 | 67 % |" in mutants.report(outcomes)


METHODS = (
    "clip_score",
    "negcliploss",
    "vas",
    "normsim_2",
    "normsim_inf",
    "vas_d",
    "normsim_d",
    "clipcov",
    "image_based",
    "semdedup",
)


@pytest.mark.parametrize("method", METHODS)
def test_ours_keeps_what_the_plain_formula_keeps(selector_speed: Any, method: str) -> None:
    """What the benchmark compares is the same thing, and it is what the formula says."""
    assert set(selector_speed.METHODS) == set(METHODS)
    data = selector_speed.make_data(2000, 32, targets=400, centroids=1000)
    ours, plain = (selector_speed.kept_rows(method, side, data) for side in ("ours", "plain"))
    assert len(np.setxor1d(ours, plain)) <= 2, "more than a tie at the cut"


@pytest.mark.slow
def test_selectors_out_of_core(run: Callable[..., str], tmp_path: Path) -> None:
    folder = str(tmp_path / "features")
    run("make_features.py", folder, "--samples", "3000", "--dim", "32")
    table = run("out_of_core.py", folder, "vas", "--chunk-samples", "500")
    assert "| vas | 3,000 x 32 | 900 |" in table


def test_joint_sampling_alone(run: Callable[..., str]) -> None:
    table = run("joint_sampling.py", "--super-batch", "640", "--rounds", "1")
    assert "sigmoid" in table
    assert "softmax" in table
