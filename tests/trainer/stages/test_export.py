"""What `siftclip export` writes gives open_clip and DataComp the source's outputs, bit for bit.

Run directories are written by hand here, so that their raw and averaged weights differ as wanted.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import open_clip
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from model_outputs import VOCABULARY, outputs
from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.models.load import ClipModel, load_clip_model, save_model_folder
from siftclip.errors import InputError
from siftclip.trainer.settings.commands import ExportCommand
from siftclip.trainer.settings.read_command import read_command
from siftclip.trainer.settings.store import composing
from siftclip.trainer.stages.export import DATACOMP_SCALES, describe_export, export_stage
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
Export = Callable[..., Any]
MakeRun = Callable[..., Path]

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 8, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 1}
CLIP: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP = {**CLIP, "custom_text": True, "init_logit_bias": -10}
COCA = {
    **CLIP,
    "custom_text": True,
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}
    | {"attn_pooler_queries": 4, "output_tokens": True},
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (CLIP, {}),
    "siglip": (SIGLIP, {}),
    "coca": (COCA, {}),
    "quick_gelu": (CLIP, {"force_quick_gelu": True}),
    "image_size": (CLIP, {"force_image_size": 48}),
    "context_length": (CLIP, {"force_context_length": 5}),
    "mean": (CLIP, {"image_mean": [0.5, 0.5, 0.5]}),
}
STEPS = 6


def of(clip: ClipModel) -> list[torch.Tensor]:
    return outputs(clip.model, clip.eval_transform, clip.tokenizer)


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


@functools.cache
def random_clip(kind: str, seed: int) -> ClipModel:
    """A model whose weights differ from the initial ones everywhere; not to be changed."""
    architecture, options = MODELS[kind]
    torch.manual_seed(seed)
    clip = load_clip_model("tiny", architecture=architecture, options=options)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return clip


@pytest.fixture(scope="module")
def configs() -> Compose:
    """Compose the configuration of a command; once for the same overrides, which takes a while."""
    GlobalHydra.instance().clear()

    @functools.cache
    def composed(command: str, *overrides: str) -> DictConfig:
        with composing():
            return hydra.compose(command, overrides=list(overrides))

    return lambda *words: copy.deepcopy(composed(*words))


@pytest.fixture
def make_run(tmp_path: Path, configs: Compose) -> MakeRun:
    """`make_run(kind, ...)`: a run directory; average of seed 1, raw weights of seed 2."""

    def make(
        kind: str = "clip",
        *,
        overrides: tuple[str, ...] = (),
        average: bool = True,
        finished: bool = True,
        step: int = STEPS,
        name: str | None = None,
    ) -> Path:
        run = tmp_path / "run"
        raw = random_clip(kind, 2)
        config = configs("train", "pool.root=/data/pool", "logger=csv", *overrides)
        architecture, options = MODELS[kind]
        config.model.name = name or "tiny"
        config.model.architecture = None if name else architecture
        config.model.options.update(options)
        state = {f"model.{key}": value for key, value in raw.model.state_dict().items()}
        if average:
            averaged = random_clip(kind, 1).model.state_dict()
            state.update({f"ema.averaged.{key}": value for key, value in averaged.items()})
        content = {"state_dict": state, "global_step": step, "loops": {}, "optimizer_states": []}
        (run / "checkpoints").mkdir(parents=True)
        torch.save(content, run / "checkpoints" / f"step-{step}.ckpt")
        (run / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        if finished:
            save_model_folder(random_clip(kind, 1 if average else 2), run / "model")
            (run / "summary.json").write_text(json.dumps({"steps": STEPS}))
        return run

    return make


@pytest.fixture
def export(configs: Compose) -> Export:
    """`export(source, path, format="open_clip", ...)` runs the stage."""

    def run(source: Path | str, path: Path | str, **options: Any) -> Any:
        config = configs("export")
        config.export.update({"source": str(source), "path": str(path), **options})
        values: Any = OmegaConf.to_container(config)
        return export_stage(read_command(ExportCommand, OmegaConf.create(values)).export)

    return run


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a tiny model that open_clip knows for the length of this file."""
    folder = tmp_path_factory.mktemp("model_configs")
    (folder / "ViT-tiny-test.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(folder)
    yield "ViT-tiny-test"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._rescan_model_configs()


# ---- every model, every layout ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "source"),
    [*((kind, "checkpoint") for kind in MODELS), ("coca", "run"), ("siglip", "folder")],
)
def test_local_dir_gives_the_same_outputs(
    kind: str, source: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    run = make_run(kind, finished=source != "checkpoint")
    at = {"run": run, "folder": run / "model", "checkpoint": run / "checkpoints" / "step-6.ckpt"}
    exported = export(at[source], tmp_path / "out", format="local_dir")
    name = f"local-dir:{tmp_path / 'out'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    assert_equal(outputs(model, transform, open_clip.get_tokenizer(name)), of(random_clip(kind, 1)))
    assert name in describe_export(exported)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_open_clip_file_gives_the_same_outputs(
    kind: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "model.pt"
    export(make_run(kind), path)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"epoch", "name", "state_dict", "open_clip_config"}
    assert isinstance(content["epoch"], int)
    assert content["name"] == "run"
    assert {v.dtype for v in content["state_dict"].values()} == {torch.float32}
    other = copy.deepcopy(random_clip(kind, 2).model)
    open_clip.load_checkpoint(other, str(path), weights_only=True)
    clip = random_clip(kind, 1)
    assert_equal(outputs(other, clip.eval_transform, clip.tokenizer), of(clip))
    assert list(path.parent.iterdir()) == [path]


def test_open_clip_file_of_a_built_in_model_is_a_pretrained_file(
    built_in: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    exported = export(make_run(name=built_in), path)
    model, _, transform = open_clip.create_model_and_transforms(built_in, pretrained=str(path))
    assert_equal(
        outputs(model, transform, open_clip.get_tokenizer(built_in)), of(random_clip("clip", 1))
    )
    assert f"create_model_and_transforms({built_in!r}, pretrained=" in describe_export(exported)


# ---- which weights ------------------------------------------------------------------------------
@pytest.mark.parametrize(("weights", "seed"), [("auto", 1), ("ema", 1), ("raw", 2)])
@pytest.mark.parametrize("of_checkpoint", [False, True])
def test_averaged_and_raw_weights(
    weights: str, seed: int, of_checkpoint: bool, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    run = make_run()
    source = run / "checkpoints" / "step-6.ckpt" if of_checkpoint else run
    export(source, tmp_path / "out", format="local_dir", weights=weights)
    assert_equal(of(load_clip_model(str(tmp_path / "out"))), of(random_clip("clip", seed)))


def test_run_without_average(make_run: MakeRun, export: Export, tmp_path: Path) -> None:
    run = make_run(average=False)
    for number, weights in enumerate(("auto", "raw")):
        export(run, tmp_path / f"{number}.pt", weights=weights)
    first, second = (torch.load(tmp_path / f"{n}.pt")["state_dict"] for n in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(InputError, match=r"holds no moving average"):
        export(run, tmp_path / "2.pt", weights="ema")


def test_weights_of_an_earlier_step_are_not_those_of_the_run(
    make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    run = make_run(step=4)
    with pytest.raises(InputError, match=r"of step 4 of 6. .* export.source=.*step-4.ckpt"):
        export(run, tmp_path / "x.pt", weights="raw")
    export(run / "checkpoints" / "step-4.ckpt", tmp_path / "x.pt", weights="raw")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match=r"from the last checkpoint, and there is none in"):
        export(run, tmp_path / "y.pt", weights="raw")
    export(run, tmp_path / "y.pt")


def test_unfinished_run_names_its_checkpoint(
    make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    run = make_run(finished=False)
    with pytest.raises(InputError, match=r"has not finished .* export.source=.*step-6.ckpt"):
        export(run, tmp_path / "x.pt")


def test_checkpoint_keeps_the_preprocessing_of_its_tag(
    make_run: MakeRun, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began from a tag has its mean; the tag's weights are not needed again."""
    run = make_run(finished=False)
    config = OmegaConf.load(run / "config.yaml")
    config.model.update({"name": "ViT-B-16-SigLIP", "pretrained": "webli", "architecture": None})
    OmegaConf.save(config, run / "config.yaml")
    seen: dict[str, Any] = {}

    def build(name: str, **options: Any) -> ClipModel:
        seen.update(options, name=name)
        return random_clip("clip", 1)

    monkeypatch.setattr("siftclip.trainer.stages.export.load_clip_model", build)
    export(run / "checkpoints" / "step-6.ckpt", tmp_path / "x.pt")
    assert seen["name"] == "ViT-B-16-SigLIP"
    assert seen["pretrained"].endswith("step-6.ckpt")
    assert tuple(seen["options"]["image_mean"]) == (0.5, 0.5, 0.5)
    assert seen["options"]["image_resize_mode"] == "squash"


# ---- DataComp -----------------------------------------------------------------------------------
def evaluate_py(train_output_dir: Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What DataComp's evaluate.py does with a training directory, up to the first features."""
    info = pickle.loads((train_output_dir / "info.pkl").read_bytes())  # noqa: S301 - our own
    if not Path(info["checkpoint"]).exists():
        info["checkpoint"] = train_output_dir / "checkpoints" / "epoch_latest.pt"
    architecture = info["scale_config"]["model"]
    model, _, transform = open_clip.create_model_and_transforms(
        architecture, pretrained=str(info["checkpoint"])
    )
    return info, outputs(model, transform, open_clip.get_tokenizer(architecture))


def test_datacomp_evaluates_the_model(
    built_in: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    run = make_run(name=built_in, overrides=("scale.samples_seen=96", "optim.beta2=0.9"))
    exported = export(run, tmp_path / "out", format="datacomp")
    info, found = evaluate_py(tmp_path / "out")
    assert_equal(found, of(random_clip("clip", 1)))
    assert info == {
        "scale": "custom",
        "checkpoint": str((tmp_path / "out" / "checkpoints" / "epoch_latest.pt").resolve()),
        "scale_config": {
            "batch_size": 256,
            "learning_rate": 2.0e-3,
            "train_num_samples": 96,
            "warmup": 50,
            "model": built_in,
            "beta2": 0.9,
        },
        "data_dir": "/data/pool",
    }
    assert "evaluate.py --train_output_dir" in describe_export(exported)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert_equal(evaluate_py(tmp_path / "moved")[1], found)


def test_info_is_unpickled_without_any_module(
    built_in: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    """A path would need the pathlib of the Python that wrote it."""
    export(make_run(name=built_in), tmp_path / "out", format="datacomp")

    class Strict(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise AssertionError(f"{module}.{name}")

    with (tmp_path / "out" / "info.pkl").open("rb") as file:
        assert Strict(file).load()["scale"] == "custom"


def test_model_folder_is_recognised_without_a_configuration(
    built_in: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    export(make_run() / "model", tmp_path / "out", format="datacomp")
    info, found = evaluate_py(tmp_path / "out")
    assert info["scale_config"] == {"model": built_in}
    assert_equal(found, of(random_clip("clip", 1)))


def test_scales_of_datacomp_are_recognised(
    make_run: MakeRun, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siftclip.trainer.stages.export._built_in_name", lambda source: "ViT-B-32")
    run = make_run(overrides=("scale=datacomp_small",))
    export(run, tmp_path / "out", format="datacomp")
    info = pickle.loads((tmp_path / "out" / "info.pkl").read_bytes())  # noqa: S301 - our own
    assert info["scale"] == "small"
    assert info["scale_config"] == DATACOMP_SCALES["small"]


@pytest.mark.parametrize("kind", ["siglip", "image_size", "mean"])
def test_datacomp_needs_a_model_that_has_a_name(
    kind: str, built_in: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no name stands for .* Take export.format=local_dir"):
        export(make_run(kind), tmp_path / "out", format="datacomp")
    assert not (tmp_path / "out").exists()


def test_results_of_another_model_are_not_left_beside(
    built_in: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval_results.jsonl").touch()
    with pytest.raises(InputError, match=r"holds eval_results.jsonl, which evaluate.py would"):
        export(make_run(), tmp_path / "out", format="datacomp", overwrite=True)


# ---- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["open_clip", "local_dir", "datacomp"])
def test_nothing_is_overwritten_unless_told(
    layout: str, built_in: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    run, path = make_run(name=built_in), tmp_path / "out.pt"
    export(run, path, format=layout)
    files = [path, *path.rglob("*")]
    before = {file: file.read_bytes() for file in files if file.is_file()}
    assert before
    with pytest.raises(InputError, match=r"out.pt' exists. .* export.overwrite=true"):
        export(run, path, format=layout, weights="raw")
    assert {file: file.read_bytes() for file in before} == before
    export(run, path, format=layout, weights="raw", overwrite=True)
    assert {file for file, data in before.items() if file.read_bytes() != data}
    expected = of(random_clip("clip", 2))
    if layout == "local_dir":
        assert_equal(of(load_clip_model(str(path))), expected)
    elif layout == "datacomp":
        assert_equal(evaluate_py(path)[1], expected)
    else:
        assert_equal(of(load_clip_model(built_in, pretrained=str(path))), expected)


@pytest.mark.parametrize("layout", ["open_clip", "local_dir", "datacomp"])
def test_weights_that_are_not_finite_are_not_written(
    layout: str, built_in: str, make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    run = make_run(name=built_in, finished=False)
    file = run / "checkpoints" / "step-6.ckpt"
    content = torch.load(file, weights_only=True)
    content["state_dict"]["model.ln_final.weight"][3] = float("nan")
    torch.save(content, file)
    with pytest.raises(InputError, match=r"the weights 'ln_final.weight' hold NaN or infinity"):
        export(file, tmp_path / "out.pt", format=layout, weights="raw")
    assert not [path for path in (tmp_path / "out.pt").rglob("*") if path.is_file()]
    assert not (tmp_path / "out.pt").is_file()
    shutil.rmtree(tmp_path / "out.pt", ignore_errors=True)
    export(file, tmp_path / "out.pt", format=layout)  # the average is finite


@pytest.mark.parametrize("point", ["replace", "save"])
def test_killed_export_leaves_no_half(
    point: str,
    built_in: str,
    make_run: MakeRun,
    export: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(name=built_in)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "replace") if point == "replace" else (torch, "save")), stop)
        with pytest.raises(KeyboardInterrupt):
            export(run, tmp_path / "out", format="datacomp")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    export(run, tmp_path / "out", format="datacomp", overwrite=True)
    evaluate_py(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "onnx"},
            r"export.format must be one of ['open_clip', 'local_dir', 'datacomp']",
        ),
        ({"weights": "swa"}, r"export.weights must be one of ['auto', 'ema', 'raw']. Got 'swa'"),
        ({"overwrite": "maybe"}, r"export.overwrite must be true or false. Got 'maybe'"),
        ({"path": "x.safetensors"}, r"export.path must end in .pt for open_clip"),
        ({"source": "nowhere"}, r"export.source must be a run directory (with config.yaml), a mod"),
        ({"source": "???"}, r"export.source must be given, such as export.source=outputs/train"),
        ({"path": "???"}, r"export.path must be given, such as export.path=model.pt"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, str], message: str, export: Export, tmp_path: Path
) -> None:
    given = {"source": tmp_path, "path": tmp_path / "x.pt", **options}
    with pytest.raises(InputError, match=re.escape(message)):
        export(**given)


def test_sources_and_targets_that_do_not_fit(
    make_run: MakeRun, export: Export, tmp_path: Path
) -> None:
    run = make_run()
    with pytest.raises(InputError, match=r"weights='raw' needs a run directory or a .ckpt file"):
        export(run / "model", tmp_path / "x.pt", weights="raw")
    with pytest.raises(InputError, match=r"x' is what is exported|run/model' is what is exported"):
        export(run, run / "model", format="local_dir", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file' is a file. Name a folder"):
        export(run, tmp_path / "file", format="local_dir", overwrite=True)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match=r"folder.pt' is a folder. Name a file"):
        export(run, tmp_path / "folder.pt", overwrite=True)
    shutil.copy(run / "checkpoints" / "step-6.ckpt", tmp_path / "alone.ckpt")
    with pytest.raises(InputError, match=r"alone.ckpt' must lie in a run directory"):
        export(tmp_path / "alone.ckpt", tmp_path / "x.pt")
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(InputError, match=r"config.yaml is not the configuration of a run"):
        export(run, tmp_path / "x.pt")


# ---- a run as training leaves it ----------------------------------------------------------------
def test_trained_run_is_exported(
    base: list[str], compose: Compose, export: Export, tmp_path: Path
) -> None:
    """With what makes the weights of training differ from a plain model's."""
    lock = ["model.lock.image=true", "model.lock.image_freeze_bn_stats=true"]
    options = ["model.options.force_custom_text=true", "optim.ema_decay=0.5"]
    run = train_stage(compose("train", [*base, "model=rn_tiny", *lock, *options]))
    found = {}
    for weights in ("auto", "ema", "raw"):
        export(run.path, tmp_path / weights, format="local_dir", weights=weights)
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / weights}")
        found[weights] = model.state_dict()
    folder = load_clip_model(str(run.path)).model.state_dict()
    last = torch.load(run.checkpoints / f"step-{STEPS}.ckpt", weights_only=True)["state_dict"]
    for key, value in folder.items():
        assert torch.equal(found["auto"][key], value)
        assert torch.equal(found["ema"][key], value)
        if not key.endswith("num_batches_tracked"):  # a frozen batch norm has none
            assert torch.equal(found["raw"][key], last[f"model.{key}"])
    assert not torch.equal(found["raw"]["text.text_projection"], folder["text.text_projection"])
    assert torch.equal(found["raw"]["visual.bn1.running_var"], folder["visual.bn1.running_var"])


# ---- the command --------------------------------------------------------------------------------
def test_command_starts_without_lightning_and_explains_itself(new_cli: Any) -> None:
    code = (
        "import sys, siftclip.trainer.cli.commands.export_command\n"
        "print(sorted({'lightning', 'open_clip', 'torch', 'wandb'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
    shown = new_cli("export", "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("siftclip export: ")


def test_command_prints_what_the_stage_wrote(tmp_path: Path) -> None:
    """With a stage that does nothing: importing the real one takes the time of all tests here."""
    code = (
        "import sys, types\n"
        "stage = types.ModuleType('siftclip.trainer.stages.export')\n"
        "stage.export_stage = lambda options: options.path\n"
        "stage.describe_export = lambda exported: f'wrote {exported}'\n"
        "sys.modules[stage.__name__] = stage\n"
        "from siftclip.trainer.cli.main import main\n"
        "main()"
    )
    words = ["export", "export.source=run", "export.path=model.pt"]
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout == "wrote model.pt\n", result.stderr
    assert not list(tmp_path.iterdir())
