"""`siftclip index`, `siftclip data compact`, `siftclip data bench`, and commands of two words."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from siftclip.errors import InputError
from siftclip.files import read_json
from siftclip.trainer.bench.stage import bench_stage, describe_bench
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.cli.main import COMMANDS
from siftclip.trainer.cli.main import main as siftclip
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.stages.pool import (
    compact_stage,
    describe_compaction,
    describe_index,
    index_stage,
)
from siftclip.trainer.stages.train import train_stage

Cli = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., DictConfig]
SMALL_BENCH = ["bench.samples=24", "bench.steps=2"]


# ---- commands of two words ----------------------------------------------------------------------
@pytest.mark.parametrize("words", [["data"], ["data", "--help"], ["data", "-h"]])
def test_a_group_lists_its_commands(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["siftclip", *words])
    siftclip()
    printed = capsys.readouterr().out
    assert "\n  data compact " in printed
    assert "\n  data bench " in printed
    assert "\n  train " not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "compct", "pool.root=x"], "'data compct' is not a command; there are data comp"),
        (["data", "compct"], "data compact, data bench. Did you mean data compact?"),
        (["data", "train"], "'data train' is not a command; there are data compact, data bench."),
        (["dat", "bench"], "Did you mean data?"),
        (["compact"], "'compact' is not a command; there are index, embed"),
    ],
)
def test_a_wrong_word_names_the_choices(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["siftclip", *words])
    with pytest.raises(SystemExit) as stopped:
        siftclip()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["siftclip"])
    siftclip()
    printed = capsys.readouterr().out
    for command, what in COMMANDS.items():
        assert re.search(rf"\n  {command} +{re.escape(what)}\n", printed), command


# ---- index --------------------------------------------------------------------------------------
def test_index_is_built_once(base: list[str], compose: Compose, tmp_path: Path) -> None:
    options = [*base, f"pool.cache_dir={tmp_path / 'own'}"]
    first = index_stage(compose("index", options))
    text = describe_index(first)
    assert first.is_new
    assert "samples    240\n" in text
    assert "uids       0 derived" in text
    assert re.search(r"shards     1, 0.00 GB\n", text)
    assert re.search(r"\nbuilt      \d+\.\d\d s, \d+ samples/s$", text)
    assert f"index      {tmp_path / 'own' / 'index'}\n" in text
    again = index_stage(compose("index", options))
    assert not again.is_new
    assert re.search(
        r"\nreused     the index of \d{4}-\d\d-\d\d .* in \d+\.\d\d s$", describe_index(again)
    )
    assert not (tmp_path / "outputs").exists()


def test_index_tells_what_is_left_out(
    base: list[str], compose: Compose, copy_pool: Path, tmp_path: Path
) -> None:
    (tar,) = (copy_pool / "shards").iterdir()
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    options = [f"pool.root={copy_pool}", f"pool.cache_dir={tmp_path / 'own'}"]
    outcome = index_stage(compose("index", [*base, *options, "pool.max_bad_fraction=0.5"]))
    text = describe_index(outcome)
    assert "left out   1 samples\n           1 cut off with the end of their tar" in text


def test_index_from_the_command_line(cli: Cli, demo_data: DemoData, tmp_path: Path) -> None:
    result = cli("index", f"pool.root={demo_data.pool}", f"pool.cache_dir={tmp_path / 'cache'}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "samples    240" in result.stdout
    assert not {"\r", "\x1b"} & set(result.stderr)  # a bar is for a terminal
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


# ---- data compact -------------------------------------------------------------------------------
def test_compact_from_the_command_line_and_again(
    base: list[str], cli: Cli, compose: Compose, tmp_path: Path
) -> None:
    options = [*base, "compact.output=copy", "compact.shard_samples=50"]
    result = cli("data", "compact", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "copied     72 samples, 0.00 GB in 2 tars" in result.stdout
    assert re.search(r"took       \d+\.\d s, \d+ MB/s", result.stdout)
    options[-2] = f"compact.output={tmp_path / 'copy'}"
    again = compact_stage(compose("data_compact", options))
    assert again.copied_bytes == 0
    assert "reused a finished copy" in describe_compaction(again)
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "copy"}
    manifest = read_json(tmp_path / "copy" / "compact.json")
    selected = select_stage(compose("select", base))
    assert manifest["selection"] == selected.selection.digest


def test_training_on_a_copy_gives_the_same_model(
    base: list[str], compose: Compose, demo_data: DemoData, tmp_path: Path
) -> None:
    """Also where samples repeat: the losses are those of training on the pool."""
    subset = np.load(demo_data.oracle)
    np.save(tmp_path / "repeated.npy", np.sort(np.concatenate([subset, subset[:5], subset[:5]])))
    external = ["selector=external", f"selector.path={tmp_path / 'repeated.npy'}"]
    copy = tmp_path / "copy"
    compact_stage(compose("data_compact", [*base, *external, f"compact.output={copy}"]))
    streamed = train_stage(compose("train", [*base, *external]))
    on_copy = [f"pool.root={copy}", f"selector.path={copy / 'selection.npy'}"]
    own_cache = f"pool.cache_dir={tmp_path / 'copy_cache'}"
    copied = train_stage(compose("train", [*base, *external, *on_copy, own_cache]))
    assert copied.path != streamed.path
    weights = [
        (run.model / "open_clip_model.safetensors").read_bytes() for run in (streamed, copied)
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "compact.output must name the folder of the copy"),
        (["compact.output=x", "compact.shard_samples=0"], "compact.shard_samples must be an int"),
    ],
)
def test_compact_options_are_checked_before_anything_is_read(
    overrides: list[str], message: str, compose: Compose
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        compact_stage(compose("data_compact", ["pool.root=nowhere", *overrides]))


# ---- data bench ---------------------------------------------------------------------------------
def test_bench_from_the_command_line(base: list[str], cli: Cli, tmp_path: Path) -> None:
    result = cli("data", "bench", *base, *SMALL_BENCH, "data.num_workers=1", "progress=true")
    assert result.returncode == 0, result.stderr[-2000:]
    for stage in ("read", "decode", "transform", "tokenise", "collate"):
        assert re.search(rf"\n{stage} +[\d.]+ +[\d.]+ %\n", result.stdout), stage
    assert re.search(r"\nloader     \d+ samples/s with 1 worker\n", result.stdout)
    assert re.search(
        r"\nimages     [\d.]+ kB per sample, pixels, which cpu finishes in [\d.]+ us\n",
        result.stdout,
    )
    assert re.search(
        r"\ntraining   \d+ samples/s: vit_tiny on cpu, one device, batch 16\n", result.stdout
    )
    assert re.search(
        r"\nfeeding    [\d.e+-]+ A100 \([\d,]+ samples/s\), [\d.e+-]+ H100 .* of their peak,",
        result.stdout,
    )
    assert re.search(
        r"\nwaiting    [\d.]+ % of the training time: the (loader|model)", result.stdout
    )
    rounds = r"[\d.]+ \([\d.]+ to [\d.]+\)"
    for kept in (100, 50, 30, 10):
        assert re.search(rf"\n{kept} % +{rounds} +{rounds} +(never|[\d.]+ passes)\n", result.stdout)
    assert "GB of memory available" in result.stdout
    assert "page cache" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("of this run (its samples seen).")
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"scores", "selections"}


def test_bench_without_workers_loads_between_the_steps(base: list[str], compose: Compose) -> None:
    outcome = bench_stage(compose("data_bench", [*base, *SMALL_BENCH]))
    assert outcome.stages.samples == 32  # whole batches
    assert outcome.loader.samples == 32
    assert outcome.training.samples == 2 * 16
    assert 0 < outcome.training.wait_fraction < 1
    assert outcome.run_passes == 96 / 72
    assert set(outcome.copy_pays_after) == {1.0, 0.5, 0.3, 0.1}
    text = describe_bench(outcome)
    assert "with 0 workers" in text
    assert "1.3 passes of this run" in text


def test_the_loss_is_checked_before_anything_is_read(compose: Compose) -> None:
    options = ["pool.root=nowhere", "loss=plugin", "loss.plugin=nope"]
    with pytest.raises(InputError, match=r"loss\.plugin must be .* Got 'nope'"):
        bench_stage(compose("data_bench", options))


@pytest.mark.parametrize("option", ["bench.samples", "bench.steps"])
def test_bench_options_are_checked_before_anything_is_read(option: str, compose: Compose) -> None:
    with pytest.raises(InputError, match=rf"{option} must be an integer of at least 1. Got 0"):
        bench_stage(compose("data_bench", ["pool.root=nowhere", f"{option}=0"]))
