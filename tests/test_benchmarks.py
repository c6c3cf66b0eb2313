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
    ways = run("resizing.py", pool, "--samples", "256", "--crops", "4", "--rounds", "1")
    assert ways.count("| `gpu` | 602,112 | 0.0000% | 0 |") == 3
    assert "kB a sample: pillow 150.5, torch 150.5, gpu " in ways


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


def test_benchmark_of_the_memory_of_a_step(run: Callable[..., str], model_folder: Path) -> None:
    options = ["--models", str(model_folder)]
    fitting = run("step_memory.py", *options, "--batch", "16")
    assert [line.split()[-4:] for line in fitting.splitlines()[-2:]] == [["16"] * 4] * 2
    checked = run("step_memory.py", *options, "--check", "8").splitlines()[-1]
    assert checked.split()[1] == "8"


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


# ---- the model of cost --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scaling() -> Iterator[ModuleType]:
    with loaded("scaling") as module:
        yield module


def test_the_slowest_part_decides(scaling: ModuleType) -> None:
    model, gpu = scaling.MODELS["ViT-B-32"], scaling.GPUS["H100"]
    alike = {"batch": 1024, "mfu": 0.5, "decode_seconds": 0.004}
    alone = scaling.limits(model, gpu, scaling.Run(cores=4, **alike), 1)
    assert alone.computing == alone.device == pytest.approx(0.5 * 989e12 / (3 * 14.78e9))
    assert (alone.loading, alone.limit, alone.rate) == (1000, "loading", 1000)
    many = scaling.limits(model, gpu, scaling.Run(cores=400, **alike), 4096)
    # 2 x 2 x 512 floats of each of the others come and go for each sample
    exchange = 1 / many.device - 1 / many.computing
    assert exchange == pytest.approx(4095 * 2048 * 4 / 40e9)
    assert many.limit == "exchange"
    drawn = scaling.limits(model, gpu, scaling.Run(cores=4, drawn=5, scoring=0.6, **alike), 1)
    assert drawn.loading == 200
    assert alone.computing / drawn.computing == pytest.approx(2)  # 3 forwards, and 5 of 0.6


def test_gradients_hide_under_the_backward_pass(scaling: ModuleType) -> None:
    model, gpu = scaling.MODELS["ViT-L-14"], scaling.GPUS["A100"]
    alike = {"cores": 100, "mfu": 0.4, "decode_seconds": 0.001}
    large, small = (
        scaling.limits(model, gpu, scaling.Run(batch=batch, **alike), 64) for batch in (1024, 1)
    )
    gathered = 63 * 4 * 768 * 4 / 20e9
    assert 1 / large.device == pytest.approx(1 / large.computing + gathered)
    averaged = 2 * 63 / 64 * 427.6e6 * 4 / 20e9
    hidden = 2 / 3 / small.computing
    assert 1 / small.device == pytest.approx(1 / small.computing + gathered + averaged - hidden)


def test_the_page_has_the_numbers_of_the_model(run: Callable[..., str]) -> None:
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    torch_resize = ["--decode-us", "1280"]
    for options in ([], torch_resize, [*torch_resize, "--drawn", "5", "--scoring", "0.25"]):
        ours, _, others = run("scaling.py", *options).partition("Against published")
        rows = [line for line in ours.splitlines() if line.startswith(("| 1 ", "| 8 ", "| 64 "))]
        assert len(rows) == 3
        assert "\n".join(rows) in page
    numbers = [line.split(" | ")[3:] for line in others.splitlines() if "A100" in line]
    assert len(numbers) == 5
    for cells in numbers:
        assert " | ".join(cells).replace("%", " %") in page
