from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.reports.comparison import compare_results
from siftclip.eval.results.files import MAIN_METRIC, TaskResult
from siftclip.eval.significance.paired_tests import compare_task, holm
from siftclip.tables import display_width

KEYS = ("birds", "cars", "dogs", "frogs")
GROUPS = {"all": [*KEYS], "wings": ["birds"]}


def make_result(key: str, hits: np.ndarray, model: str = "m", metric: str = "acc1") -> TaskResult:
    value = float(hits.mean())
    return TaskResult(
        key=key,
        dataset=key.title(),
        metrics={metric: value, "acc5": 0.9, MAIN_METRIC: value},
        main_metric_name=metric,
        samples=len(hits),
        interval=None,
        seconds=1.0,
        model=model,
        outcomes=Outcomes(statistic="mean", arrays={"value": hits.astype(np.float32)}),
        units=np.arange(len(hits), dtype=np.uint64) + np.uint64(1000 * KEYS.index(key)),
    )


def make_models(better: float, n: int = 300) -> tuple[list[TaskResult], list[TaskResult]]:
    """Two models that agree on most samples; b has `better` more of "birds" right."""
    rng = np.random.default_rng(5)
    a, b = [], []
    for key in KEYS:
        hits = rng.random(n) < 0.5
        other = np.where(rng.random(n) < 0.1, rng.random(n) < 0.5, hits)
        if key == "birds":
            other |= rng.random(n) < better
        a.append(make_result(key, hits, "a"))
        b.append(make_result(key, other, "b"))
    return a, b


def without_outcomes(result: TaskResult) -> TaskResult:
    return replace(result, outcomes=None, units=None)


def test_a_model_does_not_differ_from_itself() -> None:
    a, _ = make_models(0.0)
    found = compare_results(a, a, GROUPS, resamples=500)
    for one in (*found.tasks, *found.averages):
        assert one.test is not None
        assert one.value == 0
        assert one.p_holm == 1
        assert not one.significant
        assert one.test.interval == (0, 0)
    assert found.verdict()[0].startswith("tasks: 0 of 4 differences are significant")
    assert found.headline().startswith("Both are results of one model, whose weights are equal")
    assert "seed" not in one_line(found.table())


def test_models_that_are_equally_good_do_not_differ() -> None:
    a, b = make_models(0.0)
    found = compare_results(a, b, GROUPS, resamples=1000)
    assert any(one.value for one in found.tasks)
    assert not any(one.significant for one in (*found.tasks, *found.averages))


def test_a_planted_difference_is_found() -> None:
    a, b = make_models(0.5)
    found = compare_results(a, b[::-1], GROUPS, resamples=2000, seed=3)
    assert [one.key for one in found.tasks] == list(KEYS)
    assert [one.significant for one in found.tasks] == [True, False, False, False]
    assert [one.significant for one in found.averages] == [True, True]
    tests = [
        compare_task(x.outcomes, y.outcomes, x.units, y.units, resamples=2000, seed=3)
        for x, y in zip(a, b, strict=True)
        if x.outcomes and y.outcomes and x.units is not None and y.units is not None
    ]
    p_values = [test.p_value for test in tests if test.p_value is not None]
    assert [one.p_holm for one in found.tasks] == holm(p_values).tolist()
    of_averages = [one.test.p_value or 0 for one in found.averages if one.test is not None]
    assert [one.p_holm for one in found.averages] == holm(of_averages).tolist()
    record = found.records()[0]
    low, high = tests[0].interval or (0.0, 0.0)
    assert (record["low"], record["high"]) == (low, high)
    assert record["p_value"] == tests[0].p_value
    assert record["p_mcnemar"] == tests[0].mcnemar_p_value
    assert record["difference"] == record["value_b"] - record["value_a"] > 0.05
    assert low < record["difference"] < high
    text = " ".join(found.verdict())
    correction = "differences are significant at 5 % after Holm's correction"
    assert text.startswith(
        f"tasks: 1 of 4 {correction}, 1 for b and 0 for a model b is better on Birds "
    )
    assert (
        f"averages: 2 of 2 {correction}, 2 for b and 0 for a model b is better on all, wings "
        in text
    )
    assert "resampling the test images 2,000 times; so it is never below 0.001, nor" in " ".join(
        text.split()
    )
    assert "train several seeds of each (siftclip compare)" in " ".join(text.split())
    worse = compare_results(b, a, GROUPS, resamples=2000, seed=3)
    assert "0 for b and 1 for a model a is better on Birds " in " ".join(worse.verdict())
    assert "shown to be better" not in text
    assert worse.tasks[0].value == -(found.tasks[0].value or 0)


