"""Removing entries: what others need stays, what is not ours stays, and a killed removal ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip import writing
from siftclip.errors import InputError
from siftclip.locks import LOCK_NAME, HeldError, locked
from siftclip.trainer.outputs.references import find_references
from siftclip.trainer.outputs.removal import (
    find_entry,
    ordered,
    remove_entry,
    remove_files,
    require_free,
    require_unreferenced,
)
from siftclip.trainer.outputs.scan import Entry, scan
from siftclip.trainer.runtime.run_dir import RunDir


def entry_of(outputs: Path, folder: Path) -> Entry:
    return find_entry(scan(outputs), str(folder))


def files_below(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(folder)) for path in paths}


def test_an_entry_goes_whole_and_nothing_else(outputs: Path, clip_run: Path) -> None:
    before = files_below(outputs)
    of_run = files_below(clip_run)
    size = sum((clip_run / path).stat().st_size for path in of_run)
    removed = remove_entry(entry_of(outputs, clip_run))
    assert not clip_run.exists()
    assert files_below(outputs) == before - {f"train/{clip_run.name}/{path}" for path in of_run}
    assert (removed.files, removed.size_bytes, removed.left) == (len(of_run), size, ())


@pytest.mark.parametrize("kind", ["selections", "scores", "reports"])
def test_every_kind_goes(kind: str, outputs: Path) -> None:
    for entry in scan(outputs).entries:
        if entry.kind.name == kind:
            remove_entry(entry)
            assert not entry.path.exists()
    assert kind not in {entry.kind.name for entry in scan(outputs).entries}


def test_strangers_stay_and_links_lead_nowhere(
    outputs: Path, clip_run: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "v0001").mkdir(parents=True)
    for name in ("step-2.ckpt", "open_clip_config.json", "v0001/selection.npy"):
        (outside / name).write_text("precious")
    (clip_run / "notes.txt").write_text("mine")
    (clip_run / "model" / "card.md").write_text("mine")
    shutil.rmtree(clip_run / "checkpoints")
    (clip_run / "checkpoints").symlink_to(outside)  # as of somebody whose disk was full
    (clip_run / "selections").symlink_to(outside)
    (clip_run / "metrics.csv").unlink()
    (clip_run / "metrics.csv").symlink_to(outside / "step-2.ckpt")
    removed = remove_entry(entry_of(outputs, clip_run))
    assert {*removed.left} == {
        *("notes.txt", "model/card.md", "checkpoints", "selections", "metrics.csv"),
    }
    assert files_below(clip_run) == {*removed.left}
    assert (clip_run / "notes.txt").read_text() == "mine"
    assert {path.read_text() for path in outside.rglob("*") if path.is_file()} == {"precious"}
    assert len(files_below(outside)) == 3


def test_a_link_that_appears_meanwhile_is_not_followed(
    outputs: Path, clip_run: Path, tmp_path: Path
) -> None:
    """Between the look and the removal somebody moves a folder and leaves a link."""
    entry = entry_of(outputs, clip_run)
    moved = tmp_path / "moved"
    shutil.move(clip_run / "checkpoints", moved)
    (clip_run / "checkpoints").symlink_to(moved)
    kept = files_below(moved)
    assert kept
    with pytest.raises(writing.WriteError):
        remove_entry(entry)
    assert files_below(moved) == kept


def test_an_entry_that_is_a_link_is_none(outputs: Path, clip_run: Path, tmp_path: Path) -> None:
    shutil.move(clip_run, tmp_path / "moved")
    clip_run.symlink_to(tmp_path / "moved")
    with pytest.raises(InputError, match="must be a run, a selection or the like"):
        find_entry(scan(outputs), str(clip_run))


def test_a_folder_of_outputs_may_be_a_link(outputs: Path, clip_run: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(outputs)
    entry = find_entry(scan(tmp_path / "linked"), str(tmp_path / "linked/train" / clip_run.name))
    remove_entry(entry)
    assert not clip_run.exists()


# ---- names --------------------------------------------------------------------------------------
def test_names(
    outputs: Path, clip_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(outputs / "train")
    found = scan(outputs)
    for name in (
        *(clip_run.name, f"train/{clip_run.name}", f"{clip_run}/", f"./{clip_run.name}"),
        f"../train/{clip_run.name}",
    ):
        assert find_entry(found, name).path == clip_run.resolve()
    for name in ("", ".", "..", "/", "train", "nothing", f"{clip_run}/model", str(tmp_path)):
        with pytest.raises(InputError, match="siftclip runs list"):
            find_entry(found, name)


def test_names_that_several_have(outputs: Path, clip_run: Path) -> None:
    shutil.copytree(clip_run, outputs / "demo" / clip_run.name, copy_function=os.link)
    with pytest.raises(InputError, match=f"may be any of demo/{clip_run.name}, train/"):
        find_entry(scan(outputs), clip_run.name)
    assert find_entry(scan(outputs), f"demo/{clip_run.name}").place == f"demo/{clip_run.name}"


# ---- who needs it -------------------------------------------------------------------------------
def test_what_others_refer_to_is_told(outputs: Path, clip_run: Path) -> None:
    found = scan(outputs)
    references = find_references(found)
    with pytest.raises(InputError, match=rf"train/{clip_run.name} is referred to: compare/both"):
        require_unreferenced(find_entry(found, clip_run.name), references)
    require_unreferenced(find_entry(found, "compare/both"), references)
    (clip_run / "config.yaml").write_text("- no\n- run")
    with pytest.raises(InputError, match=r"compare/both is not known: .*config\.yaml is not the"):
        require_unreferenced(find_entry(found, "compare/both"), find_references(scan(outputs)))


# ---- processes ----------------------------------------------------------------------------------
HOLD = """
import sys, time
from pathlib import Path
from siftclip.locks import locked

