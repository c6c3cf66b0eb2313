from __future__ import annotations

import functools
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from siftclip.eval.tasks.known_tasks import KNOWN_TASKS, known_task
from siftclip.trainer.settings.store import composing

ROOT = Path(__file__).parents[3]
TABLE = ROOT.parent / "shared" / "reference" / "openclip_results.csv"
SUITES = ("datacomp", "vtab", "imagenet_shifts", "retrieval", "stable", "fast")
AVERAGED = [key for key, task in KNOWN_TASKS.items() if task.main_metric is not None]


def of_family(family: str) -> list[str]:
    return [key for key, task in KNOWN_TASKS.items() if task.family == family]


# ---- the table ----------------------------------------------------------------------------------
def test_counts() -> None:
    assert len(KNOWN_TASKS) == 40
    assert len(AVERAGED) == 38
    assert Counter(task.family for task in KNOWN_TASKS.values()) == {
        "imagenet": 1, "imagenet_shifts": 6, "vtab": 13, "retrieval": 3,
        "wilds": 3, "fairness": 4, "other": 10,
    }  # fmt: skip
    assert sum(task.samples for task in KNOWN_TASKS.values()) == 732_026
    assert len({task.title for task in KNOWN_TASKS.values()}) == 40
    assert len({task.repository for task in KNOWN_TASKS.values()}) == 40


def test_main_metrics() -> None:
    others = {k: t.main_metric for k, t in KNOWN_TASKS.items() if t.main_metric != "acc1"}
    assert others == {
        **dict.fromkeys(
            ["vtab/caltech101", "vtab/flowers", "vtab/pets", "fgvc_aircraft"],
            "mean_per_class_recall",
        ),
        "retrieval/flickr_1k_test_image_text_retrieval": "mean_recall@1",
        "retrieval/mscoco_2014_5k_test_image_text_retrieval": "mean_recall@1",
        "misc/winogavil": "jaccard_score_10-12",
        "wilds/iwildcam": "F1-macro_all",
        "wilds/fmow": "acc_worst_region",
        "fairness/dollar_street": "acc_top5_wg",
        "fairness/geode": "acc_wg",
        "fairness/fairface": None,
        "fairness/utkface": None,
    }
    specials = {key: task.special for key, task in KNOWN_TASKS.items() if task.special}
    assert specials == {
        "wilds/iwildcam": "iwildcam", "wilds/camelyon17": "camelyon17", "wilds/fmow": "fmow",
        "fairness/dollar_street": "dollar_street", "fairness/geode": "geode",
        "fairness/fairface": "faces", "fairness/utkface": "faces",
    }  # fmt: skip


def test_rows_make_sense() -> None:
    for key, task in KNOWN_TASKS.items():
        assert key == task.key
        if task.kind == "classification" and task.special != "faces":
            assert task.classes is not None
            assert 2 <= task.classes <= task.samples
        else:
            assert task.classes is None
        if task.chance is not None and task.classes is not None:
            # by frequency of the classes: at least as good as uniform, but for its rounding
            assert 1 / task.classes - 1e-6 <= task.chance <= 0.6
        if task.main_metric == "mean_per_class_recall":
            assert task.classes is not None
            assert task.chance == pytest.approx(1 / task.classes, abs=1e-6)


@pytest.mark.parametrize(
    ("key", "folder"),
    [("vtab/dtd", "wds_vtab-dtd_test"), ("imagenet-a", "wds_imagenet-a_test"),
     ("wilds/fmow", "wds_wilds-fmow_test"), ("fairness/geode", "wds_geode_test"),
     ("retrieval/mscoco_2014_5k_test_image_text_retrieval",
      "wds_retrieval-mscoco_2014_5k_test_image_text_retrieval_test")],
)  # fmt: skip
def test_folders(key: str, folder: str) -> None:
    task = KNOWN_TASKS[key]
    assert task.folder == folder
    owner = "nlphuji" if key.startswith("retrieval") else "djghosh"
    assert task.repository.startswith(f"{owner}/")
    assert task.kind == "retrieval" or task.repository == f"djghosh/{folder}"


def test_known_task_by_all_its_names() -> None:
    for key, task in KNOWN_TASKS.items():
        bare = key.replace("/", "-")
        names = [key, bare, f"wds_{bare}", f"wds_{bare}_test", task.folder]
        names += [name.replace("fairness-", "") for name in names]
        assert all(known_task(name) is task for name in names), names


@pytest.mark.parametrize("name", ["", "wds_", "wds__test", "dtd", "wds_vtab_dtd", "imagenet", "my"])
def test_unknown_names(name: str) -> None:
    assert known_task(name) is None


# ---- the suites ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def suite() -> Iterator[Any]:
    """`suite(name, *overrides)`: the plain node `eval`; a command's whole tree takes too long."""

    @functools.cache
    def load(name: str, *overrides: str) -> dict[str, Any]:
        node = OmegaConf.to_container(compose(f"eval/{name}", list(overrides)), resolve=True)
        assert isinstance(node, dict)
        return {str(key): value for key, value in node["eval"].items()}

    GlobalHydra.instance().clear()
    with composing():
        yield load
    GlobalHydra.instance().clear()


def test_a_suite_in_the_tree_of_a_command(suite: Any) -> None:
    config = compose("eval", ["eval=datacomp", "model.name=ViT-B-32"])
    assert OmegaConf.to_container(config.eval, resolve=True) == suite("datacomp")


