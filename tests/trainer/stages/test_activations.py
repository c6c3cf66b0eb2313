"""Every stage builds the model of a tag as its weights were trained, and refuses what was not."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from omegaconf import DictConfig
from open_clip.transform import PreprocessCfg, image_transform_v2
from tiny_runs import without_model

import siftclip
from siftclip.datamodules.features.files import _warn_of_unknown_activation, read_feature_file
from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.models.record import fingerprint
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.errors import InputError
from siftclip.eval.results.files import read_results
from siftclip.files import (
    identity_hash,
    read_json,
    read_npz,
    read_npz_all,
    write_json,
    write_npz,
)
from siftclip.selectors.core.source import FeatureFile
from siftclip.trainer.builders.models import (
    activations_of_weights,
    checkpoint_options,
    clip_model_from,
    models_of,
)
from siftclip.trainer.builders.objective import open_loss_data
from siftclip.trainer.builders.selection import pool_from, select_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.settings.model import ModelOptions, ModelSettings
from siftclip.trainer.stages import eval_watch
from siftclip.trainer.stages import train as training
from siftclip.trainer.stages.embed import embed_stage
from siftclip.trainer.stages.eval_watch import watch_stage
from siftclip.trainer.stages.evaluation import eval_stage, results_path_for
from siftclip.trainer.stages.export import export_stage
from siftclip.trainer.stages.target import target_stage
from siftclip.trainer.stages.train import run_identity, train_stage

Compose = Callable[..., DictConfig]
Tiny = Callable[..., Path]

OPENAI = ["features.model.name=ViT-B-32", "features.model.pretrained=openai"]


@pytest.fixture
def weights(tiny_tags: Tiny) -> Path:
    """Of a tiny ViT-B-32, under all of its tags."""
    return tiny_tags("ViT-B-32")


@pytest.fixture
def embedding(base: list[str], tmp_path: Path) -> list[str]:
    return [*base, f"features.root={tmp_path / 'embedded'}", "features.name=b32", *OPENAI]


def twin(weights: Path, quick_gelu: bool) -> torch.nn.Module:
    """The model, built without a word from siftclip."""
    config = {**open_clip.get_model_config("ViT-B-32"), "quick_gelu": quick_gelu}
    model = open_clip.CLIP(**config)
    open_clip.load_checkpoint(model, str(weights))
    return model.eval()


def is_quick(model: torch.nn.Module) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in model.modules())


def old_manifest(folder: Path, **model: Any) -> None:
    """What earlier versions wrote, which kept no record of what they had built."""
    manifest = read_json(folder / "features.json")
    del manifest["loaded"]
    manifest["model"] |= model
    write_json(folder / "features.json", manifest)


@torch.no_grad()
def test_embedded_features_are_those_of_the_weights(
    embedding: list[str], compose: Compose, weights: Path
) -> None:
    config = compose("embed", embedding)
    folder = embed_stage(config)
    pool = pool_from(config.pool, progress=False)
    image = read_npz(folder / f"{pool.shards[0].stem}.npz", ["b32_img"])[0].astype(np.float32)
    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    reader = SampleReader(pool=pool, max_image_pixels=10**6)
    rows = pool.shard_rows(0)[:8].tolist()
    pixels = torch.stack([transform(reader.read_image(row)) for row in rows])
    for quick_gelu in (True, False):
        expected: Any = twin(weights, quick_gelu)
        features = expected.encode_image(pixels, normalize=True).numpy()
        assert np.allclose(features, image[:8], atol=2e-3) == quick_gelu
    assert read_json(folder / "features.json")["loaded"]["activation"] == "QuickGELU"


def test_features_of_a_wrong_activation_are_refused(
    embedding: list[str], compose: Compose, weights: Path, base: list[str]
) -> None:
    folder = embed_stage(compose("embed", embedding))
    selecting = ["selector=clip_score", "selector.features=b32", "selector.fraction=0.5"]
    select = compose("select", ["features=open_clip", *embedding, *selecting])
    assert len(select_stage(select).selection)
    old_manifest(folder)
    for stage, config in ((embed_stage, compose("embed", embedding)), (select_stage, select)):
        with pytest.raises(
            InputError,
            match=r"ViT-B-32 that an earlier version of siftclip made with GELU, while the weights "
            r"'openai' were trained with QuickGELU: .* Delete that folder and embed again, or "
            "choose another name for the feature set",
        ):
            stage(config)
    # right already, as far as anybody knows
    for model in (
        {"pretrained": "laion2b_s34b_b79k"},
        {"options": {"force_quick_gelu": True}},
        {"pretrained": "file.pt"},
        {"name": "some/folder", "pretrained": None},
    ):
        old_manifest_of = {"name": "ViT-B-32", "pretrained": "openai", "options": None} | model
        write_json(folder / "features.json", {"name": "b32", "model": old_manifest_of})
        select_stage(select)


def test_evaluation_takes_the_model_of_the_tag(
    compose: Compose, weights: Path, demo_data: DemoData, tmp_path: Path
) -> None:
    options = [
        *("model.name=ViT-B-32", "model.pretrained=openai", f"eval.root={demo_data.tasks}"),
        *("eval.tasks=[digit]", "eval.resamples=20", "progress=false", "data.num_workers=0"),
        f"output_dir={tmp_path}",
    ]
    config = compose("eval", options)
    path = results_path_for(config)
    clip = clip_model_from(config.model, trained=True)
    assert is_quick(clip.model)
    eval_stage(config, clip, results_path=path)
    assert read_results(path)[0].model == fingerprint(clip)
    record = read_json(path.with_name("eval_results_model.json"))
    assert record["activation"] == "QuickGELU"
    assert record["architecture"]["quick_gelu"] is True


def test_targets_are_features_of_the_same_model(
    base: list[str],
    compose: Compose,
    weights: Path,
    demo_data: DemoData,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = ["target.tasks=[digit]", f"target.root={demo_data.tasks}", "target.split=test"]
    config = compose("target", [*without_model(base), *OPENAI, "features.name=b32", *target])
    _, (path,) = target_stage(config)
    arrays = read_npz_all(path)
    right = load_clip_model("ViT-B-32", pretrained="openai")
    assert str(arrays["model"]) == fingerprint(right)
    assert str(arrays["activation"]) == "QuickGELU"

    def read() -> int:
        caplog.clear()
        _warn_of_unknown_activation.cache_clear()
        list(read_feature_file(FeatureFile(path=str(path), key="img"), 100))
        return len(caplog.records)

    assert read() == 0
    del arrays["activation"], arrays["identity"]  # as earlier versions wrote it
    for model in (arrays["model"], np.asarray("of GELU")):
        old = arrays | {"model": model, "img": arrays["img"] * (model == arrays["model"])}
        write_npz(path, **old)
        assert read() == 1
        assert "was made by an earlier version of siftclip" in caplog.text
        target_stage(config)
        assert read() == 0
        again = read_npz_all(path)
        assert str(again["activation"]) == "QuickGELU"
        assert np.array_equal(again["img"], arrays["img"])


def test_training_keeps_the_activation(
    base: list[str], compose: Compose, weights: Path, demo_data: DemoData, tmp_path: Path
) -> None:
    options = [
        *without_model(base),
        "model=vit_b_32",
        "model.pretrained=openai",
        "scale.samples_seen=32",
    ]
    run = train_stage(compose("train", options))
    assert read_json(run.path / "model.json")["activation"] == "QuickGELU"
    assert is_quick(load_clip_model(str(run.path)).model)
    theirs = open_clip.create_model(f"local-dir:{run.model}")
    assert is_quick(theirs)
    (checkpoint,) = run.checkpoints.glob("step-*.ckpt")
    by_file = load_clip_model("ViT-B-32", pretrained=str(checkpoint))
    assert is_quick(by_file.model)
    assert fingerprint(by_file) == fingerprint(load_clip_model(str(run.path)))

    # what is made of the checkpoint alone, as while the run goes on
    watched = eval_watch._load(run, checkpoint, "auto")
    assert watched is not None
    assert fingerprint(watched) == fingerprint(by_file)
    config = compose("eval_watch", [f"watch.run={run.path}", *_evaluated(demo_data)])
    list(watch_stage(config))
    written = run.path / "eval_watch" / f"{checkpoint.stem}_model.json"
    assert read_json(written)["activation"] == "QuickGELU"
    (run.model / "open_clip_config.json").unlink()
    for layout, place in (("open_clip", tmp_path / "model.pt"), ("local_dir", tmp_path / "dir")):
        words = [f"export.format={layout}", f"export.path={place}", f"export.source={checkpoint}"]
        export_stage(compose("export", words).export)
    assert is_quick(load_clip_model(str(tmp_path / "dir")).model)
    assert is_quick(load_clip_model("ViT-B-32", pretrained=str(tmp_path / "model.pt")).model)


def _evaluated(demo_data: DemoData) -> list[str]:
    quiet = ("logger=csv", "progress=false", "trainer.accelerator=cpu", "data.num_workers=0")
    tasks = (f"eval.root={demo_data.tasks}", "eval.tasks=[digit]", "eval.resamples=20")
    return [*tasks, *quiet, "watch.once=true"]


def test_runs_of_another_activation_are_not_continued(
    base: list[str], compose: Compose, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(*options: str) -> str:
        config = compose("train", [*without_model(base), "model=vit_b_32", *options])
        selected = select_stage(config)
        data = open_loss_data(config.loss, selected, max_bad_fraction=0)
        return identity_hash(run_identity(config, selected, data))

    changed, kept = ["model.pretrained=openai"], ["model.pretrained=laion2b_s34b_b79k"]
    now = [digest(*options) for options in (changed, kept)]
    monkeypatch.setattr(training, "activations_of_weights", lambda models: {})  # as it was
    before = [digest(*options) for options in (changed, kept)]
    assert now[0] != before[0]
    assert now[1] == before[1]


def test_all_models_of_a_run_are_looked_at(base: list[str], compose: Compose) -> None:
    config = compose(
        "train",
        [
            *base,
            *("loss=distill", "loss.teacher.model.name=ViT-B-16"),
            "loss.teacher.model.pretrained=dfn2b",
            "online=every_step",
            *("online.reference.model.name=RN50", "online.reference.model.pretrained=cc12m"),
        ],
    )
    assert activations_of_weights(models_of(config)) == {
        "loss.teacher.model": "QuickGELU",
        "online.reference.model": "QuickGELU",
    }
    models = {
        f"{path}.{key}"
        for path, node in _nodes(config.composed.values, "")
        for key in node
        if isinstance(node[key], dict) and {"name", "pretrained"} <= node[key].keys()
    }
    assert models - {".features.model"} <= {
        ".model",
        ".loss.teacher.model",
        ".online.reference.model",
        ".online.scorer",
    }


def _nodes(node: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(node, dict):
        return []
    below = [pair for key, value in node.items() for pair in _nodes(value, f"{path}.{key}")]
    return [(path, node), *below]


def test_options_of_checkpoints_without_a_record() -> None:
    """Earlier versions trained with the activation of the name, and the tag's preprocessing."""
    node = ModelSettings(name="ViT-B-32", pretrained="openai")
    assert checkpoint_options(node)["image_interpolation"] == "bicubic"
    assert "force_quick_gelu" not in checkpoint_options(node)
    node = replace(node, options=ModelOptions(image_interpolation="bilinear"))
    assert checkpoint_options(node)["image_interpolation"] == "bilinear"
    assert checkpoint_options(node)["image_mean"] is not None
    found = checkpoint_options(replace(node, pretrained="file.ckpt"))
    assert {name for name, value in found.items() if value is not None} == {"image_interpolation"}
    assert found["image_interpolation"] == "bilinear"


def test_one_function_builds_all_models() -> None:
    """What weights need is set where models are built, so nothing else may build one."""
    builders = {"create_model", "create_model_and_transforms", "create_model_from_pretrained"}
    builders |= {"get_tokenizer", "load_openai_model", "CLIP", "CustomTextCLIP", "CoCa"}
    callers = {
        path.name
        for folder in ("selectors", "datamodules", "eval", "trainer")
        for path in (Path(siftclip.__path__[0]) / folder).resolve().rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in builders
    }
    assert callers == {"load.py"}
