"""One run that logs everywhere, read back with the readers of the others."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import open_clip.loss
import open_clip_train
import pytest
from doc_examples import DOCS
from PIL import Image
from tracked_runs import (
    Curves,
    curves_of_log,
    mlflow_client,
    mlflow_curves,
    tensorboard_curves,
    tensorboard_events,
)
from wandb_offline import OfflinePart, read_parts

from siftclip.files import read_json, read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.tracking.metric_names import OPEN_CLIP_NAMES
from siftclip.trainer.runtime.tracking.mlflow_runs import default_uri, mlflow_key
from siftclip.trainer.stages.train import train_stage

AXES = {"samples", "flops", "seconds"}
OPTIONS = [
    *("logger.wandb=true", "logger.mode=offline", "logger.x_axis=samples", "logger.samples=4"),
    *("logger.entity=team", "logger.project=tests", "logger.group=ablation", "logger.tags=[a,b]"),
    *("logger.job_type=sweep", "logger.name=a name", "logger.id=own-id.1"),
    *("logger.notes='so, why'", "eval.tasks=[digit,retrieval]", "eval.during.every_n_steps=3"),
    *("logger.artifacts=[selection,model,evaluation,tables]", "logger.gradients_every_n_steps=4"),
]  # fmt: skip
OF_TASKS = {
    "eval/digit/acc1",
    "eval/retrieval/mean_recall@1",
    "eval_during/digit",
    "eval_during/seconds",
}


class Tracked(NamedTuple):
    """A finished run with what it has logged."""

    run: RunDir
    part: OfflinePart
    records: list[dict[str, Any]]
    outputs: Path
    csv_folder: Path

    @property
    def curves(self) -> Curves:
        return curves_of_log(self.records)


@pytest.fixture(scope="module")
def tracked(
    base_of: Any, composing: Any, demo_data: DemoData, tmp_path_factory: pytest.TempPathFactory
) -> Tracked:
    folder = tmp_path_factory.mktemp("tracked")
    words = [
        f"logger.{name}={str(importlib.util.find_spec(name) is not None).lower()}"
        for name in ("tensorboard", "mlflow")
    ]
    node = f"{{_target_:lightning.pytorch.loggers.CSVLogger,save_dir:{folder / 'csv'}}}"
    words += [f"eval.root={demo_data.tasks}", f"+trainer.loggers=[{node}]"]
    with composing() as compose:
        run = train_stage(compose("train", [*base_of(folder), *OPTIONS, *words]))
    (part,) = read_parts(run.path)
    records = read_jsonl(run.path / "metrics.jsonl")
    return Tracked(run, part, records, folder / "outputs", folder / "csv")


def seconds_by_step(records: list[dict[str, Any]]) -> dict[int, float]:
    """Seconds of training up to each step, every one of which has a record."""
    total, by_step = 0.0, {0: 0.0}
    for record in records:
        if "train/batch_time" in record:
            total += record["train/batch_time"]
            by_step[record["step"]] = total
    return by_step


# ---- Weights & Biases ---------------------------------------------------------------------------
def test_the_run_bears_what_its_options_say(tracked: Tracked) -> None:
    run = tracked.part.run
    assert (run.entity, run.project, run.run_group) == ("team", "tests", "ablation")
    assert (run.job_type, run.display_name, run.run_id) == ("sweep", "a name", "own-id.1")
    assert (list(run.tags), run.notes) == (["a", "b"], "so, why")
    assert (tracked.run.path / "wandb_id").read_text() == "own-id.1\n"
    assert tracked.part.exit_code == 0


def test_the_configuration_is_nested(tracked: Tracked) -> None:
    config = tracked.part.config
    assert config["scale"] == {"samples_seen": 96, "global_batch_size": 16}
    assert config["logger"]["tags"] == ["a", "b"]


def test_every_record_of_the_log_is_there_once_with_axes(tracked: Tracked) -> None:
    rows, log = tracked.part.rows, tracked.records
    for key, points in tracked.curves.items():
        assert [(r["trainer/global_step"], r[key]) for r in rows if key in r] == points, key
    assert tracked.curves.keys() >= OF_TASKS | {"train/loss", "train/passes", "cost/flops"}
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    seconds = seconds_by_step(log)
    flops = {r["step"]: r["cost/flops"] for r in log if "cost/flops" in r} | {0: 0.0}
    for row in rows:
        step = row["trainer/global_step"]
        assert row.keys() >= AXES
        assert row["samples"] == 16 * step
        assert row["flops"] == flops[step]
        assert row["seconds"] == pytest.approx(seconds[step])


def test_charts_count_by_what_is_chosen(tracked: Tracked) -> None:
    by_name = {metric.name for metric in tracked.part.metrics}
    assert by_name >= AXES | {"trainer/global_step"}
    globs = [metric for metric in tracked.part.metrics if metric.glob_name == "*"]
    assert globs[-1].step_metric == "samples"
    assert globs[-1]._control.overwrite


def test_the_selection_is_there_before_the_first_step(tracked: Tracked) -> None:
    first, *others = tracked.part.rows
    assert first["trainer/global_step"] == 0
    assert (first["selection/samples"], first["selection/fraction"]) == (72, 0.3)
    of_file = next(r for r in tracked.records if "selection/samples" in r)
    assert of_file["step"] == 6
    same = {key: value for key, value in of_file.items() if key.startswith("selection/")}
    assert {key: first[key] for key in same} == same
    assert not [row for row in others if "selection/samples" in row]


def test_evaluation_is_a_table_and_in_the_summary(tracked: Tracked) -> None:
    table = tracked.part.table("eval/tasks")
    assert table["columns"][:5] == ["task", "title", "family", "metric", "value"]
    values = {row[0]: row[4] for row in table["data"]}
    assert values["digit"] == tracked.curves["eval/digit/acc1"][-1][1]
    summary = tracked.part.summary
    for key, points in tracked.curves.items():
        assert summary[key] == points[-1][1], key
    assert summary["selection/samples"] == 72
    assert summary["samples"] == 96


def test_scores_are_a_table_and_a_histogram(tracked: Tracked) -> None:
    manifest = read_json(tracked.run.path / "selection.json")
    table = tracked.part.table("selection/scores")
    assert table["columns"] == ["quantile", "pool", "kept"]
    assert {q: [pool, kept] for q, pool, kept in table["data"]} == {
        int(name[1:]): [manifest["score_quantiles_pool"][name], kept]
        for name, kept in manifest["score_quantiles_kept"].items()
    }
    (row,) = (row for row in tracked.part.rows if "selection/score/_type" in row)
    assert row["selection/score/_type"] == "histogram"
    assert sum(row["selection/score/values"]) == 72


def test_samples_are_shown_with_images_best_first(tracked: Tracked, demo_data: DemoData) -> None:
    artifact = next(a for a in tracked.part.artifacts if "examples" in a.name)
    (place,) = (e for e in artifact.manifest.contents if e.path.endswith(".table.json"))
    table = read_json(Path(place.local_path))
    assert table["columns"] == ["kept", "score", "sample", "caption", "image"]
    assert "image-file" in json.dumps(table["column_types"])
    kept, left_out = table["data"][:4], table["data"][4:]
    assert [row[0] for row in table["data"]] == [True] * 4 + [False] * 4
    scores = [row[1] for row in kept]
    manifest = read_json(tracked.run.path / "selection.json")
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(manifest["score_quantiles_kept"]["q100"])
    assert scores[-1] == pytest.approx(manifest["score_quantiles_kept"]["q0"])
    assert [row[1] for row in left_out] == [None] * 4
    captions = {name: text for name, (text, _) in samples_of(demo_data.pool).items()}
    for row in table["data"]:
        assert captions[row[2]] == row[3]
    images = [entry for entry in artifact.manifest.contents if entry.path.endswith(".png")]
    assert {row[4]["path"] for row in table["data"]} == {entry.path for entry in images}
    for entry in images:
        assert tracked.run.path in Path(entry.local_path).parents
        with Image.open(entry.local_path) as image:
            assert max(image.size) <= 256


def samples_of(pool: Path) -> dict[str, tuple[str, bytes]]:
    """Caption and image of each sample of a pool, by `<tar>:<key>`."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(pool.rglob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                samples.setdefault(f"{path.name}:{key}", {})[suffix] = file.read()
    return {
        name: (parts["txt"].decode().strip(), parts.get("jpg") or parts.get("png") or b"")
        for name, parts in samples.items()
    }