def test_suites_agree_with_the_table(suite: Any) -> None:
    families = {family: of_family(family) for family in ("imagenet_shifts", "vtab", "retrieval")}
    groups = {"imagenet1k": ["imagenet1k"], **families, "datacomp_38": AVERAGED}
    datacomp = suite("datacomp")
    assert sorted(datacomp["tasks"]) == sorted(KNOWN_TASKS)
    for name in ("stable", "fast"):
        (groups[name],) = suite(name)["groups"].values()
    assert datacomp["during"]["tasks"] == groups["fast"]
    assert {name: sorted(members) for name, members in datacomp["groups"].items()} == {
        name: sorted(members) for name, members in groups.items()
    }
    for name in ("vtab", "retrieval"):
        assert suite(name)["groups"] == {name: suite(name)["tasks"]}
        assert sorted(suite(name)["tasks"]) == sorted(families[name])
    shifts = suite("imagenet_shifts")
    assert shifts["tasks"] == ["imagenet1k", *shifts["groups"]["imagenet_shifts"]]
    assert sorted(shifts["groups"]) == ["imagenet1k", "imagenet_shifts"]


@pytest.mark.parametrize("name", SUITES)
def test_every_suite(suite: Any, name: str) -> None:
    node = suite(name)
    assert node["suite"] == name
    assert (node["root"], node["batch_size"]) == (None, 256)  # of the default, which it extends
    assert len(set(node["tasks"])) == len(node["tasks"])
    assert set(node["tasks"]) <= set(KNOWN_TASKS)
    for members in node["groups"].values():
        assert len(set(members)) == len(members)
        assert set(members) <= set(node["tasks"]) & set(AVERAGED)


@pytest.mark.parametrize("name", SUITES)
def test_fewer_tasks_do_not_shorten_the_averages(suite: Any, name: str) -> None:
    shortened = suite(name, "eval.tasks=[vtab/dtd]")
    assert shortened["tasks"] == ["vtab/dtd"]
    assert shortened["groups"] == suite(name)["groups"]


# ---- the choice of stable and fast --------------------------------------------------------------
@pytest.fixture(scope="module")
def choice() -> Iterator[ModuleType]:
    path = ROOT / "benchmarks" / "tools" / "suite_choice.py"
    spec = importlib.util.spec_from_file_location("suite_choice", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("suite_choice", None)


@pytest.mark.testbed
def test_stable_and_fast_follow_their_rules(suite: Any, choice: ModuleType) -> None:
    if not TABLE.is_file():
        pytest.skip(f"{TABLE} is not on this machine")
    models = choice.read_models(TABLE)
    tasks = choice.measure_tasks(models)
    stable = list(tasks.index[tasks["stable"]])
    assert sorted(stable) == sorted(suite("stable")["tasks"])
    _, fast = choice.choose_fast(models, choice.seen_early(models, stable))[0]
    assert sorted(fast) == sorted(suite("fast")["tasks"])
    text = (ROOT / "docs" / "evaluation_suites.md").read_text(encoding="utf-8")
    for line in choice.task_table(tasks, fast).splitlines():
        assert line in text
    rows = choice.mean_table(models, tasks, {"stable": stable, "fast": fast}).splitlines()
    assert all(line in text for line in rows)


def test_the_file_is_read_by_titles(choice: ModuleType, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).random((3, 38))
    table = pd.DataFrame(numbers, columns=[KNOWN_TASKS[key].title for key in AVERAGED][::-1])
    table.insert(0, "name", ["a", "b", "c"])
    table.insert(1, "pretrained", ["x", "x", "y"])
    table.insert(2, "Average perf. on 38 datasets", 0.5)
    twice = pd.concat([table, table.iloc[1:2].assign(name="the same")])
    twice.to_csv(tmp_path / "table.csv", index=False)
    models = choice.read_models(tmp_path / "table.csv")
    assert list(models.index) == [("a", "x"), ("b", "x"), ("c", "y")]
    assert list(models) == AVERAGED
    assert np.array_equal(models.to_numpy(), numbers[:, ::-1])


def test_measures_of_the_choice(choice: ModuleType) -> None:
    half = pd.Series([0.5, 0.5], name="vtab/kitti_closest_vehicle_distance")
    assert choice.sampling_error(half) == pytest.approx(0.5 / np.sqrt(711))
    assert choice.sampling_error(half.rename("wilds/fmow")) == 0.25  # four images
    assert np.isnan(choice.sampling_error(half.rename("wilds/iwildcam")))
    generator = np.random.default_rng(1)
    x, y = generator.random(9), generator.random(9)
    missed = []
    for i in range(9):
        others = np.arange(9) != i
        missed.append(y[i] - np.polyval(np.polyfit(x[others], y[others], 1), x[i]))
    expected = np.sqrt(np.mean(np.square(missed)))
    assert choice.leave_one_out_error(x, y) == pytest.approx(expected, rel=1e-9)
    index = pd.MultiIndex.from_tuples([("m", "l_e31"), ("m", "l_e32"), ("n", "l_e32"), ("o", "z")])
    frame = pd.DataFrame({"cars": [0.3, 0.4, 0.9, 0.1]}, index=index)
    assert choice.consecutive_epochs(frame)["cars"] == pytest.approx(0.1 / np.sqrt(2))
