"""Examples in public docstrings give what they show, and each public name that has one keeps it."""

from __future__ import annotations

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src/siftclip", "selectors", "datamodules", "eval", "trainer")

# By the module that a reader imports them from.
EXAMPLES = {
    "siftclip": ["select"],
    "siftclip.confidential": ["ConfidentialOptions", "ConfidentialUrl"],
    "siftclip.errors": ["ParameterError"],
    "siftclip.tables": ["cut", "ruled_table", "text_table"],
    "siftclip.uid_texts": ["plain_uid"],
    "siftclip.selectors": [
        *("ClipScore", "NegCLIPLoss", "NormSim", "Vas", "VasD", "NearestRank", "SemDeDup"),
        *("External", "Uniform", "InfoBatch", "QuotaPerCluster", "BasicFilter", "CaptionFilter"),
        *("And", "Or", "Then", "Minus", "Mix", "RankSum"),
        *("TopFraction", "TopCount", "DataCompFraction", "Threshold", "AsGiven"),
        *("SoftmaxSampling", "SoftCapSampling", "HardCapSampling"),
        *("KMeans", "ClusterId", "MemorySource", "ListColumn", "Requirements", "SubBatch"),
        *("ReadsFeatures", "ScoreSelector", "check_selector"),
    ],
    "siftclip.selectors.methods.clip_score": ["clip_score"],
    "siftclip.selectors.methods.negcliploss.negcliploss": ["negcliploss"],
    "siftclip.datamodules": ["Selection.frame", "Selection.to_datacomp", "make_selection"],
    "siftclip.datamodules.index.content": ["describe_content"],
    "siftclip.datamodules.index.uids": ["derive_uid", "distinct_uids", "format_uid", "parse_uids"],
    "siftclip.datamodules.selection.algebra": ["combine"],
    "siftclip.datamodules.selection.shard_lists": ["list_of_tars"],
    "siftclip.datamodules.pool.image_formats": ["describe_formats"],
    "siftclip.eval": ["averages", "check_task_kind", "example_image"],
    "siftclip.eval.metrics.chance": ["class_chances"],
    "siftclip.eval.metrics.outcomes": ["mean_metrics"],
    "siftclip.eval.significance.arm_model": ["fit_arms"],
    "siftclip.eval.significance.savings": ["cost_to_reach", "pareto_front"],
    "siftclip.eval.significance.words": ["telling_words"],
    "siftclip.trainer": ["Budget", "ContrastiveLoss", "Schedule"],
    "siftclip.trainer.optim.schedules": ["lr_factor"],
    "siftclip.trainer.outputs.garbage": ["size_in_words"],
    "siftclip.trainer.outputs.kinds": ["plain_name"],
}
NAMES = [f"{module}:{name}" for module, names in EXAMPLES.items() for name in names]
MOST_LINES = 8  # of an example: a reader takes it in at a glance


def documented(name: str) -> Any:
    """The object behind `module:name`, imported when it is asked for."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def parsed(text: str, name: str) -> doctest.DocTest:
    """The examples in a text. They know nothing but what they import, as in a notebook."""
    return doctest.DocTestParser().get_doctest(text, {}, name, None, None)


def faults(example: doctest.DocTest) -> str:
    """What examples give and do not show."""
    told: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags).run(example, out=told.append)
    return "".join(told)


def names_with_examples() -> Iterator[str]:
    """The name of every class and function whose docstring has an example."""
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ">>> " in (
                ast.get_docstring(node) or ""
            ):
                yield node.name


@pytest.mark.parametrize("name", NAMES)
def test_the_example_gives_what_it_shows(name: str) -> None:
    example = parsed(documented(name).__doc__ or "", name)
    assert example.examples, f"the docstring of {name} has lost its example"
    assert sum(one.source.count("\n") for one in example.examples) <= MOST_LINES
    assert faults(example) == ""


def test_a_wrong_example_is_found() -> None:
    assert "Expected:\n    3\nGot:\n    2" in faults(parsed(">>> 1 + 1\n3\n", "wrong"))


def test_every_example_is_run_here() -> None:
    listed = [name.rpartition(":")[2].rpartition(".")[2] for name in NAMES]
    assert sorted(names_with_examples()) == sorted(listed)
    assert len(listed) >= 25
