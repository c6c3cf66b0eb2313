"""What lies in a folder of outputs, what it is, and what refers to what."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import without_model

from siftclip.datamodules.selection.registry import find_subset, write_named
from siftclip.errors import InputError
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.outputs.kinds import KINDS, kind_of, plain_name
from siftclip.trainer.outputs.making import made_by, state_of
from siftclip.trainer.outputs.references import References, find_references
from siftclip.trainer.outputs.scan import Entry, Outputs, scan
from siftclip.trainer.stages.eval_watch import watch_stage
from siftclip.trainer.stages.train import train_stage


def entries(outputs: Outputs) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in outputs.entries:
        found.setdefault(entry.kind.name, []).append(entry)
    return found


def references_of(folder: Path) -> References:
    return find_references(scan(folder))


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- what lies there ----------------------------------------------------------------------------
def test_everything_that_commands_write_is_known(outputs: Path) -> None:
    found = scan(outputs)
    kinds = entries(found)
    assert {kind: len(of_kind) for kind, of_kind in kinds.items()} == {
        "runs": 2,
        "selections": 2,
        "scores": 2,
        "reports": 1,
    }
    assert found.others == {}
    assert [entry.strangers for entry in found.entries] == [()] * 7
    assert sum(entry.size_bytes for entry in found.entries) == size_on_disk(outputs)
    run = kinds["runs"][0]
    assert run.size_of("checkpoints") == size_on_disk(run.path / "checkpoints") > 10**7
    assert {state_of(entry) for entry in found.entries} == {"finished"}
    assert made_by(run) == "clip_score, vit_tiny, 96 samples"
    assert made_by(kinds["selections"][0]) == "clip_score, 72 samples"
    assert {made_by(entry) for entry in kinds["scores"]} == {"ClipScore", "Uniform"}


@pytest.mark.slow
def test_a_run_that_writes_all_it_can_is_known(
    base: list[str], demo_data: DemoData, composing: Callable[..., Any], tmp_path: Path
) -> None:
    """Selections in the loop, wandb, details of evaluations, and one that watches."""
    words = [*base, f"eval.root={demo_data.tasks}", "eval.tasks=[colour]", "eval.resamples=10"]
    more = [
        *("selector=random", "selector.fraction=1", "online=every_n_steps", "logger=wandb"),
        *("online.every_n_steps=3", "logger.mode=offline"),
        *("eval.details=true", "eval.predictions=true", "trainer.checkpoint_every_n_steps=3"),
    ]
    every_step = [
        *("online=every_step", "selector@online.selector=jest", "online.selector.fraction=0.5"),
        *("online.diagnostics.record_chosen=true", "selector=random", "selector.fraction=1"),
    ]
    with composing() as compose:
        train_stage(compose("train", [*base, *every_step]))
        run = train_stage(compose("train", [*words, *more]))
        watch = [f"watch.run={run.path}", "watch.once=true", "logger=csv"]
        kept = [word for word in words if word.partition(".")[0] not in ("model", "scale", "optim")]
        assert list(watch_stage(compose("eval_watch", [*kept, *watch])))
    found = scan(tmp_path / "outputs")
    assert {name for entry in found.entries for name in entry.strangers} == set()
    entry, chosen = entries(found)["runs"]
    assert chosen.has_file("chosen.npy")
    written = {file.path for file in entry.files}
    assert {"wandb_id", "metrics.csv"} <= written
    for folder in ("selections/v0001", "wandb", "eval_results_details", "eval_watch"):
        assert any(path.startswith(f"{folder}/") for path in written), folder
    assert any(os.path.islink(entry.path / path) for path in written)  # wandb's


def test_strangers_are_told_apart(outputs: Path, clip_run: Path, tmp_path: Path) -> None:
    (clip_run / "notes.txt").write_text("mine")
    (clip_run / "model" / "card.md").write_text("mine")
    (clip_run / "mine").mkdir()
    (clip_run / "mine" / "config.yaml").write_text("mine")
    (clip_run / "checkpoints" / "best.ckpt").write_text("mine")
    (clip_run / "link.json").symlink_to(clip_run / "summary.json")
    os.mkfifo(clip_run / "pipe")
    (outputs / "todo.txt").write_text("mine")
    (outputs / "plots" / "deep").mkdir(parents=True)
    (outputs / "plots" / "deep" / "a.png").write_text("mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "summary.json").write_text("{}")
    (outputs / "train" / "linked").symlink_to(tmp_path / "outside")
    found = scan(outputs)
    (run,) = (entry for entry in found.entries if entry.path == clip_run.resolve())
    assert {*run.strangers} == {
        *("notes.txt", "model/card.md", "mine/config.yaml", "checkpoints/best.ckpt"),
        *("link.json", "pipe"),
    }
    assert {name: [f.path for f in files] for name, files in found.others.items()} == {
        "todo.txt": ["todo.txt"],
        "plots": ["plots/deep/a.png"],
        "train": ["train/linked"],  # a link is no run, and nobody looks behind it
    }


def test_runs_are_found_wherever_they_are(outputs: Path, clip_run: Path) -> None:
    shutil.copytree(clip_run, outputs / "demo" / "teacher", copy_function=os.link)
    shutil.copytree(clip_run, outputs / "reproduced" / "train" / "again", copy_function=os.link)
    shutil.copytree(clip_run, f"{clip_run}.replaced-20260101-120000", copy_function=os.link)
    runs = {entry.place: entry for entry in entries(scan(outputs))["runs"]}
    assert {"demo/teacher", "reproduced/train/again"} <= runs.keys()
    assert [place for place, run in runs.items() if run.is_replaced] == [
        f"train/{clip_run.name}.replaced-20260101-120000"
    ]


def test_states_of_runs(outputs: Path, clip_run: Path) -> None:
    def state() -> str:
        (run,) = (entry for entry in scan(outputs).entries if entry.path == clip_run.resolve())
        return state_of(run)

    with locked(clip_run / LOCK_NAME, owner="it"):
        assert state() == "being written"
    weights = clip_run / "model" / "open_clip_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[:-1000])
    assert state() == "damaged weights"
    (clip_run / "summary.json").write_text("{")
    assert state() == "damaged"
    (clip_run / "summary.json").unlink()
    assert state() == "step 6 of 6"
    shutil.rmtree(clip_run / "checkpoints")
    assert state() == "no checkpoint"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a folder that commands have written into"):
        scan(tmp_path / "nowhere")
    assert scan(tmp_path).entries == ()


@pytest.mark.parametrize(
    ("kind", "path", "is_ours"),
    [
        ("runs", "checkpoints/step-3.ckpt", True),
        ("runs", "checkpoints/sub/step-3.ckpt", False),
        ("runs", "model/tokenizer_config.json", True),
        ("runs", "model/readme.md", False),
        ("runs", "eval/model-bf16/eval_results.jsonl", True),
        ("runs", "eval_watch-raw/step-3_outcomes/a.npz", True),
        ("runs", "eval_watch/.lock", True),
        ("runs", "wandb/offline-run-1/files/a/b.json", True),
        ("runs", "my_metrics.jsonl", False),
        ("runs", "metrics.jsonl.bak", False),
        ("scores", "part-0.npz", True),
        ("scores", "deep/part-0.npz", False),
        ("subsets", "tars.json", True),
        ("selections", "tars.json", False),
    ],
)
def test_patterns(kind: Any, path: str, is_ours: bool) -> None:
    assert KINDS[kind].has(path) is is_ours


@given(st.sampled_from([path for kind in KINDS.values() for path in kind.first + kind.last]))
def test_names_that_are_set_aside_are_known_by_their_own(path: str) -> None:
    folder, _, name = path.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    assert plain_name(f"{prefix}{name}.damaged") == (path, "damaged")
    assert plain_name(f"{prefix}{name}.damaged-12") == (path, "damaged")
    assert plain_name(f"{prefix}.{name}.0123abcd-77.tmp") == (path, "temporary")
    assert plain_name(path) == (path, "")


def test_kinds_are_known_by_their_place_or_their_files() -> None:
    def name(place: str, *names: str) -> str | None:
        kind = kind_of(place, names)
        return None if kind is None else kind.name

    assert name("train/x") == "runs"
    assert name("train") is None
    assert name("mine/x", "config.yaml", "summary.json") == "runs"
    assert name("mine/x", "config.yaml") == "runs"  # of which a removal has left this
    assert name("mine/x", "config.yaml", "main.py") is None
    assert name("a/eval/x") is None
    assert name("reproduced/scores/x") == "scores"


# ---- what refers to what ------------------------------------------------------------------------
def names(references: References, place: str) -> set[tuple[str, str]]:
    return {(each.target.partition("/")[0], each.why) for each in references.of(place)}


def test_runs_refer_to_selections_and_these_to_scores(outputs: Path) -> None:
    found = entries(scan(outputs))
    references = references_of(outputs)
    assert references.unreadable == ()
    for run in found["runs"]:
        assert names(references, run.place) == {
            ("selections", "trained on it"),
            ("scores", "made from them"),
        }
    scores = {made_by(entry): entry.place for entry in found["scores"]}
    used = {"ClipScore": "clip_score", "Uniform": "random"}
    for name, selector in used.items():
        users = {each.source for each in references.to(scores[name])}
        assert all(selector in user for user in users)
        assert {user.partition("/")[0] for user in users} == {"selections", "train"}
    (report,) = found["reports"]
    compared = {each.target for each in references.of(report.place)}
    assert compared == {run.place for run in found["runs"] if "clip_score" in run.place}


def test_compositions_refer_to_the_scores_of_their_members(
    base: list[str], composing: Callable[..., Any], tmp_path: Path
) -> None:
    from siftclip.trainer.builders.selection import select_stage

    words = [word for word in base if word.partition(".")[0] not in ("scale", "optim")]
    words = without_model(words)
    with composing() as compose:
        select_stage(compose("select", [*words, "selector=mix"]))
    found = entries(scan(tmp_path / "outputs"))
    references = references_of(tmp_path / "outputs")
    assert len(found["scores"]) >= 2
    (selection,) = found["selections"]
    assert {each.target for each in references.of(selection.place)} == {
        entry.place for entry in found["scores"]
    }


@pytest.mark.parametrize("where", ["here", "elsewhere", "relative"])
def test_paths_in_records_refer(
    where: str, outputs: Path, clip_run: Path, random_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the outputs were when the record was written."""
    monkeypatch.chdir(outputs.parent)
    place = f"train/{random_run.name}"
    path = {
        "here": f"{random_run}/model",
        "elsewhere": f"/mnt/old/results/{place}/checkpoints/step-4.ckpt",
        "relative": f"outputs/{place}",
    }[where]
    config = clip_run / "config.yaml"
    text = config.read_text()
    assert len(re.findall(r"^  pretrained: null$", text, flags=re.MULTILINE)) == 1
    config.write_text(text.replace("  pretrained: null\n", f"  pretrained: {path}\n", 1))
    references = references_of(outputs)
    assert (f"train/{clip_run.name}", "by its path") in {
        (each.source, each.why) for each in references.to(place)
    }
    checkpoint = f"{place}/checkpoints/step-4.ckpt"
    assert references.names_path(checkpoint) is (where == "elsewhere")
    assert not references.names_path(f"{place}/checkpoints/step-2.ckpt")


