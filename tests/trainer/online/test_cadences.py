"""Versions of a selection, other methods of the loop, budgets, and what a plan foretells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig

from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.selection.selection import expand_rows, read_selection
from siftclip.errors import InputError
from siftclip.files import read_json, read_jsonl
from siftclip.selectors.methods.infobatch import InfoBatch
from siftclip.trainer.builders.selection import pool_from
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.online.losses_seen import LossesSeen
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import plan_stage, train_stage

Compose = Callable[..., DictConfig]
ALL = ["selector=random", "selector.fraction=1"]
EVERY_STEP = [*ALL, "online=every_step", "online.selector.fraction=0.5"]
AGAIN = [
    "selector=random",
    "selector.fraction=0.9",
    "online=every_n_steps",
    "online.every_n_steps=2",
    "online.pool_fraction=0.5",
    "online.selector.fraction=0.2",
]


def records(run: RunDir) -> dict[int, dict[str, float]]:
    found = read_jsonl(run.path / "metrics.jsonl")
    return {r["step"]: r for r in found if "train/loss" in r}


def losses(run: RunDir) -> list[float]:
    return [record["train/loss"] for record in records(run).values()]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[float] | None]]:
    """Rows and weights of every micro-batch that is trained on."""
    import siftclip.trainer.loop.module as module

    found: list[tuple[list[int], list[float] | None]] = []
    compute = module.compute_gradients

    def spy(model: Any, objective: Any, batches: Any, *args: Any, **named: Any) -> Any:
        for batch in batches:
            own = None if batch.weights is None else batch.weights.tolist()
            found.append((batch.rows.tolist(), own))
        return compute(model, objective, batches, *args, **named)

    monkeypatch.setattr(module, "compute_gradients", spy)
    return found


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """Let runs fail when they log a step."""
    from siftclip.trainer.runtime.loggers import FileLogger

    original = FileLogger.log_metrics

    def arm(at: int) -> None:
        def fail(self: FileLogger, metrics: Any, step: int | None = None) -> None:
            if step == at:
                raise RuntimeError("stop here")
            original(self, metrics, step)

        monkeypatch.setattr(FileLogger, "log_metrics", fail)

    return arm


def test_versions_follow_the_learner_and_continue(
    base: list[str],
    compose: Compose,
    stop_at: Callable[[int], Any],
    trained: list[tuple[list[int], Any]],
    tmp_path: Path,
) -> None:
    """Stopped in version 2, whose checkpoint is older than the version."""
    shared = [*base, *AGAIN, "trainer.checkpoint_every_n_steps=3"]
    whole = train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'whole'}"]))
    versions = sorted((whole.path / "selections").iterdir())
    assert [path.name for path in versions] == ["v0001", "v0002"]
    assert [read_json(path / "selection.json")["start_step"] for path in versions] == [2, 4]
    sizes = [len(read_selection(path)) for path in versions]
    assert sizes == [21, 21]  # 0.2 of 108 candidates
    assert not any((path / "features").exists() for path in versions)
    pool = pool_from(compose("train", base).pool, progress=False)
    for number, path in enumerate(versions):
        rows = set(expand_rows(read_selection(path), pool)[0].tolist())
        for step in (2 + 2 * number, 3 + 2 * number):
            assert set(trained[step][0]) <= rows
    digests = {read_selection(path).digest for path in versions}
    assert len(digests) == 2
    last = records(whole)[6]
    assert last["online/selection_version"] == 2
    # the 96 samples of six steps, and twice half of the 216 candidates to embed
    assert last["cost/loaded_samples"] == 96 + 2 * 108
    assert last["cost/scored_samples"] == 2 * 108
    assert last["cost/scoring_flops"] > 0
    stop_at(5)
    with pytest.raises(RuntimeError, match="stop here"):
        train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'cut'}"]))
    stop_at(10**9)
    continued = train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'cut'}"]))
    assert losses(continued) == losses(whole)
    for path in versions:
        same = continued.path / "selections" / path.name
        assert read_selection(same).digest == read_selection(path).digest


def test_lost_version_is_named(
    base: list[str], compose: Compose, stop_at: Callable[[int], Any], tmp_path: Path
) -> None:
    shared = [*base, *AGAIN, "trainer.checkpoint_every_n_steps=3", f"run_dir={tmp_path / 'cut'}"]
    stop_at(4)
    with pytest.raises(RuntimeError, match="stop here"):
        train_stage(compose("train", shared))
    (tmp_path / "cut" / "selections" / "v0001" / "selection.json").unlink()
    stop_at(10**9)
    with pytest.raises(InputError, match=r"v0001 is missing: the run was trained on this"):
        train_stage(compose("train", shared))


def test_infobatch_reads_the_losses_seen_and_weights_what_it_keeps(
    base: list[str],
    compose: Compose,
    trained: list[tuple[list[int], list[float] | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[int, float] = {}
    columns: list[np.ndarray] = []
    update, select = LossesSeen.update, InfoBatch.select

    def spy_update(self: LossesSeen, rows: np.ndarray, values: np.ndarray) -> None:
        seen.update(zip(rows.tolist(), values.tolist(), strict=True))
        update(self, rows, values)

    def spy_select(self: InfoBatch, source: Any) -> Any:
        chunk = source.take(source.rows, self.requires)
        expected = np.array([seen.get(row, np.nan) for row in source.rows.tolist()])
        np.testing.assert_array_equal(chunk.column, expected)
        columns.append(chunk.column)
        return select(self, source)

    monkeypatch.setattr(LossesSeen, "update", spy_update)
    monkeypatch.setattr(InfoBatch, "select", spy_select)
    options = ["selector=random", "selector.fraction=0.2", "scale.samples_seen=160"]
    run = train_stage(compose("train", [*base, *options, "online=every_epoch", "online.stop=0.8"]))
    assert len(columns) >= 1
    assert np.isfinite(columns[0]).all()  # 48 samples are drawn in three steps
    folder = run.path / "selections" / "v0001"
    kept = read_selection(folder)
    assert 24 <= len(kept) < 48
    assert all(own is None for _, own in trained[:3])
    rows = set(
        expand_rows(kept, pool_from(compose("train", base).pool, progress=False))[0].tolist()
    )
    assert {row for own, _ in trained[3:5] for row in own} <= rows
    weights = {w for _, own in trained[3:5] if own is not None for w in own}
    assert weights == {1.0, 2.0}
    above = columns[0] >= np.nanmean(columns[0])
    assert len(kept) >= int(above.sum())
    # after the window the whole selection again, unweighted
    assert trained[-1][1] is None
    assert records(run)[10]["online/selection_samples"] == 48


def test_dynamics_draws_anew_for_every_epoch(
    base: list[str], compose: Compose, tmp_path: Path
) -> None:
    config = compose("train", base)
    pool = pool_from(config.pool, progress=False)
    clusters = np.where(np.arange(len(pool)) < 180, 0, 1)
    table = pa.table({"uid": [format_uid(uid) for uid in pool.uids], "cluster": clusters})
    pq.write_table(table, tmp_path / "clusters.parquet")
    options = [
        "selector=random",
        "selector.fraction=0.2",
        "scale.samples_seen=160",
        "online=every_epoch",
        "selector@online.selector=dynamics",
        f"online.selector.path={tmp_path / 'clusters.parquet'}",
    ]
    run = train_stage(compose("train", [*base, *options]))
    found = [read_selection(path) for path in sorted((run.path / "selections").iterdir())]
    assert len(found) >= 2
    assert {len(selection) for selection in found} == {48}
    assert found[0].digest != found[1].digest


def test_concepts_choose_before_reading(base: list[str], compose: Compose, tmp_path: Path) -> None:
    pool = pool_from(compose("train", base).pool, progress=False)
    lists = [[row % 3, 3 + row % 2] for row in range(len(pool))]
    table = pa.table({"uid": [format_uid(uid) for uid in pool.uids], "concepts": lists})
    pq.write_table(table, tmp_path / "concepts.parquet")
    options = [
        *EVERY_STEP,
        "selector@online.selector=cabs",
        f"online.selector.path={tmp_path / 'concepts.parquet'}",
        "online.diagnostics.record_chosen=true",
    ]
    run = train_stage(compose("train", [*base, *options]))
    for rows in np.load(run.path / "chosen.npy"):
        counts = np.bincount(np.concatenate([lists[row] for row in rows]), minlength=5)
        assert counts[:3].max() - counts[:3].min() <= 2
    assert records(run)[6]["cost/loaded_samples"] == 96


def test_live_reference_and_distillation_on_the_chosen(
    base: list[str], compose: Compose, model_folder: Path, demo_data: DemoData
) -> None:
    live = [f"online.reference.model.name={model_folder}", "model.architecture.embed_dim=16"]
    last = records(train_stage(compose("train", [*base, *EVERY_STEP, *live])))[6]
    cached = records(train_stage(compose("train", [*base, *EVERY_STEP])))[6]
    assert last["cost/scoring_flops"] > cached["cost/scoring_flops"]
    aced = [
        "experiment=aced",
        f"loss.teacher.features.root={demo_data.root / 'features'}",
        "online.selector.fraction=0.5",
    ]
    found = records(train_stage(compose("train", [*base, *aced])))[6]
    assert found["train/distill_loss"] > 0
    assert found["cost/drawn_samples"] == 192


@pytest.mark.parametrize(
    "options",
    [
        ["experiment=jest", "online.reference.features.logit_bias=-10", "online.selector.chunks=4"],
        ["experiment=active_clip", "online.scorer.name=tiny",
         "+online.scorer.architecture=${model.architecture}"],
    ],
)  # fmt: skip
def test_published_recipes_run(options: list[str], base: list[str], compose: Compose) -> None:
    found = records(train_stage(compose("train", [*base, *options])))[6]
    assert found["cost/scored_samples"] in (2 * 96, 5 * 96)
    assert np.isfinite(found["online/score_chosen_q50"])


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([], r"needs the logit bias of the reference: set online\.reference\.features\.logit_bias"),
        (["online.reference.features.logit_bias=-9"],
         r"learner.logit_bias of 'learner' must be given for the sigmoid"),
    ],
)  # fmt: skip
def test_sigmoid_choice_needs_biases(
    told: list[str], message: str, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, *EVERY_STEP, "online.selector.loss=sigmoid", *told]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["online.selector=learnability"], r"write selector@online\.selector=NAME"),
        (["online.selector.fraction=20"], r"online\.selector\.fraction must be"),
        (["budget=5"], r"budget needs a unit"),
        (["online.cadence=every_n_steps"], r"write online=every_n_steps"),
        (["online.reference.features.name=other"], r"online\.reference\.features\.name asks for"),
    ],
)  # fmt: skip
def test_mistakes_of_newcomers_are_named(
    options: list[str], message: str, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, *ALL, "online=every_step", *options]))


@pytest.mark.parametrize("unit", ["flops", "loaded_samples"])
def test_budgets_end_before_they_are_exceeded(
    unit: str, base: list[str], compose: Compose, tmp_path: Path
) -> None:
    one = train_stage(compose("train", [*base, *EVERY_STEP, f"run_dir={tmp_path / 'one'}"]))
    cost = records(one)[6][f"cost/{unit}"]
    options = [f"budget.{unit}={cost * 0.7}", f"run_dir={tmp_path / 'limited'}"]
    limited = train_stage(compose("train", [*base, *EVERY_STEP, *options]))
    summary = limited.summary
    assert summary is not None
    assert summary["steps"] == 4  # of six at full cost
    assert summary[unit] <= cost * 0.7 < summary[unit] * 5 / 4
    plain = train_stage(compose("train", [*base, *ALL, options[0], f"run_dir={tmp_path / 'p'}"]))
    assert plain.summary is not None
    assert plain.summary["steps"] > 4


def test_budget_in_seconds_is_measured_once(
    base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A continued run keeps the steps that its first process has found."""
    import siftclip.trainer.stages.planning as planning

    monkeypatch.setattr(planning, "STEPS", 3)
    monkeypatch.setattr(planning, "ROUNDS", 1)
    run = train_stage(compose("train", [*base, *EVERY_STEP, "budget.seconds=0.5"]))
    assert run.summary is not None
    steps = run.summary["steps"]
    assert steps >= 1
    assert read_json(run.path / "budget.json")["samples_seen"] == 16 * steps
    assert not list((tmp_path / "outputs").glob(".plan-*"))


