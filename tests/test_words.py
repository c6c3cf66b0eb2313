"""What readers see is in words that a reader outside understands at once."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("siftclip", "siftclip.selectors", "siftclip.datamodules"),
    *("siftclip.eval", "siftclip.trainer"),
)

_THINGS = "sample|step|task|rank|batch|pass|line|row|class|image|arm|seed|process|GPU|minute|chunk"
# What puzzled readers, and what to say.
PHRASES = {
    r"What matters:": "Main options:",
    r"All options:": "List all options:",
    r"\bBesides\b": "See also, or: also",
    r"\bbesides[.,;)]": "in addition",
    rf"\b(one|once|\d+ (?!of)\w+|bytes|MB|GB|us|ms|seconds) an? ({_THINGS})\b": "... per ...",
    rf"\ba (line|row|column|file|number) an? ({_THINGS}|word|group)\b": "one ... per ...",
    r"\bevery so many\b": "every N",
    r"\bfinished already\b": "already finished",
    r"\brepeats? a uid\b": "duplicate uids",
    r"\bcontinues to the id\b": "resumes at the same sample",
    r"\b(seconds|time)( of \w+ \w+)? by their use\b": "time breakdown",
    r"\brepeated reads\b": "retries",
    r"\bof other scores\b": "combine scores",
    r"\bpublished pairs\b": "published combinations",
    r"\bDataComp's shape\b": "DataComp's format",
    r"\bunjudged\b": "without a score",
    r"\bOwn tasks\b": "Custom tasks",
    r"\bWhat it does not do yet\b": "Limitations",
    r"\bgo(es|ing)? on\b": "continue",
    r"\b(taken|read|left) as (it is|they are)\b": "unchanged",
    r"\bas they come\b": "when they appear",
    r"\bGot null\b": "not set",
    r"\bunless told otherwise\b": "by default",
    r"\b(is|are) told (before|by|at)\b": "is reported",
    r"\bwithout a word\b": "silently",
    r"\bwould pay\b(?! off)|\bto pay\b(?! off)": "pay off",
}


def pages() -> list[str]:
    """The pages and the help of the commands."""
    paths = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml"))
    return [path.relative_to(ROOT).as_posix() for path in paths if path.name != "CHANGELOG.md"]


def public_names() -> list[str]:
    """All of them; none is imported before its test."""
    modules = {package: importlib.import_module(package) for package in PACKAGES}
    return [f"{package}:{name}" for package, module in modules.items() for name in module.__all__]


def faults(text: str) -> list[str]:
    """The phrases of a text that puzzle, with what to say."""
    prose = " ".join(re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL).split())
    return [
        f"{match[0]!r}: say {better!r}"
        for phrase, better in PHRASES.items()
        for match in re.finditer(phrase, prose)
    ]


@pytest.mark.parametrize("page", pages())
def test_pages_are_in_plain_words(page: str) -> None:
    assert faults((ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("public", public_names())
def test_docstrings_of_public_names_are_in_plain_words(public: str) -> None:
    package, _, name = public.partition(":")
    documented = getattr(importlib.import_module(package), name)
    assert faults(documented.__doc__ or "") == []


@pytest.mark.parametrize(
    "text",
    [
        "What matters: seed",
        "it takes 3 us a sample",
        "one a rank",
        "a row an arm",
        "fields, and a line a task",
        "the seconds of a step by\ntheir use",
        "a sample that is unjudged",
        "is read as it is",
        "whether a copy would pay",
    ],
)
def test_the_search_finds_what_puzzles(text: str) -> None:
    assert faults(text)


def test_the_search_passes_code_and_plain_words() -> None:
    assert faults("`unjudged_samples` counts samples without a score, 3 us per sample") == []