def test_gradients_come_on_request(tracked: Tracked) -> None:
    names = {key for row in tracked.part.rows for key in row if key.startswith("gradients/")}
    weights = {key.removesuffix("/_type") for key in names if key.endswith("/_type")}
    assert {"gradients/logit_scale", "gradients/visual.conv1.weight"} <= weights
    (row,) = (row for row in tracked.part.rows if "gradients/logit_scale/_type" in row)
    assert row["trainer/global_step"] == 4
    assert sum(row["gradients/visual.conv1.weight/values"]) == 64 * 3 * 8 * 8
    bins = row["gradients/visual.conv1.weight/bins"]
    assert (len(bins), bins) == (65, sorted(bins))


# ---- artifacts ----------------------------------------------------------------------------------
def test_artifacts_say_where_they_come_from(tracked: Tracked) -> None:
    part, selection = tracked.part, read_json(tracked.run.path / "selection.json")
    pool, features = part.artifact("pool"), part.artifact("features")
    chosen = part.artifact("selection")
    model, evaluation = part.artifact("model"), part.artifact("evaluation")
    assert json.loads(features.metadata)["sources"] == [pool.name]
    assert json.loads(chosen.metadata)["sources"] == [pool.name, features.name]
    assert json.loads(chosen.metadata)["digest"] == selection["digest"]
    assert json.loads(pool.metadata)["fingerprint"] == selection["pool"]["fingerprint"]
    assert [a.use_after_commit for a in (pool, features, chosen)] == [True] * 3
    assert [a.use_after_commit for a in (model, evaluation)] == [False] * 2
    assert (model.name, evaluation.name) == ("model-own-id.1", "evaluation-own-id.1")
    assert {a.run_id for a in part.artifacts} == {"own-id.1"}


