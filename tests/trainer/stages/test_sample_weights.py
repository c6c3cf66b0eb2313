"""Weights of selectors reach the loss at every cadence, or are refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig

from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.selection.selection import read_selection
from siftclip.errors import InputError
from siftclip.trainer.builders.selection import pool_from, select_stage
from siftclip.trainer.stages.pool import compact_stage, describe_compaction
from siftclip.trainer.stages.selection_summary import describe_selection
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
Seen = list[tuple[list[int], list[float] | None]]
# A third party's selectors; what a sample counts follows from its row.
PLUGIN = """
import numpy as np
from siftclip.selectors.core.base import Choice, Requirements, Selector
from siftclip.selectors.methods.uniform import Uniform


class Weigher(Uniform):
    weighs = True

    def weighed(self, choice, rows):
        weights = (1 + rows % 3).astype(np.float32)
        return Choice(multiplicities=choice.multiplicities, scores=choice.scores, weights=weights)

    def select(self, source):
        return self.weighed(super().select(source), source.rows)

    def draw(self, source, sub_batch):
        return self.weighed(super().draw(source, sub_batch), source.pool_rows)


class LearnerWeigher(Weigher):
    @property
    def requires(self):
        return Requirements(features=("learner_img", "learner_txt"))


class Undeclared(Weigher):
    weighs = False
"""
RANDOM = ["selector=random", "selector.fraction=0.5"]
EVERY_STEP = [
    "online=every_step",
    "selector@online.selector=random",
    "online.selector.fraction=0.5",
]


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "weighing_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Rows and weights of every step's batch."""
    import siftclip.trainer.loop.module as module

    seen: Seen = []
    compute = module.compute_gradients

    def spy(model: Any, objective: Any, batches: Any, *args: Any, **named: Any) -> Any:
        for batch in batches:
            weights = None if batch.weights is None else batch.weights.tolist()
            seen.append((batch.rows.tolist(), weights))
        return compute(model, objective, batches, *args, **named)

    monkeypatch.setattr(module, "compute_gradients", spy)
    return seen


def target(name: str, node: str = "selector") -> list[str]:
    return [f"{node}._target_=weighing_plugin.{name}"]


def by_row(rows: list[int]) -> list[float]:
    return [1.0 + row % 3 for row in rows]


def test_weights_of_a_selection_reach_the_loss(
    base: list[str], compose: Compose, trained: Seen, tmp_path: Path
) -> None:
    options = [*base, *RANDOM, *target("Weigher")]
    run = train_stage(compose("train", [*options, f"run_dir={tmp_path / 'first'}"]))
    assert len(trained) == 6
    assert all(weights == by_row(rows) for rows, weights in trained)
    selection = read_selection(run.path)
    assert selection.weights is not None
    outcome = select_stage(compose("train", options))
    assert np.array_equal(outcome.selection.weights, selection.weights)  # type: ignore[arg-type]
    assert "weights    1 to 3, mean" in describe_selection(outcome)
    # the selection is there already: it is read, and its weights with it
    first, trained[:] = list(trained), []
    train_stage(compose("train", [*options, f"run_dir={tmp_path / 'second'}"]))
    assert trained == first
    plain = select_stage(compose("train", [*base, *RANDOM]))
    assert np.array_equal(plain.rows, outcome.rows)
    assert plain.selection.digest != outcome.selection.digest


def test_weights_of_selector_and_loss_multiply(
    base: list[str], compose: Compose, trained: Seen, tmp_path: Path
) -> None:
    pool = pool_from(compose("train", base).pool, progress=False)
    table = pa.table(
        {
            "uid": [format_uid(uid) for uid in pool.uids],
            "weight": (np.arange(len(pool)) % 2 + 0.5).astype(np.float64),
        }
    )
    pq.write_table(table, tmp_path / "weights.parquet")
    weights = f"loss.weights.path={tmp_path / 'weights.parquet'}"
    train_stage(compose("train", [*base, *RANDOM, *target("Weigher"), weights]))
    for rows, found in trained:
        assert found == [(1 + row % 3) * (row % 2 + 0.5) for row in rows]