@pytest.mark.parametrize("options", [ALL, EVERY_STEP, AGAIN])
def test_plan_foretells_the_costs_of_the_run(
    options: list[str], base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    import siftclip.trainer.stages.planning as planning

    monkeypatch.setattr(planning, "STEPS", 4)
    monkeypatch.setattr(planning, "ROUNDS", 1)
    plan = plan_stage(compose("train", [*base, *options]))
    record = plan.record()
    run = train_stage(compose("train", [*base, *options]))
    assert run.summary is not None
    for name in ("drawn_samples", "loaded_samples", "scored_samples", "flops"):
        assert record[name] == run.summary[name]
    assert record["steps"] == 6
    assert record["step_seconds"]["plain"]["total"] > 0
    assert record["plain_seconds"] > 0
    text = plan.table()
    assert "6 steps: " in text
    assert f"{record['trained_samples']:,.0f} trained" in text
    if options is EVERY_STEP:
        assert set(record["step_seconds"]) == {"plain", "selecting"}
        assert record["train_seconds"] > 0
    if options is AGAIN:
        assert record["versions"] == 2
        assert record["version_seconds"] > 0


def test_dropout_of_scores_follows_the_place_in_the_super_batch() -> None:
    from siftclip.datamodules.streaming.batches import Batch
    from siftclip.trainer.online.in_loop import InLoopSelection, StepDraw
    from siftclip.trainer.online.schedule import Schedule

    draw = StepDraw(
        selector=InfoBatch(seed=0),
        schedule=Schedule(filter_ratio=0.5),
        total_steps=4,
        groups=4,
        seed=3,
    )
    loop = InLoopSelection.__new__(InLoopSelection)
    loop.draw = draw
    blank = torch.zeros(4, 1)
    part = Batch(images=blank, tokens=blank, rows=torch.arange(4), valid=torch.ones(4).bool())
    alone = loop._seeds([part] * 4, step=2, rank=0)
    two = [loop._seeds([part] * 2, step=2, rank=rank) for rank in (0, 1)]
    assert [seed for seeds in two for seed in seeds] == alone
    assert len(set(alone)) == 4
    assert loop._seeds([part] * 4, step=3, rank=0) != alone


def test_windows_of_reselection_are_kept(
    base: list[str], compose: Compose, trained: list[tuple[list[int], Any]]
) -> None:
    """Before the window the stream is that of `selector`; versions end with it."""
    plain = ["selector=random", "selector.fraction=0.9", "scale.samples_seen=320"]
    train_stage(compose("train", [*base, *plain]))
    expected = [rows for rows, _ in trained]
    trained.clear()
    window = ["online.every_n_steps=3", "online.start=0.5", "online.stop=0.7"]
    run = train_stage(compose("train", [*base, *AGAIN, *plain[2:], *window]))
    assert [rows for rows, _ in trained[:12]] == expected[:12]  # the first multiple of 3 in it
    starts = [
        read_json(path / "selection.json")["start_step"]
        for path in sorted((run.path / "selections").iterdir())
    ]
    assert starts == [12]
    versions = {step: r["online/selection_version"] for step, r in records(run).items()}
    assert [versions[step] for step in (12, 13, 14, 15, 20)] == [0, 1, 1, 2, 2]
    assert records(run)[20]["online/selection_samples"] == 216


def test_repetitions_of_the_selection_stay(
    base: list[str], compose: Compose, tmp_path: Path
) -> None:
    pool = pool_from(compose("train", base).pool, progress=False)
    uids = np.repeat(pool.uids[:90], np.arange(90) % 3 + 1, axis=0)
    subset = np.sort(np.array([tuple(uid) for uid in uids], dtype="u8,u8"))
    np.save(tmp_path / "subset.npy", subset)
    options = ["selector=external", f"selector.path={tmp_path / 'subset.npy'}"]
    options.append("scale.samples_seen=320")
    run = train_stage(compose("train", [*base, *options, "online=every_epoch"]))
    first = read_selection(run.path)
    counts = {tuple(u): m for u, m in zip(first.uids.tolist(), first.multiplicities, strict=True)}
    (version, *_) = sorted((run.path / "selections").iterdir())
    kept = read_selection(version)
    assert kept.multiplicities.max() > 1
    for uid, multiplicity in zip(kept.uids.tolist(), kept.multiplicities, strict=True):
        assert multiplicity == counts[tuple(uid)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["online=every_epoch", "loss=drrho", "loss.teacher.features.name=noise"],
         r"needs the loss of each sample"),
        (["online=every_step", "selector@online.selector=softmax"], r"rule has no place"),
        (["online=every_step", "selector@online.selector=easy_reference",
          "selector@online.first_stage.selector=easy_reference"], r"has no effect"),
        (["online=every_step", "selector@online.first_stage.selector=dynamics",
          "online.first_stage.selector.path=x.npy"], r"decides by itself how many"),
        (["online=every_step", "online.selector.fraction=0.98"], r"is so small that"),
        (["online=every_step", "online.schedule.warmup_steps=6"], r"leaves none of the 6 steps"),
        (["online=every_step", "online.schedule.start=0.9", "online.schedule.stop=0.2"],
         r"online\.schedule\.start must be below"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(
    options: list[str], message: str, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, *options]))


