"""Answers of built-in selectors are found again when their code is rewritten, and only then."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from siftclip.aliases import old_name
from siftclip.datamodules.identity.code_identity import built_in_code, code_identity
from siftclip.datamodules.identity.kept_code import KeptCode, kept_code
from siftclip.selectors.core.base import Chunk, ScoreSelector
from siftclip.selectors.methods.clip_score import ClipScore

SAME_ANSWERS = Path(__file__).parents[2] / "recording" / "same_answers.py"

TABLE = KeptCode(
    siftclip="0.1.0",
    kept={"a": "digest of a", "b": "digest of b", "c": "digest of c"},
    imports={"a": ["a", "b"], "b": ["b"], "c": ["c"]},
    today={"a": "a, rewritten", "b": "digest of b", "c": "c, rewritten", "split": "half of a"},
)


def test_the_table_is_of_this_code() -> None:
    declared = runpy.run_path(str(SAME_ANSWERS))["declared"]([])
    assert declared == kept_code(), (
        "the code of built-in selectors has changed: say `make same-answers`, or that answers are "
        "new (tests/recording/README.md)"
    )


def test_rewritten_code_stands_for_what_is_kept() -> None:
    rewritten = {"a": "a, rewritten", "b": "digest of b", "split": "half of a"}
    kept = {"a": "digest of a", "b": "digest of b"}
    assert TABLE.stands_for("a", rewritten) == kept
    assert TABLE.stands_for("a", {**rewritten, "a": "edited"}) is None
    assert TABLE.stands_for("a", {**rewritten, "split": "edited"}) is None
    assert TABLE.stands_for("a", {**rewritten, "unknown": "x"}) is None
    assert TABLE.stands_for("unknown", {"unknown": "x"}) is None


def test_same_answers_are_declared_for_the_text_of_now() -> None:
    code = {"a": {"a": "again", "b": "too"}, "b": {"b": "too"}, "new": {"new": "n", "b": "too"}}
    table = TABLE.with_same_answers(code)
    assert table.stands_for("a", code["a"]) == {"a": "digest of a", "b": "digest of b"}
    assert table.stands_for("new", code["new"]) == {"new": "n", "b": "digest of b"}
    later = table.with_same_answers({"new": {"new": "n, rewritten", "b": "too"}})
    assert later.stands_for("new", {"new": "n, rewritten", "b": "too"}) == {
        "new": "n",
        "b": "digest of b",
    }


def test_new_answers_are_those_of_a_module_and_of_what_imports_it() -> None:
    code = {"a": {"a": "a, rewritten", "b": "corrected"}, "b": {"b": "corrected"}}
    table = TABLE.with_same_answers({**code, "c": {"c": "c, rewritten"}}).with_new_answers("b")
    assert table.stands_for("a", code["a"]) == {"a": "digest of a", "b": "corrected"}
    assert table.stands_for("b", code["b"]) == {"b": "corrected"}
    assert table.stands_for("c", {"c": "c, rewritten"}) == TABLE.stands_for(
        "c", {"c": "c, rewritten"}
    )


def test_built_in_code_is_known_by_what_is_kept() -> None:
    name = ClipScore.__module__
    identity = code_identity([ClipScore])
    assert identity.pop("siftclip") == kept_code().siftclip
    assert identity == {key: kept_code().kept[key] for key in kept_code().imports[old_name(name)]}
    assert len(identity) > 5


def test_an_edited_built_in_module_is_known_by_its_own_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, before = ClipScore.__module__, code_identity([ClipScore])
    edited = KeptCode(
        siftclip="0.0.1",
        kept=kept_code().kept,
        imports=kept_code().imports,
        today={**kept_code().today, name: "of another text"},
    )
    monkeypatch.setattr("siftclip.datamodules.identity.code_identity.kept_code", lambda: edited)
    now = code_identity([ClipScore])
    assert now != before
    assert now["siftclip"] == "0.1.0"
    assert built_in_code([name])[name].items() <= now.items()


def test_a_plug_in_is_known_with_what_its_base_class_is_kept_under() -> None:
    class Mine(ScoreSelector):
        def score(self, chunk: Chunk) -> None:  # type: ignore[override]  # never called
            return None

    identity = code_identity([Mine])
    base = kept_code().imports[old_name(ScoreSelector.__module__)]
    assert {key: identity[key] for key in base} == {key: kept_code().kept[key] for key in base}