def test_artifacts_are_files_that_stay_in_the_runs_folder(tracked: Tracked) -> None:
    files = {
        kind: {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        for kind in ("pool", "features", "selection", "model", "evaluation")
        for artifact in [tracked.part.artifact(kind)]
    }
    record = "lineage.json"
    assert {kind: {*names} for kind, names in files.items()} == {
        "pool": {record},
        "features": {record},
        "selection": {record, "selection.npy", "selection.json"},
        "model": {record, "open_clip_config.json", "open_clip_model.safetensors"},
        "evaluation": {
            *(record, "eval_results.jsonl", "eval_results.csv", "eval_results_model.json"),
        },
    }
    for kind, names in files.items():
        for name, path in names.items():
            assert path.is_absolute()
            assert tracked.run.path in path.parents
            assert path.read_bytes()
            # those that later commands may write again are copied
            is_copy = name == record or kind == "evaluation"
            assert ("artifacts" in path.parts) == is_copy


def test_artifacts_hold_nothing_of_the_pool(tracked: Tracked, demo_data: DemoData) -> None:
    """But the samples that were asked for, in the table of them."""
    contents = [
        Path(entry.local_path).read_bytes()
        for artifact in tracked.part.artifacts
        if "examples" not in artifact.name
        for entry in artifact.manifest.contents
    ]
    assert len(contents) > 10
    samples = samples_of(demo_data.pool).values()
    captions = [caption.encode() for caption, _ in samples if len(caption) > 12]
    assert len(captions) > 100
    for part in [*captions, *(image[:200] for _, image in samples)]:
        assert not [content for content in contents if part in content]


# ---- TensorBoard, MLflow, and others ------------------------------------------------------------
def require_same_curves(found: Curves, tracked: Tracked, rename: Any = lambda key: key) -> None:
    """The log's own curves, those of the axes, and the selection before the first step."""
    expected = {rename(key): points for key, points in tracked.curves.items()}
    for key, points in expected.items():
        assert found[key] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], key
    seconds = seconds_by_step(tracked.records)
    assert found["seconds"][1:] == [(n, pytest.approx(seconds[n])) for n in range(1, 7)] or (
        found["seconds"] == [(n, pytest.approx(seconds[n])) for n in range(1, 7)]
    )
    assert found["selection/samples"] == [(0, 72)]
    more = {key for key in found if key not in expected and not key.startswith("selection/")}
    assert more == AXES


def test_tensorboard_has_the_same_curves(tracked: Tracked) -> None:
    require_same_curves(tensorboard_curves(tracked.run.path / "tensorboard"), tracked)


