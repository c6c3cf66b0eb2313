"""Typed settings are handed down: configurations end where settings begin."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest

from siftclip.datamodules.index.tar_walk import KEY_SPLITS
from siftclip.datamodules.models.options import OPTIONS
from siftclip.datamodules.models.weights import WEIGHTS
from siftclip.datamodules.streaming.image_transform import ResizeBackend
from siftclip.datamodules.streaming.loader import LoaderOptions, StartMethod
from siftclip.errors import InputError, parameters_of
from siftclip.eval.evaluate import PRECISIONS, EvalOptions
from siftclip.eval.tasks.kinds.values import Protocol
from siftclip.trainer.losses.siglip import SigLipLoss
from siftclip.trainer.losses.table import BUILT_IN
from siftclip.trainer.models.towers import LockConfig
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.settings import evaluation
from siftclip.trainer.settings.data import DataSettings
from siftclip.trainer.settings.fields import section
from siftclip.trainer.settings.fields.rules import hints
from siftclip.trainer.settings.loss import LossSettings
from siftclip.trainer.settings.model import LockSettings, ModelOptions
from siftclip.trainer.settings.online import ScheduleSettings, ScoringSettings

ROOT = Path(__file__).parents[3]
FOLDERS = ("trainer", "datamodules", "selectors", "eval")
# the last gives selectors the same nodes as Hydra's instantiate does
READ_HERE = ("trainer/settings/", "trainer/cli/", "trainer/options/objects.py")
OF_OMEGACONF = {"DictConfig", "ListConfig", "OmegaConf"}
WALK = 40  # functions that take the settings of a whole training


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def test_configurations_end_in_the_settings() -> None:
    found = []
    for name, tree in modules():
        if name.startswith(READ_HERE):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            else:
                imported = [node.id] if isinstance(node, ast.Name) else []
            found += [
                f"{name}: {what}"
                for what in imported
                if what.split(".")[0] == "omegaconf" or what in OF_OMEGACONF
            ]
    assert not found


def test_settings_of_a_training_are_followed_in_few_stops() -> None:
    """A stop is a function that takes them as a whole; what it calls takes sections."""
    stops = []
    for name, tree in modules():
        if name.startswith(READ_HERE):
            continue
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for argument in (*function.args.args, *function.args.kwonlyargs):
                annotation = argument.annotation
                if isinstance(annotation, ast.Name) and annotation.id == "TrainCommand":
                    stops.append(f"{name}: {function.name}")
    assert 5 <= len(stops) <= WALK, stops


@pytest.mark.parametrize(
    ("own", "below", "without"),
    [
        (LockSettings, LockConfig, set()),
        (ScoringSettings, ScoringConfig, set()),
        (ScheduleSettings, Schedule, {"filter_ratio"}),
        (DataSettings, LoaderOptions, {"num_workers"}),
        (evaluation.EvalSettings, EvalOptions, {"probe"}),
    ],
)
def test_defaults_are_those_of_the_classes_that_they_become(
    own: Any, below: Any, without: set[str]
) -> None:
    theirs = {one.name: one.default for one in fields(below) if one.default is not MISSING}
    ours = {one.name: one.default for one in fields(own) if one.default is not MISSING}
    common = (theirs.keys() & ours.keys()) - without
    assert common
    assert {name: ours[name] for name in common} == {name: theirs[name] for name in common}


def choices(kind: type, name: str) -> set[Any]:
    """The texts that an option can be."""
    found: set[Any] = set()
    todo = [hints(kind)[name]]
    while todo:
        hint = todo.pop()
        inner = get_args(hint)
        found |= {one for one in inner if isinstance(one, str)}
        todo += [one for one in inner if get_args(one)]
    return found


def test_choices_are_those_of_the_code_below() -> None:
    assert choices(DataSettings, "start_method") == set(get_args(StartMethod))
    assert choices(DataSettings, "resize") == set(get_args(ResizeBackend))
    assert set(get_args(section.KeySplit)) == set(KEY_SPLITS)
    assert set(get_args(section.Weights)) == set(WEIGHTS)
    assert choices(evaluation.EvalSettings, "precision") == set(PRECISIONS)
    assert set(get_args(evaluation.Protocol)) == set(get_args(Protocol))
    assert set(hints(ModelOptions)) == set(OPTIONS)
    names = {name for loss in get_args(LossSettings) for name in choices(loss, "name")}
    assert names == {*BUILT_IN, "plugin"}
    for way in ("bidir", "shift", "reduce", "gather"):
        SigLipLoss(way)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", get_args(LossSettings))
def test_options_of_losses_are_what_their_classes_declare(kind: Any) -> None:
    options = hints(kind)
    (name,) = get_args(options["name"])
    if name == "plugin":  # any class
        assert {"teacher", "weights"} <= options.keys()
        return
    declared = BUILT_IN[name]
    assert ("weights" in options) == declared.takes_weights
    assert ("teacher" in options) == (declared.teacher != "none")
    if declared.teacher != "none":
        with pytest.raises(InputError, match=rf"loss={name} needs (one teacher|the cached feat)"):
            kind()
        has_model = "model" in hints(options["teacher"])
        assert has_model == (declared.teacher == "model_or_features")
    names = set(options) - {"name", "teacher", "weights"}
    assert names <= set(parameters_of(declared))