def test_an_average_is_over_the_tasks_that_can_be_compared() -> None:
    a, b = make_models(0.2)
    assert b[1].outcomes is not None
    assert b[1].units is not None
    b[1] = replace(b[1], units=b[1].units + np.uint64(1))  # another test set
    b[2] = replace(b[2], metrics={MAIN_METRIC: None, "acc1": None})
    found = compare_results(a, [*b[:3]], {"all": KEYS, "top": ["birds:acc5"]}, resamples=100)
    average, top = found.averages
    assert (average.key, average.note) == ("average/all (partial)", "1 of 4")
    assert average.value == found.tasks[0].value
    assert average.test is not None
    assert found.tasks[0].test is not None
    assert average.test.p_value == found.tasks[0].test.p_value
    assert (top.value, top.test, top.note) == (0, None, "1 of 1")
    assert found.only_a == ("frogs",)
    assert found.only_b == ()
    shared = compare_results(a, b[:3], {"frogs": ["frogs:acc5"], "some": ["dogs"]}, resamples=10)
    assert [one.title for one in shared.averages] == ["some (partial)"]  # dogs cannot be compared
    without = compare_results(a, b[:1], {"frogs": ["frogs"]}, resamples=100)
    assert without.averages == ()
    assert "average" not in without.table().replace("or of averages", "")
    assert [one.value is None for one in found.tasks] == [False, True, True]


def test_a_metric_that_one_model_lacks_is_in_neither_average() -> None:
    a, b = make_models(0.0, n=20)
    b[0] = replace(b[0], metrics={**b[0].metrics, "acc5": None})
    del a[1].metrics["acc5"]
    groups = {"top": [f"{key}:acc5" for key in KEYS]}
    for first, second in ((a, b), (b, a)):
        (top,) = compare_results(first, second, groups, resamples=10).averages
        assert (top.key, top.note, top.value) == ("average/top (partial)", "2 of 4", 0)
        assert (top.value_a, top.value_b) == (0.9, 0.9)


def test_what_cannot_be_tested_is_reported() -> None:
    a, b = make_models(0.2)
    b[0] = without_outcomes(b[0])
    b[1] = replace(b[1], units=np.arange(300, dtype=np.uint64))
    b[2] = replace(make_result("dogs", np.ones(300), metric="mean_per_class_recall"))
    b[3] = without_outcomes(replace(b[3], samples=299))
    found = compare_results(a, b, GROUPS, resamples=100)
    assert [one.comparable for one in found.tasks] == [True, False, False, False]
    assert all(one.test is None for one in found.tasks)
    assert found.tasks[0].value is not None
    assert "on the same units. 600 of 300 + 300 are in one" in found.tasks[1].note
    assert found.tasks[2].note == "the main metrics differ: acc1 and mean_per_class_recall"
    assert found.tasks[3].note == "the test sets differ: 300 and 299 samples"
    text = found.table()
    assert "not tested: birds: what the metric is made of is not kept for both models" in text
    assert "tasks: no difference was tested" in text
    of_other_tool = replace(b[0], main_metric_name=MAIN_METRIC, samples=0)
    assert compare_results(a, [of_other_tool], {}).tasks[0].comparable


def test_tasks_without_main_metric_are_no_fault() -> None:
    faces = replace(
        without_outcomes(make_models(0)[0][0]), metrics={MAIN_METRIC: None}, main_metric_name=None
    )
    found = compare_results([faces], [faces], {})
    assert (found.tasks[0].value, found.tasks[0].note) == (None, "")


