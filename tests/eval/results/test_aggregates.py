from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.eval.results.aggregates import Average, averages, check_groups, named_values
from siftclip.eval.tasks.known_tasks import KNOWN_TASKS

TABLE = Path(__file__).parents[3].parent / "shared" / "reference" / "openclip_results.csv"

# OpenAI's ViT-B-32 in open_clip's table, in the order of KNOWN_TASKS with a main metric.
VIT_B_32 = [
    0.6332, 0.4229, 0.5592, 0.3155, 0.4775, 0.6933, 0.4431,
    0.8758, 0.6423, 0.2320, 0.2335, 0.4436, 0.5044, 0.6670, 0.2743, 0.6224, 0.8700, 0.5362, 0.3159,
    0.6248, 0.6884, 0.4028, 0.4125, 0.0732, 0.6061, 0.1676, 0.5386, 0.8217,
    0.8983, 0.1720, 0.1953, 0.8400, 0.3258, 0.4839, 0.7640, 0.5865, 0.5963, 0.9713,
]  # fmt: skip
AVERAGED = [key for key, task in KNOWN_TASKS.items() if task.main_metric is not None]
GROUPS = {
    "imagenet1k": ["imagenet1k"],
    **{
        family: [key for key in AVERAGED if KNOWN_TASKS[key].family == family]
        for family in ("imagenet_shifts", "vtab", "retrieval")
    },
    "datacomp_38": AVERAGED,
}
# ImageNet, shifts, VTAB, retrieval, average, as published and as recomputed with these groups.
PUBLISHED = {
    ("ViT-B-32", "openai"): (0.633, 0.485, 0.526, 0.501, 0.524),
    ("ViT-B-16", "openai"): (0.683, 0.559, 0.546, 0.527, 0.563),
    ("ViT-L-14", "openai"): (0.755, 0.649, 0.586, 0.543, 0.617),
    ("ViT-B-32", "commonpool_s_s13m_b4k"): (0.027, 0.037, 0.158, 0.117, 0.142),
    ("ViT-B-32", "commonpool_s_basic_s13m_b4k"): (0.038, 0.043, 0.150, 0.118, 0.142),
    ("ViT-B-32", "commonpool_s_text_s13m_b4k"): (0.046, 0.052, 0.169, 0.125, 0.157),
    ("ViT-B-32", "commonpool_s_laion_s13m_b4k"): (0.030, 0.040, 0.136, 0.092, 0.133),
    ("ViT-B-32", "commonpool_s_clip_s13m_b4k"): (0.051, 0.055, 0.190, 0.119, 0.173),
    ("ViT-B-32", "datacomp_s_s13m_b4k"): (0.039, 0.045, 0.162, 0.094, 0.145),
    ("ViT-B-32", "commonpool_m_s128m_b4k"): (0.175, 0.152, 0.259, 0.219, 0.258),
    ("ViT-B-32", "commonpool_m_clip_s128m_b4k"): (0.273, 0.230, 0.338, 0.251, 0.328),
    ("ViT-B-32", "datacomp_m_s128m_b4k"): (0.297, 0.239, 0.346, 0.231, 0.328),
    ("ViT-B-16", "commonpool_l_s1b_b8k"): (0.459, 0.378, 0.426, 0.419, 0.437),
    ("ViT-B-16", "commonpool_l_clip_s1b_b8k"): (0.578, 0.474, 0.538, 0.466, 0.529),
    ("ViT-B-16", "datacomp_l_s1b_b8k"): (0.631, 0.508, 0.546, 0.498, 0.537),
    ("ViT-L-14", "commonpool_xl_s13b_b90k"): (0.723, 0.612, 0.611, 0.569, 0.621),
    ("ViT-L-14", "commonpool_xl_laion_s13b_b90k"): (0.754, 0.637, 0.624, 0.620, 0.636),
    ("ViT-L-14", "commonpool_xl_clip_s13b_b90k"): (0.764, 0.655, 0.643, 0.588, 0.650),
    ("ViT-L-14", "datacomp_xl_s13b_b90k"): (0.792, 0.679, 0.652, 0.608, 0.663),
}


def means_of(values: dict[str, float | None]) -> tuple[float | None, ...]:
    results = averages(values, GROUPS)
    assert all(result.complete for result in results.values())
    return tuple(result.value for result in results.values())


def test_openai_vit_b_32() -> None:
    expected = pytest.approx((0.633, 0.485, 0.526, 0.501, 0.524), abs=5.1e-4)
    assert means_of(dict(zip(AVERAGED, VIT_B_32, strict=True))) == expected


@pytest.mark.testbed
def test_every_model_of_the_public_table() -> None:
    if not TABLE.is_file():
        pytest.skip(f"{TABLE} is not on this machine")
    table = pd.read_csv(TABLE)
    titles = [KNOWN_TASKS[key].title for key in AVERAGED]
    assert sorted(titles) == sorted(table.columns[5:])
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    assert len(records) == 121
    by_model = {}
    for row in records:
        means = means_of({key: row[KNOWN_TASKS[key].title] for key in AVERAGED})
        # to 5e-5, and what the rounding of the 38 columns themselves adds: up to 3e-6 here
        assert means[-1] == pytest.approx(row["Average perf. on 38 datasets"], abs=5.3e-5)
        by_model[row["name"], row["pretrained"]] = means
    for model, expected in PUBLISHED.items():
        assert by_model[model] == pytest.approx(expected, abs=5.1e-4), model


