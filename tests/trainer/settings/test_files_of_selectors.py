"""A file of a selector that is null unless it is named, such as the covariance of VAS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.selectors import FeatureFile, Vas
from siftclip.trainer.builders.selection import select_stage, selector_from
from siftclip.trainer.cli.application import _named

Compose = Callable[..., Any]


def built(compose: Compose, base: list[str], *words: str) -> Any:
    typed = _named("select", [*base, *words], ())
    return selector_from(compose("select", typed).selector).selector


def test_a_covariance_takes_the_place_of_a_target(base: list[str], compose: Compose) -> None:
    words = ["selector=vas", "selector.covariance.path=S.npz", "selector.covariance.key=S"]
    selector = built(compose, base, *words)
    assert isinstance(selector, Vas)
    assert (selector.target, selector.covariance) == (None, FeatureFile(path="S.npz", key="S"))
    assert built(compose, base, *words, "selector.target=null").covariance == selector.covariance
    with pytest.raises(InputError, match="needs exactly one of target and covariance"):
        built(compose, base, *words, "selector.target.path=T.npz")


@pytest.mark.parametrize("path", ["it's.npy", "a,b=c{}.npy", "a b.npy", "${seed}.npy"])
def test_any_path_is_taken(path: str, base: list[str], compose: Compose) -> None:
    selector = built(compose, base, "selector=vas", f"selector.covariance.path={path}")
    assert selector.covariance == FeatureFile(path=path.replace("${seed}", "0"))


def test_captions_of_a_target_have_a_file_too(base: list[str], compose: Compose) -> None:
    words = ["selector=vas", "selector.modality=cross", "selector.target.path=T.npz"]
    selector = built(compose, base, *words, "selector.text_target.path=T.npz")
    assert selector.text_target == FeatureFile(path="T.npz")


def test_members_and_the_loop_have_the_same(base: list[str], compose: Compose) -> None:
    member = "selector.stages.vas.covariance.path=S.npy"
    assert built(compose, base, "selector=vas_clip", member)
    words = ["online=every_step", "selector@online.selector=vas"]
    typed = _named("train", [*base, *words, "online.selector.covariance.path=S.npy"], ())
    node = compose("train", typed).online.selector
    assert node.parameters["covariance"]["path"] == "S.npy"
    assert node.parameters["target"] is None


def test_a_target_is_still_asked_for(base: list[str], compose: Compose) -> None:
    with pytest.raises(InputError, match=r"^The selector needs selector\.target\.path="):
        built(compose, base, "selector=vas")


def test_a_selection_by_a_covariance(base: list[str], compose: Compose, tmp_path: Path) -> None:
    path = tmp_path / "S.npy"
    width = 8
    np.save(path, np.eye(width, dtype=np.float32))
    words = ["selector=vas", f"selector.covariance.path={path}", "features.name=noise"]
    settings = compose("select", _named("select", [*base, *words], ()))
    try:
        assert len(select_stage(settings).rows)
    except InputError as error:  # the features of the pool have a width of their own
        width = int(str(error).partition("the ")[2].split()[0])
        np.save(path, np.eye(width, dtype=np.float32))
        assert len(select_stage(settings).rows)
