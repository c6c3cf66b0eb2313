"""The guide to Siftclip from Python, executed from top to bottom as a notebook."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from tiny_runs import VIT_TINY

from siftclip.trainer.demo.pool import DemoData, write_demo_data

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What is too large for a test machine, and what stands in for it.
SMALLER = (
    ('"ViT-B-32", "openai"', "teacher"),
    ('{"name": "ViT-B-32", "options": {"force_patch_dropout": 0.5}}', "tiny"),
    ('"ViT-B-32"', "tiny"),
    ("samples_seen=128_000_000", "**small"),
    ("samples_seen=12_800_000", "**small"),
    ("    global_batch_size=4096,\n", ""),
    ('trainer={"devices": 8, "precision": "bf16-mixed"}', 'trainer={"accelerator": "cpu"}'),
    ("seeds=[0, 1, 2]", "seeds=[0]"),
)
SETUP = """
tiny = {tiny!r}
teacher = {teacher!r}
small = {{"samples_seen": 64, "global_batch_size": 16, "logger": "csv"}}
"""


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    sizes = {"classification_samples": 20, "count_samples": 10, "retrieval_samples": 10}
    root = tmp_path_factory.mktemp("guide")
    return write_demo_data(root, pool_samples=120, teacher_samples=20, progress=False, **sizes)


def executed(codes: list[str], data: DemoData, teacher: Path, folder: Path) -> list[Any]:
    """Run cells in a new kernel, and return the last output of each as it shows it."""
    cells = [SETUP.format(tiny=VIT_TINY, teacher=str(teacher))]
    for code in codes:
        code = code.replace("/data/pool", str(data.pool)).replace("/data/tasks", str(data.tasks))
        for large, small in SMALLER:
            code = code.replace(large, small)
        cells.append(code)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(folder)}}).execute()
    return [
        next((out["data"] for out in reversed(cell.outputs) if "data" in out), None)
        for cell in notebook.cells[1:]
    ]


@pytest.mark.slow
def test_the_guide_runs_as_a_notebook(data: DemoData, model_folder: Path, tmp_path: Path) -> None:
    arrays = "images, texts = features.arrays()"
    codes = blocks(GUIDE)
    assert len(codes) == 5
    shown = executed([*codes[:4], arrays, codes[4]], data, model_folder, tmp_path)
    assert "<table" in shown[0]["text/html"]
    assert "mean_recall@1" in shown[0]["text/plain"]
    assert "63 rows" in shown[3]["text/html"]
    rows = shown[5]["text/plain"]
    assert rows.startswith("array([")
    (selection,) = (tmp_path / "outputs" / "selections").glob("negcliploss-*/selection.json")
    assert json.loads(selection.read_text())["kept_samples"] == 36
    kept = np.load(selection.with_name("selection.npy"))
    assert len(kept) == 36
    assert len(list((tmp_path / "outputs" / "train").glob("*/summary.json"))) == 6
    assert (tmp_path / "outputs" / "compare" / "compare" / "report.html").is_file()


def test_the_readme_has_the_main_job_of_the_guide() -> None:
    assert blocks(GUIDE)[0] in README