def test_tensorboard_has_tables_images_and_histograms(tracked: Tracked) -> None:
    events = tensorboard_events(tracked.run.path / "tensorboard")
    tags = events.Tags()
    texts = {"selection/scores/text_summary", "eval/tasks/text_summary"}
    assert texts | {"selection/examples/text_summary"} <= set(tags["tensors"])
    text = events.Tensors("eval/tasks/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| task" in text
    assert "retrieval" in text
    assert sorted(tags["images"]) == [f"selection/examples/image_{n}" for n in range(8)]
    assert {"selection/score", "gradients/logit_scale"} <= set(tags["histograms"])
    (drawn,) = events.Histograms("selection/score")
    assert (drawn.step, drawn.histogram_value.num) == (0, 72)


def test_mlflow_has_the_same_curves(tracked: Tracked) -> None:
    run_id = (tracked.run.path / "mlflow_id").read_text().strip()
    found = mlflow_curves(default_uri(tracked.outputs), run_id)
    require_same_curves(found, tracked, rename=mlflow_key)


def test_mlflow_has_parameters_tags_tables_and_images(tracked: Tracked) -> None:
    client = mlflow_client(default_uri(tracked.outputs))
    run = client.get_run((tracked.run.path / "mlflow_id").read_text().strip())
    assert (run.info.run_name, run.info.status) == ("a name", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "tests"
    assert run.data.params["scale.samples_seen"] == "96"
    assert run.data.params["logger.tags"] == '["a", "b"]'
    tags = run.data.tags
    assert (tags["group"], tags["job_type"], tags["a"]) == ("ablation", "sweep", "true")
    place = tracked.outputs / "mlruns" / run.info.run_id / "artifacts"
    table = read_json(place / "eval" / "tasks.json")
    assert "digit" in {row[0] for row in table["data"]}
    examples = read_json(place / "selection" / "examples.json")
    for row in examples["data"]:
        with Image.open(place / row[-1]) as image:
            assert image.format == "PNG"


def test_a_logger_of_the_users_has_the_same_keys(tracked: Tracked) -> None:
    (path,) = tracked.csv_folder.rglob("metrics.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {*tracked.curves, *AXES, "selection/samples"} <= set(rows[0])
    of_training = [row for row in rows if row["train/loss"]]
    found = [(int(row["step"]), float(row["train/loss"])) for row in of_training]
    assert found == tracked.curves["train/loss"]
    assert [float(row["samples"]) for row in of_training] == [16.0 * n for n in range(1, 7)]
    assert math.isclose(float(of_training[-1]["seconds"]), seconds_by_step(tracked.records)[6])


# ---- the page of the documentation --------------------------------------------------------------
PAGE = (DOCS / "logging.md").read_text(encoding="utf-8")
OPEN_CLIP = Path(open_clip_train.__file__).parent
# What a placeholder in a key stands for
PLACEHOLDERS = {"TASK": r"[\w-]+", "METRIC": r"[\w@]+", "NAME": r"[\w/]+", "WEIGHT": r"[\w.]+"}


def table_of_keys() -> list[tuple[list[str], list[str]]]:
    """The rows of the table: our keys, and open_clip's."""
    rows = PAGE.partition("| key | in open_clip |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [row.split("|") for row in rows]
    return [(re.findall("`(.+?)`", ours), re.findall("`(.+?)`", its)) for _, ours, its, *_ in cells]


def test_the_table_has_every_key(tracked: Tracked) -> None:
    patterns = []
    for keys, _ in table_of_keys():
        for key in keys:
            pattern = re.escape(key)
            for name, stands_for in PLACEHOLDERS.items():
                pattern = pattern.replace(name, stands_for)
            patterns.append(pattern)
    known = re.compile("|".join(f"({pattern})" for pattern in patterns))
    wandbs_own = {"_step", "_runtime", "_timestamp"}
    found = {*tracked.curves, *(key for row in tracked.part.rows for key in row)} - wandbs_own
    assert len(found) > 60
    # of a table or a histogram the rows of wandb have parts, behind a slash
    parts = {key: [key.rsplit("/", n)[0] for n in range(key.count("/") + 1)] for key in found}
    assert not [key for key in found if not any(map(known.fullmatch, parts[key]))]


def test_the_table_has_open_clips_names() -> None:
    """As they stand in its code, under the prefixes train/ and val/."""
    code = "".join((OPEN_CLIP / name).read_text() for name in ("train.py", "zero_shot.py"))
    losses = Path(open_clip.loss.__file__).read_text()
    theirs = [name for _, names in table_of_keys() for name in names]
    assert len(theirs) > 12
    for name in theirs:
        assert f'"{name}"' in code + losses or f"'{name}'" in code, name
    ours = {f"train/{name}" for name in theirs} & {k for keys, _ in table_of_keys() for k in keys}
    assert {"train/loss", "train/lr", "train/scale", "train/batch_time"} <= ours
    for key, name in OPEN_CLIP_NAMES.items():
        assert f"`{key}`" in PAGE
        assert name.removeprefix("val/") in theirs