def test_partial_averages() -> None:
    groups = {"both": ["a", "b"], "one": ["a", "x"], "none": ["x", "undefined", "nan"]}
    values = {"a": 0.2, "b": 0.4, "undefined": None, "nan": math.nan}
    both, one, none = averages(values, groups).values()
    assert both.value == pytest.approx(0.3)
    assert (both.complete, both.partial, both.text()) == (True, False, "0.3000")
    assert one == Average(name="one", value=0.2, present=("a",), missing=("x",))
    assert (one.complete, one.partial) == (False, True)
    assert one.text() == "0.2000 (partial: 1 of 2 tasks)"
    assert (none.value, none.missing) == (None, ("x", "undefined", "nan"))
    assert none.text() == "- (partial: 0 of 3 tasks)"
    named = named_values(averages(values, groups))
    assert named == {"both": both.value, "one (partial)": 0.2, "none (partial)": None}


def test_members_with_another_metric() -> None:
    metrics: dict[str, dict[str, float | None]] = {
        "a": {"acc1": 0.2, "acc5": None, "f1": math.nan},
        "b": {"acc1": 0.4, "recall": 0.9},
    }
    groups = {"other": ["a", "b:recall", "b"], "missing": ["c:recall", "a:acc5", "a:f1", "b:acc1"]}
    other, missing = averages({"a": 0.2, "b": 0.4}, groups, metrics=metrics).values()
    assert other.value == pytest.approx(0.5)
    assert other.present == ("a", "b:recall", "b")
    assert missing.missing == ("c:recall", "a:acc5", "a:f1")
    assert missing.value == 0.4


def test_refused_groups() -> None:
    with pytest.raises(InputError, match=r"groups\.on6 must name at least one"):
        averages({}, {"on6": []})
    with pytest.raises(
        InputError,
        match=r"groups\.g must not ask for a metric .* Got 'a:recal'. It has \['acc1', 'acc5'\]",
    ):
        averages({}, {"g": ["a:recal"]}, metrics={"a": {"acc5": 0.2, "acc1": 0.1}})
    with pytest.raises(InputError, match=r"do not end with ' \(partial\)'"):
        averages({"a": 1.0}, {"vtab (partial)": ["a"]})


def test_one_member_may_stand_without_a_list() -> None:
    groups: Any = {"g": "mnist"}
    assert averages({"mnist": 0.5}, groups)["g"].present == ("mnist",)
    wrong: Any
    for wrong in (3, None, [3], {"mnist": 1}):
        with pytest.raises(InputError, match=r"^groups\.g must be a name, or a list of names"):
            averages({"mnist": 0.5}, {"g": wrong})
    for wrong in (3, None, ["mnist"], "mnist"):
        with pytest.raises(InputError, match=r"^groups must be names of averages"):
            averages({}, wrong)
    wrong = {5: ["mnist"]}
    with pytest.raises(InputError, match=r"must have names that are texts. Got 5"):
        averages({}, wrong)


def test_members_that_nobody_knows_are_refused() -> None:
    known = ["birds", "cats"]
    groups = {
        "g": ["birds:acc5", "linear_probe/birds"],
        "h": ["vtab/dtd", "mnist:acc1", "few_shot_16/cats:acc1_sd", "linear_probe/vtab/dtd"],
    }
    check_groups(groups, known, suite=False)
    with pytest.raises(InputError, match=r"^groups\.g .* Got 'bird:acc1'. Did you mean 'birds'"):
        check_groups({"g": ["bird:acc1"]}, known, suite=False)
    with pytest.raises(InputError, match=r"Got 'xyz'. There are \['birds', 'cats'"):
        check_groups({**groups, "i": ["birds", "xyz"]}, known, suite=False)
    with pytest.raises(InputError, match=r"Got 'linear_probe/bird'. Did you mean 'birds'"):
        check_groups({"g": ["linear_probe/bird"]}, known, suite=False)
    check_groups({"g": ["bird"]}, known, suite=True)
    with pytest.raises(InputError, match=r"groups\.g must name at least one"):
        check_groups({"g": []}, known, suite=True)


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.none() | st.floats(0, 1) | st.just(math.nan)),
    st.lists(st.sampled_from("abcdefghij"), min_size=1, unique=True),
)
def test_against_a_loop(values: dict[str, float | None], members: list[str]) -> None:
    result = averages(values, {"g": members})["g"]
    total, count = 0.0, 0
    for member in members:
        value = values.get(member)
        if value is not None and value == value:
            total, count = total + value, count + 1
    assert len(result.present) == count
    assert sorted(result.present + result.missing) == sorted(members)
    assert result.value == (pytest.approx(total / count, abs=1e-12) if count else None)
    (name,) = named_values({"g": result})
    assert (name == "g") == result.complete == ("partial" not in result.text())