def test_versions_multiply_weights_with_those_of_the_selection(
    base: list[str], compose: Compose, trained: Seen, tmp_path: Path
) -> None:
    again = ["online=every_n_steps", "online.every_n_steps=2", "selector@online.selector=random"]
    options = [*base, *RANDOM, *target("Weigher"), *again, "online.selector.fraction=0.8"]
    twice = [*options, *target("Weigher", "online.selector")]
    run = train_stage(compose("train", [*twice, f"run_dir={tmp_path / 'twice'}"]))
    for step, (rows, weights) in enumerate(trained):
        assert weights == [w if step < 2 else w * w for w in by_row(rows)]
    version = read_selection(run.path / "selections" / "v0001")
    assert version.weights is not None
    assert set(version.weights.tolist()) == {1.0, 2.0, 3.0}  # the selector's own
    trained.clear()
    train_stage(compose("train", [*options, f"run_dir={tmp_path / 'once'}"]))
    assert all(weights == by_row(rows) for rows, weights in trained)


def test_infobatch_in_a_composition_weighs_in_every_epoch(
    base: list[str], compose: Compose, trained: Seen
) -> None:
    stages = (
        "{name: then, _target_: siftclip.selectors.core.compose.Then, stages: {"
        "half: {_target_: siftclip.selectors.methods.uniform.Uniform, "
        "seed: 1, fraction: 0.9, of: left},"
        "prune: {_target_: siftclip.selectors.methods.infobatch.InfoBatch, seed: 0}}}"
    )
    options = ["selector=random", "selector.fraction=0.2", "scale.samples_seen=160"]
    online = ["online=every_epoch", "~online.selector", f"+online.selector={stages}"]
    train_stage(compose("train", [*base, *options, *online]))
    weights = {weight for _, own in trained[3:5] if own is not None for weight in own}
    assert weights == {1.0, 2.0}


@pytest.mark.parametrize("micro", [[], ["trainer.micro_batch_size=4"]])
def test_weights_of_a_sub_batch_reach_the_loss(
    micro: list[str], base: list[str], compose: Compose, trained: Seen
) -> None:
    options = [
        *RANDOM,
        *target("Weigher"),
        *EVERY_STEP,
        *target("LearnerWeigher", "online.selector"),
    ]
    uniform = ["online.schedule.uniform_fraction=0.25", "online.groups=8"]
    train_stage(compose("train", [*base, *options, *micro, *uniform]))
    drawn_uniformly = 0
    for rows, weights in trained:
        assert weights is not None
        for weight, expected in zip(weights, by_row(rows), strict=True):
            assert weight in (expected, expected**2)  # of the selection, and of the draw as well
            drawn_uniformly += weight == expected > 1
    assert 0 < drawn_uniformly <= 6 * 4  # a quarter of 16, of 8 groups of 2
    assert sum(len(rows) for rows, _ in trained) == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*RANDOM, *target("Weigher"), "loss=siglip"],
         r"selector=random weighs the samples that it keeps, and loss=siglip cannot use weights"),
        ([*RANDOM, "loss=siglip", *EVERY_STEP, *target("LearnerWeigher", "online.selector")],
         r"online\.selector=random weighs .* loss=siglip .*one of loss=clip,coca,distill,drrho"),
        ([*RANDOM, *EVERY_STEP, *target("Weigher", "online.selector")],
         r"online\.selector: Weigher weighs .* chooses before they are read"),
        ([*RANDOM, "online=every_step", "selector@online.first_stage.selector=random",
          "online.first_stage.selector.fraction=0.5",
          *target("Weigher", "online.first_stage.selector")],
         r"online\.first_stage\.selector: Weigher weighs"),
    ],
)  # fmt: skip
def test_what_cannot_use_weights_is_refused_before_any_work(
    options: list[str], message: str, base: list[str], compose: Compose, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, *options]))
    assert not (tmp_path / "outputs").exists()


def test_undeclared_weights_are_refused(base: list[str], compose: Compose, tmp_path: Path) -> None:
    message = "Undeclared answers with weights and does not declare"
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, *RANDOM, *target("Undeclared"), "loss=siglip"]))
    assert not list(tmp_path.glob("outputs/selections/*/*"))


def test_compaction_keeps_weights(base: list[str], compose: Compose, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    options = [o for o in base if not o.startswith(("model", "scale", "optim", "logger", "data."))]
    config = compose(
        "data_compact", [*options, *RANDOM, *target("Weigher"), f"compact.output={output}"]
    )
    outcome = compact_stage(config)
    assert f"loss.weights.path={output / 'weights.npy'}" in describe_compaction(outcome)
    selection = select_stage(config).selection
    assert np.array_equal(np.load(output / "weights.npy")["weight"], selection.weights)