TABLE = r"""
a = first
b = second\n
This compares two models, not the two methods that made them: one seed of each, so there is no
  estimate of the variance between seeds (seeds_a and seeds_b name other seeds).

task                  a       b    b - a  95 % interval        Holm p       p   McNemar
Custom tasks
  Birds          0.2500  0.7500  +0.5000  -                        -        -         -
  Cars           0.5000  0.5000  +0.0000  [+0.0000, +0.0000]  1.0000   1.0000    1.0000

average               a       b    b - a  95 % interval        Holm p       p     tasks
  all (partial)  0.3750  0.6250  +0.2500  -                        -        -    2 of 3

only in a: dogs
only in b: frogs
not tested: birds: what the metric is made of is not kept for both models
tasks: 0 of 1 differences are significant at 5 % after Holm's correction, 0 for b and 0 for a
Neither model is shown to be better, which may be noise, or too few images.
averages: no difference was tested
p: how often models that are equally good would differ by as much, by resampling the test images 100
  times; so it is never below 0.02, nor below McNemar's. Holm p: p corrected for the number of
  tasks, or of averages; go by this one, * marks those of at most 0.05. McNemar: an exact p value
  from the images that one model only has right, for accuracies; rows that share an image count
  together; not corrected.
This is about these two models on other test images of the same kind, not about the methods that
  made them: another seed of training moves the values too. To compare methods, train several seeds
  of each (siftclip compare).
""".strip()


def test_table() -> None:
    a = [
        make_result("birds", np.array([1, 0, 0, 0])),
        make_result("cars", np.array([1, 0])),
        make_result("dogs", np.array([1, 0])),
    ]
    b = [
        without_outcomes(make_result("birds", np.array([1, 1, 1, 0]), "b")),
        make_result("cars", np.array([1, 0]), "b"),
        make_result("frogs", np.array([1, 0]), "b"),
    ]
    groups = {"all": ["birds", "cars", "dogs"]}
    found = compare_results(a, b, groups, name_a="first", name_b="second\n", resamples=100)
    assert found.table() == TABLE


def make_seeds(count: int, better: float = 0.0, spread: float = 0.05) -> list[list[TaskResult]]:
    """Runs of one method: seeds move the accuracy on each task."""
    rng = np.random.default_rng(count)
    runs = []
    for number in range(count):
        shares = np.clip(0.5 + better + spread * rng.standard_normal(len(KEYS)), 0, 1)
        runs.append(
            [
                make_result(key, rng.random(300) < p, f"seed {number}")
                for key, p in zip(KEYS, shares, strict=True)
            ]
        )
    return runs


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_headline_says_that_models_are_compared() -> None:
    a, b = make_models(0.5)
    alone = compare_results(a, b, GROUPS, resamples=200)
    assert alone.headline().startswith("This compares two models, not the two methods")
    assert "no estimate of the variance between seeds" in alone.headline()
    record = alone.records()[0]
    assert (record["seeds_a"], record["seed_sd"], record["p_seeds"]) == (1, None, None)
    others = make_seeds(3)
    some = compare_results(a, b, GROUPS, resamples=200, seeds_a=others[:2])
    text = one_line(some.table())
    assert "Seeds alone: two runs of one method differ by 0.0" in text
    assert "(3 seeds of a's method, 1 of b's)" in text
    assert some.records()[0]["seed_sd"] > 0
    assert some.records()[0]["p_value"] == alone.records()[0]["p_value"]
    assert "nothing can be said at 5 %" in text  # 1 / 4
    whole = {key: np.mean([run[0].main_metric for run in [a, *others[:2]]]) for key in ["birds"]}
    assert some.records()[0]["mean_a"] == pytest.approx(whole["birds"])


def test_two_seeds_of_one_method() -> None:
    a, b, *others = make_seeds(5, spread=0.2)
    found = compare_results(a, b, GROUPS, resamples=500, seeds_a=others, same_method=True)
    assert any(one.significant for one in found.tasks)  # they are different models
    text = one_line(found.table())
    assert "These are two seeds of one method: whatever differs is the doing of the seed" in text
    assert "(5 seeds)" in text
    assert "methods, by" not in text
    assert all(one.p_value is None for one in (found.seeds.tasks if found.seeds else ()))


def test_methods_are_tested_by_their_seeds() -> None:
    runs_a, runs_b = make_seeds(8), make_seeds(9, better=0.2)[:8]
    found = compare_results(
        runs_a[0], runs_b[0], GROUPS, resamples=200, seeds_a=runs_a[1:], seeds_b=runs_b[1:]
    )
    text = one_line(found.table())
    assert "methods, by 8 seeds of a's and 8 of b's: 4 of 4 differences of tasks are" in text
    assert "b's method is better on Birds, Cars, Dogs, Frogs" in text
    assert "b's method is better on all, wings" in text
    by_key = {record["task"]: record for record in found.records()}
    average = by_key["average/all"]
    assert (average["seeds_a"], average["seeds_b"]) == (8, 8)
    assert average["mean_b"] - average["mean_a"] == pytest.approx(0.2, abs=0.05)
    assert average["p_seeds"] < 0.001
    assert len(found.table().splitlines()[-1]) <= 100