def test_schedule_may_say_the_fraction_and_metrics_end_with_the_window(
    base: list[str], compose: Compose
) -> None:
    schedule = ["online.selector.fraction=null", "online.schedule.filter_ratio=0.5"]
    options = [*ALL, "online=every_step", *schedule, "online.schedule.stop=0.5"]
    found = records(train_stage(compose("train", [*base, *options])))
    assert found[6]["cost/drawn_samples"] == 3 * 32 + 3 * 16
    assert "online/score_chosen_q50" in found[3]
    assert "online/score_chosen_q50" not in found[6]


def test_limits_go_with_windows_and_records(
    base: list[str], compose: Compose, tmp_path: Path
) -> None:
    limits = ["budget.loaded_samples=170", "online.schedule.start=0.5"]
    record = ["online.diagnostics.record_chosen=true"]
    run = train_stage(compose("train", [*base, *EVERY_STEP, *limits, *record]))
    assert run.summary is not None
    assert run.summary["steps"] == 7  # 3 or 4 of 16 and 4 or 3 of 32
    assert run.summary["loaded_samples"] <= 170
    assert np.load(run.path / "chosen.npy").shape == (7, 16)
    assert not (tmp_path / "outputs" / "chosen.npy").exists()


def test_half_precision_features_go_with_bfloat16(base: list[str], compose: Compose) -> None:
    options = [*EVERY_STEP, "trainer.precision=bf16-mixed", "trainer.micro_batch_size=8"]
    assert np.isfinite(losses(train_stage(compose("train", [*base, *options])))).all()
    taught = [
        "loss=distill",
        "loss.teacher.features.name=noise",
        "loss.teacher.features.root=${features.root}",
    ]
    assert np.isfinite(losses(train_stage(compose("train", [*base, *options, *taught])))).all()


