"""The HTML report in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from siftclip.eval.significance.arm_model import ArmValues, fit_arms
from siftclip.eval.significance.arm_tests import compare_with_baseline
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.report import html, plot
from siftclip.trainer.compare.significance import ColumnTests
from siftclip.trainer.compare.tables import cost_rows

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


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


def test_page_has_no_scripts_and_asks_the_network_for_nothing(comparison: ArmComparison) -> None:
    page = html(comparison)
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=", page)
    assert "&lt;script&gt;alert(1)" in page


def test_costs_that_are_not_known_are_unknown(comparison: ArmComparison) -> None:
    comparison.runs.loc[0, "scoring_flops"] = np.nan  # one seed of the first arm
    header, first, second = cost_rows(comparison)
    place = header.index("scoring TFLOP")
    assert (first[place - 1], first[place], second[place]) == ("1", "unknown", "1")
    del comparison.runs["scoring_flops"]
    assert [row[place] for row in cost_rows(comparison)[1:]] == ["unknown", "unknown"]


def test_positions_on_the_axis(comparison: ArmComparison) -> None:
    picture = plot(comparison, "digit")
    assert (picture["low"], picture["high"]) == ("60", "75")
    random = picture["arms"][0]
    assert random["dots"] == pytest.approx([1 / 15, 3 / 15])
    assert random["mean"] == pytest.approx(2 / 15)
    results = comparison.results.copy()
    results["value"] = np.where(results["arm"] == comparison.arms[0], 0.65, 0.75)
    level = plot(replace(comparison, results=results), "digit")
    assert (level["low"], level["high"]) == ("65", "75")
    assert [arm["mean"] for arm in level["arms"]] == pytest.approx([0, 1])


@pytest.mark.skipif(BROWSER is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_browser_shows_the_report(comparison: ArmComparison, tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(html(comparison), encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    ).stdout
    assert dom.count("<circle") == 2 * 2 * 3  # plots x arms x (two seeds and a mean)
    assert "62.0 ± 1.4" in dom
    assert "98.0 %" in dom
    subprocess.run(
        [*command, f"--screenshot={picture}", "--window-size=1200,1600", page.as_uri()],
        capture_output=True,
        timeout=90,
        check=True,
    )
    assert picture.stat().st_size > 20_000
