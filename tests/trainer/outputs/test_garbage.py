"""What could go: no more than nothing needs, of each kind, and nothing while somebody writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.eval.results.files import read_results
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.outputs.garbage import (
    GARBAGE,
    LOSSES,
    GarbageList,
    find_garbage,
    free,
    size_in_words,
)
from siftclip.trainer.outputs.references import find_references
from siftclip.trainer.outputs.scan import scan
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

HOUR = 3600.0


def garbage(outputs: Path, *, older_than_seconds: float = -HOUR) -> GarbageList:
    found = scan(outputs)
    return find_garbage(found, find_references(found), older_than_seconds=older_than_seconds)


def places(found: GarbageList) -> dict[str, list[str]]:
    """The files that could go, by kind."""
    by_kind: dict[str, list[str]] = {}
    for item in found.items:
        by_kind.setdefault(item.kind, []).extend(f"{item.entry.place}/{p}" for p in item.paths)
    return by_kind


def set_in_config(run: Path, old: str, new: str) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    assert text.count(old) == 1
    config.write_text(text.replace(old, new))


def test_of_a_comparison_the_checkpoints_alone_can_go(outputs: Path) -> None:
    found = garbage(outputs)
    runs = sorted(path.name for path in (outputs / "train").iterdir())
    assert places(found) == {
        "checkpoints": [
            f"train/{run}/checkpoints/step-{step}.ckpt" for run in runs for step in (4, 6)
        ]
    }
    assert found.notes == ()
    size = sum(path.stat().st_size for path in outputs.rglob("*.ckpt"))
    assert sum(item.size_bytes for item in found.items) == size


def test_checkpoints_in_parts_go_with_all_their_parts(outputs: Path, random_run: Path) -> None:
    last = random_run / "checkpoints" / "step-6.ckpt"
    last.unlink()
    last.mkdir()
    names = ["rank-0.ckpt", "rank-1.ckpt", "rest.ckpt"]
    for name in names:
        (last / name).write_bytes(b"123")
    (last / "mine.txt").write_text("")
    found = places(garbage(outputs))["checkpoints"]
    place = f"train/{random_run.name}/checkpoints"
    assert [each for each in found if random_run.name in each] == [
        f"{place}/step-4.ckpt",
        *(f"{place}/step-6.ckpt/{name}" for name in names),
    ]
    (last / "mine.txt").unlink()
    for _ in free(garbage(outputs).of("checkpoints")):
        pass
    assert not last.exists()


def test_without_its_checkpoints_a_run_is_what_it_was(
    outputs: Path,
    random_run: Path,
    made: Path,
    demo_data: DemoData,
    base_of: Callable[[Path], list[str]],
    composing: Callable[..., Any],
) -> None:
    """Finished, reused by its command, and evaluated on another task."""
    before = {item.entry.place: item.size_bytes for item in garbage(outputs).items}
    for removed in free(garbage(outputs).of("checkpoints")):
        assert removed.size_bytes == before[removed.place]
    assert not list(outputs.rglob("*.ckpt"))
    assert garbage(outputs).items == ()
    assert RunDir(path=random_run).is_finished
    words = [
        *base_of(outputs.parent),
        *("scale.samples_seen=96", "trainer.checkpoint_every_n_steps=2", "eval.resamples=10"),
        *("eval.tasks=[colour,count]", f"eval.root={demo_data.tasks}"),
        *("selector=random", "selector.fraction=0.5"),
    ]
    written = (random_run / "metrics.jsonl").read_bytes()
    with composing() as compose:
        run = train_stage(compose("train", words))
    assert run.path.resolve() == random_run.resolve()
    assert (random_run / "metrics.jsonl").read_bytes() == written
    assert [result.key for result in read_results(run.results)] == ["colour", "count"]


def test_checkpoints_that_somebody_wants_stay(
    outputs: Path, clip_run: Path, random_run: Path
) -> None:
    name = random_run.name
    set_in_config(random_run, "keep_every_n_steps: null", "keep_every_n_steps: 4")
    at = f"/anywhere/train/{clip_run.name}/checkpoints/step-4.ckpt"
    config = random_run / "config.yaml"
    config.write_text(
        config.read_text().replace("  pretrained: null\n", f"  pretrained: {at}\n", 1)
    )
    assert places(garbage(outputs))["checkpoints"] == [
        f"train/{clip_run.name}/checkpoints/step-6.ckpt",
        f"train/{name}/checkpoints/step-6.ckpt",
    ]
    config.write_text(config.read_text().replace("/step-4.ckpt", ""))  # all of the folder
    assert places(garbage(outputs))["checkpoints"] == [f"train/{name}/checkpoints/step-6.ckpt"]


@pytest.mark.parametrize("why", ["unfinished", "no weights", "damaged weights", "no config", "odd"])
def test_checkpoints_that_may_be_all_there_is_stay(
    why: str, outputs: Path, clip_run: Path, random_run: Path
) -> None:
    weights = clip_run / "model" / "open_clip_model.safetensors"
    if why == "unfinished":
        (clip_run / "summary.json").unlink()
    elif why == "no weights":
        weights.unlink()
    elif why == "damaged weights":
        data = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(data[:-1])
    elif why == "no config":
        (clip_run / "config.yaml").write_text("a: [")
    else:
        set_in_config(clip_run, "keep_every_n_steps: null", "keep_every_n_steps: often")
    found = places(garbage(outputs))["checkpoints"]
    assert found == [f"train/{random_run.name}/checkpoints/step-{step}.ckpt" for step in (4, 6)]


def test_what_nothing_refers_to_can_go(outputs: Path, clip_run: Path) -> None:
    shutil.rmtree(clip_run)
    (selection,) = outputs.glob("selections/clip_score-*")
    found = places(garbage(outputs))
    assert {path.rpartition("/")[0] for path in found["selections"]} == {
        f"selections/{selection.name}"
    }
    assert "scores" not in found  # the selection needs them
    assert [*free(garbage(outputs).of("selections"))]
    assert not selection.exists()
    (scores,) = {path.rpartition("/")[0] for path in places(garbage(outputs))["scores"]}
    assert [*free(garbage(outputs).of("scores"))]
    assert not (outputs / scores).exists()
    assert "scores" not in places(garbage(outputs))  # those of the other run stay


def test_young_ones_stay(outputs: Path, clip_run: Path) -> None:
    shutil.rmtree(clip_run)
    assert "selections" not in places(garbage(outputs, older_than_seconds=HOUR))
    assert garbage(outputs, older_than_seconds=HOUR).notes == (
        "1 scores, selections or features are too young to go",
    )
    (selection,) = outputs.glob("selections/clip_score-*")
    for path in selection.iterdir():
        os.utime(path, (0, time.time() - 2 * HOUR))
    assert "selections" in places(garbage(outputs, older_than_seconds=HOUR))


def test_while_a_process_writes_nothing_goes_that_it_may_need(
    outputs: Path, clip_run: Path, random_run: Path
) -> None:
    (selection,) = outputs.glob("selections/clip_score-*")
    shutil.rmtree(clip_run)
    with locked(random_run / LOCK_NAME, owner="it"):
        found = garbage(outputs)
        assert places(found) == {}  # of the run that is held neither
        assert f"train/{random_run.name} is being written by process" in found.notes[0]
    assert places(garbage(outputs)).keys() == {"checkpoints", "selections"}
    with locked(selection / LOCK_NAME, owner="it"):
        assert places(garbage(outputs)).keys() == {"checkpoints"}


def test_with_a_record_that_cannot_be_read_nothing_is_unneeded(
    outputs: Path, clip_run: Path, random_run: Path
) -> None:
    shutil.rmtree(clip_run)
    (random_run / "identity.json").write_text("{")
    found = garbage(outputs)
    assert places(found).keys() == {"checkpoints"}
    assert "identity.json" in found.notes[0]


def test_files_that_were_set_aside_can_go(outputs: Path, clip_run: Path) -> None:
    names = ["summary.json.damaged", "checkpoints/step-2.ckpt.damaged-3"]
    for name in names:
        (clip_run / name).write_text("x")
    (clip_run / "model.damaged").mkdir()
    (clip_run / "model.damaged" / "open_clip_config.json").write_text("x")
    (clip_run / "mine.damaged").write_text("mine")
    (scores,) = {path.parent for path in outputs.glob("scores/*/part-0.npz")}
    (scores / "part-0.npz.damaged").write_text("x")
    place = f"train/{clip_run.name}"
    assert {*places(garbage(outputs))["damaged"]} == {
        *(f"{place}/{name}" for name in names),
        f"{place}/model.damaged/open_clip_config.json",
        f"scores/{scores.name}/part-0.npz.damaged",
    }
    assert [*free(garbage(outputs).of("damaged"))]
    assert "damaged" not in places(garbage(outputs))
    assert (clip_run / "mine.damaged").exists()
    assert not (clip_run / "model.damaged").exists()
    assert (scores / "part-0.npz").exists()
    assert RunDir(path=clip_run).is_finished


def test_what_dead_processes_left_can_go(outputs: Path, clip_run: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    from siftclip.writing import temporary_beside

    own = temporary_beside(clip_run / "checkpoints" / "step-8.ckpt")
    own.write_text("being written")
    dead = own.with_name(own.name.replace(f"-{os.getpid()}.", f"-{process.pid}."))
    dead.write_text("half")
    stranger = clip_run / dead.name.replace("step-8.ckpt", "mine")
    stranger.write_text("mine")
    assert places(garbage(outputs))["temporary"] == [
        f"train/{clip_run.name}/checkpoints/{dead.name}"
    ]
    assert [*free(garbage(outputs).of("temporary"))]
    assert not dead.exists()
    assert own.exists()
    assert stranger.exists()


def test_runs_that_were_replaced_can_go(outputs: Path, clip_run: Path) -> None:
    old = Path(f"{clip_run}.replaced-20260101-120000")
    shutil.copytree(clip_run, old, copy_function=os.link)
    (old / "notes.txt").write_text("mine")
    found = garbage(outputs)
    assert {item.entry.place for item in found.of("replaced")} == {f"train/{old.name}"}
    assert not [path for path in places(found)["checkpoints"] if old.name in path]
    (removed,) = free(found.of("replaced"))
    assert removed.left == ("notes.txt",)
    assert [path.name for path in old.iterdir()] == ["notes.txt"]
    assert RunDir(path=clip_run).is_finished


def test_reuse_of_a_run_leaves_what_is_known_as_replaced(
    outputs: Path, random_run: Path, tmp_path: Path
) -> None:
    aside = RunDir(path=random_run).set_aside()
    assert aside.name in {entry.name for entry in scan(outputs).entries if entry.is_replaced}


def test_every_kind_says_what_is_lost() -> None:
    assert tuple(LOSSES) == GARBAGE
    assert size_in_words(0) == "0 B"
    assert size_in_words(999_949) == "999.9 kB"
    assert size_in_words(999_960) == "1.0 MB"
    assert size_in_words(5 * 10**15) == "5000.0 TB"