def test_differences_that_seeds_alone_make_are_named() -> None:
    runs_a, runs_b = make_seeds(4, spread=0.15), make_seeds(5, spread=0.15)
    found = compare_results(
        runs_a[0], runs_b[0], {}, resamples=2000, seeds_a=runs_a[1:], seeds_b=runs_b[1:4]
    )
    named = [one for one in found.tasks if one.significant]
    assert named
    text = one_line(found.table())
    start = "no larger than what another seed of the same method makes (95 %): "
    assert start + ", ".join(one.title for one in named) in text
    assert "which is not small enough for 4 tests" in text  # 2 / 70 of 4 + 4 seeds


def test_a_method_is_compared_where_its_seeds_have_the_same_task() -> None:
    a, b = make_models(0.0)
    others = make_seeds(2)
    others[0][0] = replace(others[0][0], samples=7)
    others[0][1] = replace(others[0][1], metrics={MAIN_METRIC: None})
    del others[1][2]
    found = compare_results(
        a, b, {"all": KEYS, "top": ["birds:acc5"]}, resamples=50, seeds_a=others
    )
    assert found.seeds is not None
    counts = {one.key: len(one.values_a) for one in found.seeds.by_key.values()}
    assert counts == {
        "birds": 2, "cars": 2, "dogs": 2, "frogs": 3, "average/all": 1, "average/top": 2,
    }  # fmt: skip


def test_tables_are_narrow() -> None:
    a, b = make_models(0.2, n=40)
    long = {"x" * 200: [*KEYS], "partial" * 9: [*KEYS, "more"]}
    a, b = ([replace(one, dataset="狗\x1b" * 50 + one.key) for one in each] for each in (a, b))
    text = compare_results(a, b, long, resamples=200).table()
    assert max(map(display_width, text.splitlines())) <= 100
    assert text.replace("\n", "").isprintable()
    assert all(f"{key} " in text for key in KEYS)  # cut names keep their ends


def test_too_few_resamples_for_the_number_of_tests_are_pointed_out() -> None:
    def verdict(resamples: int) -> str:
        a, b = make_models(0.9, n=60)
        return " ".join(compare_results(a, b, {}, resamples=resamples).verdict())

    assert "no p value is small enough for 4 tests" in verdict(158)  # 4 * 2 / 159 > 5 %
    assert "small enough" not in verdict(159)
    assert "1 of 4" in verdict(159)
    assert "0 of 4" in verdict(158)


def test_many_names_are_shortened() -> None:
    rng = np.random.default_rng(0)
    a, b = [], []
    for i in range(15):
        hits = rng.random(200) < 0.2
        one = make_result("birds", hits)
        a.append(replace(one, key=f"t{i}", dataset=f"t{i}"))
        more = make_result("birds", hits | (rng.random(200) < 0.5))
        b.append(replace(more, key=f"t{i}", dataset=f"t{i}"))
    found = compare_results(a, b, {}, resamples=2000)
    text = " ".join(" ".join(found.verdict()).split())
    assert "15 for b and 0 for a model b is better on t0, t1, " in text
    assert "t10, t11 and 3 more " in text


@pytest.mark.parametrize("columns", [60, 80, 91, 92, 200])
def test_a_narrow_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_models(0.5, n=40)
    a, b = ([replace(one, dataset=one.key * 20 + one.key) for one in each] for each in (a, b))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    seeds = {f"seeds_{name}": make_seeds(3) for name in "ab"}
    text = compare_results(a, b, GROUPS, resamples=200, **seeds).table()  # type: ignore[arg-type]
    assert max(map(display_width, text.splitlines())) <= min(100, max(72, columns))
    assert "method of b" in text
    header = next(line for line in text.splitlines() if line.startswith("task"))
    assert "Holm p" in header
    assert ("McNemar" in header) == (columns >= 92) == ("in a wider terminal" not in text)
    assert all(f"{key} " in text for key in KEYS)


def test_nothing_in_common() -> None:
    a, b = make_models(0.0, n=5)
    with pytest.raises(InputError, match=r"at least one task in common .*has birds; .*has cars\."):
        compare_results(a[:1], b[1:2], GROUPS, resamples=10)
    with pytest.raises(InputError, match="'birds' has two"):
        compare_results([a[0], a[0]], b, {})
