"""The HTML report in a real browser."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import Browser

from siftclip.eval.significance.arm_model import ArmValues, fit_arms
from siftclip.eval.significance.arm_tests import compare_with_baseline
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.page.axes import linear_axis, ratio_axis
from siftclip.trainer.compare.page.curves import curve_frame, learning_charts, online_charts
from siftclip.trainer.compare.page.dots import difference_facets, mean_plot
from siftclip.trainer.compare.page.page import html
from siftclip.trainer.compare.significance import ColumnTests
from siftclip.trainer.compare.tables import cost_rows

SCREENSHOTS = "SIFTCLIP_TEST_SCREENSHOTS"  # a folder: screenshots are left there for a person


@pytest.fixture
def comparison() -> ArmComparison:
    values = {"random": (0.61, 0.63), "<script>alert(1)</script>": (0.70, 0.71)}
    records = [
        {"arm": arm, "seed": seed, "task": task, "metric": "main_metric", "value": value}
        for arm, own in values.items()
        for seed, value in enumerate(own)
        for task in ("average/on6", "digit")
    ]
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "run": f"outputs/train/{arm}-s{seed}",
            "selected_samples": 1000,
            "coverage": 0.98,
            "passes": 3.0,
            "train_seconds": 12.0,
            "trained_samples": 3000,
            "steps": 30,
            "online": "once",
            **{f"{name}_samples": 3000.0 for name in ("drawn", "loaded", "scored")},
            **{f"{name}_flops": 1e12 for name in ("training", "scoring")},
            **{
                f"{name}_seconds": 2.0
                for name in ("offline_selection", "data_wait", "scoring", "selection")
            },
        }
        for arm in values
        for seed in (0, 1)
    ]
    return ArmComparison(
        name="a comparison",
        arms=tuple(values),
        seeds=dict.fromkeys(values, (0, 1)),
        baseline="random",
        again=None,
        tests={
            task: ColumnTests(
                column=task,
                arms=tuple(values),
                tests=compare_with_baseline(
                    fit_arms([ArmValues(values=np.asarray(own)) for own in values.values()]), 0
                ),
                p_holm={},
            )
            for task in ("average/on6", "digit")
        },
        columns=("average/on6", "digit"),
        results=pd.DataFrame(records),
        runs=pd.DataFrame(runs),
        overlap=pd.DataFrame([[1.0, 0.2], [0.2, 1.0]], index=list(values), columns=list(values)),
        truth=None,
        settings={
            "scale": {"global_batch_size": 100},
            "budget": {"flops": None},
            "note": "</pre><script>alert(2)</script>",
        },
        environments={"a s0": [{"torch": "2.9"}]},
    )


def test_page_lets_nothing_in(comparison: ArmComparison) -> None:
    page = html(comparison)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;; img-src data:; style-src &#39;sha256-")
    assert "unsafe" not in policy[1]
    assert page.count("<script") == 1
    assert not re.search(r"\s(src|href)=[\"'](?!#|data:)", page)
    assert not re.search(r"<[^>]* (style|on[a-z]+)\s*=", page)
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(" not in page


def test_page_hides_credentials_and_what_a_terminal_obeys(comparison: ArmComparison) -> None:
    settings = {**comparison.settings, "pool": "s3://me:secret-word@host/x \x1b[31m \u202e"}
    page = html(replace(comparison, settings=settings), words=["pool.root=s3://me:secret-word@h/x"])
    assert "secret-word" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_costs_that_are_not_known_are_unknown(comparison: ArmComparison) -> None:
    comparison.runs.loc[0, "scoring_flops"] = np.nan  # one seed of the first arm
    header, first, second = cost_rows(comparison)
    place = header.index("scoring TFLOP")
    assert (first[place - 1], first[place], second[place]) == ("1", "unknown", "1")
    del comparison.runs["scoring_flops"]
    assert [row[place] for row in cost_rows(comparison)[1:]] == ["unknown", "unknown"]


def test_positions_on_the_axis(comparison: ArmComparison) -> None:
    plot = mean_plot(comparison, "digit")
    low, high = plot.axis.low, plot.axis.high
    assert low <= 61
    assert high >= 71
    random, other = (row.marks[0] for row in plot.rows)
    places = [100 * (value - low) / (high - low) for value in (61, 63)]
    assert random.seeds == pytest.approx(places, abs=0.01)
    assert random.at == pytest.approx(sum(places) / 2, abs=0.01)
    assert plot.line == random.at
    assert (random.low, random.high) == (None, None)
    tests = comparison.tests["digit"].tests
    assert tests is not None
    difference = tests.of(1)
    assert difference is not None
    assert difference.interval is not None
    ends = [100 * (100 * (0.62 + end) - low) / (high - low) for end in difference.interval]
    assert [other.low, other.high] == pytest.approx(np.clip(ends, 0, 100), abs=0.02)
    assert other.solid == difference.resolved


def test_differences_have_averages_on_top(comparison: ArmComparison) -> None:
    facets = difference_facets(comparison)
    assert facets is not None
    assert facets.arms == (comparison.arms[1],)
    assert [(row.label, row.is_group) for row in facets.rows] == [("on6", True), ("digit", False)]
    assert "8.5 points (95 % interval" in facets.rows[0].marks[0].text


def test_axes_have_round_numbers() -> None:
    assert [tick.text for tick in linear_axis([61.3, 68.9]).ticks] == [
        "60",
        "62",
        "64",
        "66",
        "68",
        "70",
    ]
    assert [tick.text for tick in linear_axis([0, 2.3e6]).ticks] == ["0", "1 M", "2 M", "3 M"]
    assert linear_axis([]).at(0.5) == 50
    assert linear_axis([5.0, 5.0]).low < 5.0 or linear_axis([5.0, 5.0]).high > 5.0
    ratios = ratio_axis([0.3, 1.0, 0.0, float("nan")])
    assert [tick.text for tick in ratios.ticks] == ["1/4", "1/2", "1", "2", "4"]
    assert ratios.at(1.0) == 50
    assert ratios.at(0.0) == 0


def test_curves_are_means_of_seeds_at_what_steps_have_cost(comparison: ArmComparison) -> None:
    arms = comparison.arms
    logs = {
        (arm, seed): [
            {
                "step": step,
                "train/loss": 5.0 - step / 10 + seed,
                "train/batch_time": 0.5,
                "cost/trained_samples": 100.0 * step,
                **({"online/share_junk": 0.25} if arm == "random" else {}),
            }
            for step in (2, 4)
        ]
        + [{"step": 3, "eval_during/digit": 0.5, "eval_during/seconds": 9.0}]
        for arm in arms
        for seed in (0, 1)
    }
    with_logs = replace(comparison, logs=logs)
    frame = curve_frame(with_logs)
    assert set(frame["metric"]) == {"train/loss", "online/share_junk", "eval_during/digit"}
    (row,) = (
        frame[(frame["metric"] == "eval_during/digit") & (frame["arm"] == "random")][
            ["step", "samples", "seconds"]
        ]
        .drop_duplicates()
        .to_dict("records")
    )
    assert row == {"step": 3, "samples": 300.0, "seconds": 1.5}
    loss, evaluated = learning_charts(with_logs, frame)
    assert [chart.against for chart in loss] == ["trained samples", "seconds of training"]
    assert "random: 5.1 at 400" in loss[0].summary  # mean of 4.6 and 5.6
    assert loss[0].lines[0].band
    assert "0.5 at 300" in evaluated[0].summary
    (chosen,) = online_charts(with_logs, frame)
    assert chosen.title == "share of junk"
    page = html(with_logs)
    assert page.count('class="curve') == 2 * 2 + 2 * 2 + 1


@pytest.fixture
def page(comparison: ArmComparison, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(html(comparison), encoding="utf-8")
    return path


def test_browser_shows_the_report(browser: Browser, page: Path) -> None:
    browser.requests.clear()
    browser.complaints.clear()
    seconds = browser.open(page)
    assert seconds < 10  # two on a machine that does nothing else
    assert browser.run("document.querySelectorAll('#results circle').length") == 2 * 2 * 3
    text = browser.run("document.body.innerText")
    assert "62.0 ± 1.4" in text
    assert "98.0 %" in text
    assert "70.5 ± 0.7 ★" in text
    assert browser.requests == []
    assert browser.complaints == []


def test_browser_sorts_and_searches(browser: Browser, page: Path) -> None:
    browser.open(page)
    cells = "[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[2].textContent)"
    click = "[...document.querySelectorAll('#runs thead button')][2].click()"
    assert browser.run(cells) == ["0", "1", "0", "1"]
    browser.run(click)
    assert browser.run(cells) == ["1", "1", "0", "0"]
    browser.run(click)
    assert browser.run(cells) == ["0", "0", "1", "1"]
    assert browser.run("document.querySelector('#runs [aria-sort]').ariaSort") == "ascending"
    browser.run(
        "const field = document.querySelector('[data-search=task-means]'); field.value = 'DIG';"
        "field.dispatchEvent(new Event('input'))"
    )
    rows = "document.querySelectorAll('#task-means tbody tr:not([hidden]) th')"
    shown = f"[...{rows}].map(head => head.textContent)"
    assert browser.run(shown) == ["digit"]
    assert browser.run("document.getElementById('task-means-count').textContent") == "1 of 2 shown"


def test_browser_has_themes_and_fits_a_phone(browser: Browser, page: Path) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.open(page, scheme="dark")
    dark = browser.run(colour)
    browser.open(page)
    assert browser.run(colour) != dark
    for _ in range(2):
        browser.run("document.getElementById('theme').click()")
    assert browser.run(colour) == dark
    browser.run("document.getElementById('theme').click()")  # the system's again
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            browser.open(page, width=width, scheme=scheme)
            assert browser.run("document.documentElement.scrollWidth") <= width
            if folder := os.environ.get(SCREENSHOTS):
                browser.screenshot(Path(folder) / f"report-{width}-{scheme}.png")