def test_subsets_refer_to_what_they_were_made_from(outputs: Path, clip_run: Path) -> None:
    root = outputs / "subsets"

    def make(name: str, reference: str) -> None:
        file, given = find_subset(root, reference)
        write_named(root, name, file.counted, operation="import", inputs=[given])

    make("a", str(clip_run))
    make("b", "a")
    references = references_of(outputs)
    run, selection = f"train/{clip_run.name}", next(outputs.glob("selections/clip_score-*")).name
    assert {each.target for each in references.of("subsets/a")} == {run, f"selections/{selection}"}
    assert "subsets/a" in {each.target for each in references.of("subsets/b")}
    assert run not in {each.target for each in references.of("subsets/b")}  # only through a


def test_features_are_named(outputs: Path, clip_run: Path) -> None:
    folder = outputs / "cache" / "features" / "noise"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps({"name": "noise"}))
    np.savez(folder / "0.npz", uids=np.zeros((1, 2), dtype=np.uint64))
    references = references_of(outputs)
    users = {each.source for each in references.to("cache/features/noise")}
    assert f"train/{clip_run.name}" in users
    (folder / "features.json").write_text(json.dumps({"name": "other"}))
    assert references_of(outputs).to("cache/features/noise") == []


@pytest.mark.parametrize("name", ["config.yaml", "identity.json", "selection.json"])
def test_records_that_cannot_be_read_are_told(name: str, outputs: Path, clip_run: Path) -> None:
    (clip_run / name).write_text('{"a": ')
    references = references_of(outputs)
    assert len(references.unreadable) == 1
    assert str(clip_run.resolve() / name) in references.unreadable[0]


def test_a_report_that_is_no_table_is_told(outputs: Path) -> None:
    (report,) = outputs.glob("compare/*/results.csv")
    report.write_bytes(b"\xff\xfe\x00")
    assert "must be UTF-8" in references_of(outputs).unreadable[0]