with locked(Path(sys.argv[1]), owner="it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("lock", [LOCK_NAME, f"eval_watch/{LOCK_NAME}"])
def test_what_a_process_writes_stays(
    lock: str, outputs: Path, clip_run: Path, child_environment: dict[str, str]
) -> None:
    before = files_below(clip_run)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(clip_run / lock)],
        env=child_environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        entry = entry_of(outputs, clip_run)
        for remove in (require_free, remove_entry, lambda e: remove_files(e, ["summary.json"])):
            with pytest.raises(InputError, match=f"is being written by process {process.pid} on"):
                remove(entry)
        assert files_below(clip_run) == before | {lock}
    finally:
        process.kill()
        process.communicate()
    remove_entry(entry_of(outputs, clip_run))  # the file that it has left holds nothing
    assert not clip_run.exists()


def test_nobody_can_begin_in_what_is_being_removed(
    outputs: Path, clip_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    delete = writing.delete_inside

    def look(root: Path, place: str) -> bool:
        with pytest.raises(HeldError), locked(clip_run / LOCK_NAME, owner="it"):
            pass
        seen.append(True)
        return delete(root, place)

    monkeypatch.setattr("siftclip.trainer.outputs.removal.delete_inside", look)
    remove_entry(entry_of(outputs, clip_run))
    assert len(seen) > 10


# ---- removals that are broken off ---------------------------------------------------------------
class Killed(BaseException):
    """No handler of Siftclip's catches it, as none catches SIGKILL."""


def test_a_removal_that_is_broken_off_at_any_file_is_continued(
    outputs: Path, clip_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is left on the way is never taken for a finished run."""
    count = len(ordered(entry_of(outputs, clip_run)))
    assert count > 10
    delete = writing.delete_inside
    for kept in range(1, count + 1):
        folder = outputs / "train" / f"broken-{kept}"
        shutil.copytree(clip_run, folder, copy_function=os.link)
        left = iter(range(kept))

        def until(root: Path, place: str, left: Any = left) -> bool:
            if next(left, None) is None:
                raise Killed
            return delete(root, place)

        with monkeypatch.context() as patch:
            patch.setattr("siftclip.trainer.outputs.removal.delete_inside", until)
            entry = entry_of(outputs, folder)
            if kept < count:
                with pytest.raises(Killed):
                    remove_entry(entry)
                assert not RunDir(path=folder).is_finished
                assert (folder / "config.yaml").exists()
        remove_entry(entry_of(outputs, folder))
        assert not folder.exists()


def test_an_empty_folder_is_removed(outputs: Path) -> None:
    """A removal that was killed behind the last file."""
    (outputs / "train" / "x").mkdir()
    remove_entry(find_entry(scan(outputs), "train/x"))
    assert not (outputs / "train" / "x").exists()


REMOVE = """
import sys
from pathlib import Path
from siftclip.trainer.outputs.removal import find_entry, remove_entry
from siftclip.trainer.outputs.scan import scan

entry = find_entry(scan(Path(sys.argv[1])), sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
remove_entry(entry)
"""


@pytest.mark.slow
def test_a_removal_is_killed_for_real(
    outputs: Path, clip_run: Path, child_environment: dict[str, str]
) -> None:
    for number in range(5_000):
        (clip_run / "eval_results_outcomes" / f"{number}.npz").touch()
    process: Any = subprocess.Popen(
        [sys.executable, "-c", REMOVE, str(outputs), clip_run.name],
        env=child_environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while (clip_run / "summary.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert clip_run.exists()
    assert not RunDir(path=clip_run).is_finished
    remove_entry(entry_of(outputs, clip_run))
    assert not clip_run.exists()


def test_some_files_of_an_entry_go(outputs: Path, clip_run: Path) -> None:
    entry = entry_of(outputs, clip_run)
    removed = remove_files(entry, ["checkpoints/step-4.ckpt", "checkpoints/step-6.ckpt", "nothing"])
    assert removed.files == 2
    assert not (clip_run / "checkpoints").exists()  # nothing is left in it
    assert RunDir(path=clip_run).is_finished
    strange: Callable[[], object] = lambda: remove_files(entry, ["notes.txt"])  # noqa: E731
    (clip_run / "notes.txt").write_text("mine")
    strange()
    assert (clip_run / "notes.txt").exists()