def test_a_state_is_never_ahead_of_the_step(
    base: list[str], compose: Compose, stop_at: Callable[[int], Any], tmp_path: Path
) -> None:
    """What learns from cached features is judged after reading, where checkpoints see it."""
    options = [
        *EVERY_STEP,
        "selector@online.selector=running_vas",
        "online.selector.key=noise_img",
        "online.selector.decay=0.5",
        "trainer.checkpoint_every_n_steps=3",
    ]
    whole = train_stage(compose("train", [*base, *options, f"run_dir={tmp_path / 'whole'}"]))
    stop_at(5)
    with pytest.raises(RuntimeError, match="stop here"):
        train_stage(compose("train", [*base, *options, f"run_dir={tmp_path / 'cut'}"]))
    stop_at(10**9)
    continued = train_stage(compose("train", [*base, *options, f"run_dir={tmp_path / 'cut'}"]))
    assert losses(continued) == losses(whole)


def test_runs_are_known_by_what_the_loop_reads(
    base: list[str], compose: Compose, demo_data: DemoData, tmp_path: Path
) -> None:
    first = train_stage(compose("train", [*base, *EVERY_STEP]))
    described = ["online.diagnostics.record_chosen=true"]
    assert train_stage(compose("train", [*base, *EVERY_STEP, *described])).path == first.path
    for path in (demo_data.root / "features").iterdir():
        with np.load(path) as arrays:
            turned = {k: a if k == "uids" else a[::-1].copy() for k, a in arrays.items()}
        (tmp_path / "turned").mkdir(exist_ok=True)
        np.savez(tmp_path / "turned" / path.name, **turned)  # type: ignore[arg-type]
    other = [f"features.root={tmp_path / 'turned'}"]
    assert train_stage(compose("train", [*base, *EVERY_STEP, *other])).path != first.path
