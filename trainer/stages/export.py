"""`siftclip export`: a trained model in the layouts that open_clip and DataComp read.

open_clip  one file {epoch, name, state_dict}, as open_clip's training writes it, and what model it
           is of, for siftclip
local_dir  a model folder: what `local-dir:` and the Hugging Face hub hold
datacomp   checkpoints/epoch_latest.pt and info.pkl, which DataComp's evaluate.py reads

All weights are written in fp32 and must be finite. Files are replaced one by one, and what tells a
reader that all is there (the config, info.pkl) comes last.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siftclip.datamodules.models.load import (
    WEIGHTS_NAME,
    ClipModel,
    load_clip_model,
    save_model_folder,
)
from siftclip.datamodules.models.sharded_checkpoint import is_weights_file
from siftclip.datamodules.models.weight_needs import CONFIG_NAME
from siftclip.datamodules.models.weights import (
    CONFIG_KEY,
    Weights,
    portable_weights,
)
from siftclip.errors import InputError
from siftclip.files import write_torch
from siftclip.locks import lock_beside, locked
from siftclip.trainer.builders.models import checkpoint_options
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.run_records import read_config
from siftclip.trainer.settings.data import ScaleSettings
from siftclip.trainer.settings.fields.reader import read_kept
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.settings.tools import ExportSettings
from siftclip.writing import atomic_path, delete_file, new_folder_whole

INFO_NAME = "info.pkl"
CHECKPOINT_NAME = "checkpoints/epoch_latest.pt"
# open_clip counts finished passes over what it calls an epoch; a run of ours is one.
EPOCH = 1
# How DataComp (arXiv 2304.14108) trains: its scale_configs.py. beta2 None: open_clip's.
DATACOMP_SCALES: dict[str, dict[str, Any]] = {
    name: {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "train_num_samples": samples,
        "warmup": warmup,
        "model": model,
        "beta2": beta2,
    }
    for name, batch_size, learning_rate, samples, warmup, model, beta2 in (
        ("debug", 1024, 1e-4, 128_000, 500, "ViT-B-32", None),
        ("small", 4096, 5e-4, 12_800_000, 500, "ViT-B-32", None),
        ("medium", 4096, 5e-4, 128_000_000, 500, "ViT-B-32", None),
        ("large", 8192, 5e-4, 1_280_000_000, 500, "ViT-B-16", None),
        ("xlarge", 90112, 1e-3, 12_800_000_000, 10000, "ViT-L-14", 0.95),
    )
}
OPEN_CLIP_BETA2 = 0.98  # for ViTs
CUSTOM_SCALE = "custom"  # no scale of DataComp


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run was asked to train."""

    model: ModelSettings
    optim: OptimSettings
    scale: ScaleSettings
    pool_root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """A model to export, and what is known about how it came about."""

    clip: ClipModel
    label: str  # what the checkpoint calls it
    origin: Path  # the folder or file that the weights come from
    run: RunSettings | None  # of the run that trained it


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, and how to load it."""

    origin: Path
    path: Path
    files: list[Path]
    loading: str


def export_stage(options: ExportSettings) -> Exported:
    """Write the model of a run, a folder or a checkpoint in the layout that `export` asks for.

    Raises:
        InputError: the source holds no such model, its weights are not finite, or something lies
            where it would be written.
    """
    path, source_path = Path(options.path), Path(options.source)
    _check_target(options.format, path, overwrite=options.overwrite)
    with locked(lock_beside(path), owner=f"export.path={str(path)!r}"):
        _check_target(options.format, path, overwrite=options.overwrite)  # no longer changes
        source = open_source(source_path, options.weights)
        if path.resolve() in (source.origin.resolve(), source_path.resolve()):
            raise InputError(f"export.path={str(path)!r} is what is exported. Name another path.")
        with new_folder_whole(path):
            return _WRITERS[options.format](source, path)


def describe_export(exported: Exported) -> str:
    """Describe what was exported, as the command prints it."""
    written = "\n           ".join(str(path) for path in exported.files)
    return f"source     {exported.origin}\nwritten    {written}\nload       {exported.loading}"


# ---- the source ---------------------------------------------------------------------------------
def open_source(source: Path, weights: Weights) -> ExportSource:
    """Open the model of a run directory, a model folder or a Lightning checkpoint of a run.

    A run's model folder holds what the run was asked for; its other weights, averaged or not, come
    from its last checkpoint, which must be of the last step.

    Raises:
        InputError: there is no such model, or not with these weights.
    """
    run = RunDir(path=source)
    if (source / "config.yaml").is_file():
        return _source_of_run(run, weights)
    if source.suffix == ".ckpt" and is_weights_file(source):
        return _source_of_checkpoint(source, weights)
    if (source / CONFIG_NAME).is_file():
        if weights != "auto":
            raise InputError(
                f"export.weights={weights!r} needs a run directory or a .ckpt file; the model "
                f"folder {source} holds one set of weights. Set export.weights=auto."
            )
        clip = load_clip_model(str(source))
        return ExportSource(clip=clip, label=source.name, origin=source, run=None)
    raise InputError(
        "export.source must be a run directory (with config.yaml), a model folder (with "
        f"{CONFIG_NAME}), or a .ckpt file of a run. Got {str(source)!r}."
    )


def _source_of_run(run: RunDir, weights: Weights) -> ExportSource:
    last = run.latest_checkpoint()
    if not run.has_model:
        hint = f" What it has so far: export.source={last}" if last else ""
        raise InputError(f"export.source={str(run.path)!r} has not finished training.{hint}")
    settings = _run_settings(run)
    if weights == "auto":
        clip = load_clip_model(str(run.model))
        return ExportSource(clip=clip, label=run.path.name, origin=run.model, run=settings)
    if last is None:
        raise InputError(
            f"export.weights={weights!r} takes them from the last checkpoint, and there is none in "
            f"{run.checkpoints}. Set export.weights=auto for what training has written."
        )
    step, steps = int(last.stem.split("-")[1]), (run.summary or {}).get("steps")
    if step != steps:
        raise InputError(
            f"export.weights={weights!r} takes them from the last checkpoint, which is of step "
            f"{step} of {steps}. To export that one: export.source={last}"
        )
    return _source_of_checkpoint(last, weights)


def _source_of_checkpoint(path: Path, weights: Weights) -> ExportSource:
    folder = next((at for at in path.resolve().parents[:2] if (at / "config.yaml").is_file()), None)
    if folder is None:
        raise InputError(
            f"export.source={str(path)!r} must lie in a run directory, whose config.yaml tells the "
            "architecture: RUN/checkpoints/step-N.ckpt."
        )
    run = RunDir(path=folder)
    settings = _run_settings(run)
    options: dict[str, Any] = {}
    name, architecture = settings.model.name, to_plain(settings.model.architecture)
    if run.has_model:  # knows all of that without the files that training began from
        name, architecture = str(run.model), None
    else:
        options = checkpoint_options(settings.model)
    clip = load_clip_model(
        name,
        architecture=architecture,
        options=options,
        pretrained=str(path),
        weights=weights,
    )
    return ExportSource(clip=clip, label=f"{folder.name}-{path.stem}", origin=path, run=settings)


def _run_settings(run: RunDir) -> RunSettings:
    path = run.config
    config = read_config(path)
    parts = {name: config.get(name) for name in ("model", "optim", "scale", "pool")}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise InputError(f"{path} is not the configuration of a run: it has no {name}.")
    try:
        return RunSettings(
            model=read_kept(ModelSettings, config["model"], "model"),
            optim=read_kept(OptimSettings, config["optim"], "optim"),
            scale=read_kept(ScaleSettings, config["scale"], "scale"),
            pool_root=str(config["pool"].get("root")),
        )
    except InputError as error:
        raise InputError(f"{path} is not the configuration of a run: {error}") from error


# ---- the target ---------------------------------------------------------------------------------
def _check_target(layout: str, path: Path, *, overwrite: bool) -> None:
    """Refuse to write over what is there, before a model is loaded."""
    if layout == "open_clip":
        if path.suffix != ".pt":  # other suffixes mean other formats to open_clip
            raise InputError(f"export.path must end in .pt for open_clip. Got {str(path)!r}.")
        if path.is_dir():
            raise InputError(f"export.path={str(path)!r} is a folder. Name a file.")
    elif path.exists() and not path.is_dir():
        raise InputError(f"export.path={str(path)!r} is a file. Name a folder.")
    if layout == "datacomp" and (path / "eval_results.jsonl").exists():
        raise InputError(
            f"export.path={str(path)!r} holds eval_results.jsonl, which evaluate.py would take for "
            "results of this model. Name another folder."
        )
    there = path.exists() and (layout == "open_clip" or any(path.iterdir()))
    if there and not overwrite:
        raise InputError(
            f"export.path={str(path)!r} exists. Name another path, or set export.overwrite=true."
        )


def _write_checkpoint(source: ExportSource, path: Path) -> None:
    """Write what open_clip's `load_checkpoint` reads, in fp32."""
    state = portable_weights(source.clip.model.state_dict(), str(source.origin))
    content = {
        "epoch": EPOCH,
        "name": source.label,
        "state_dict": state,
        CONFIG_KEY: source.clip.config,  # open_clip passes over it; we read it
    }
    write_torch(path, content)


def _write_open_clip(source: ExportSource, path: Path) -> Exported:
    _write_checkpoint(source, path)
    name = _built_in_name(source)
    if name is None:
        loading = f"open_clip.load_checkpoint(model, {str(path)!r})"
    else:
        loading = f"open_clip.create_model_and_transforms({name!r}, pretrained={str(path)!r})"
    return Exported(origin=source.origin, path=path, files=[path], loading=loading)


def _write_local_dir(source: ExportSource, path: Path) -> Exported:
    delete_file(path / CONFIG_NAME)  # until the new one is complete
    save_model_folder(source.clip, path)
    return Exported(
        origin=source.origin,
        path=path,
        files=[path / CONFIG_NAME, path / WEIGHTS_NAME],
        loading=f"open_clip.create_model_and_transforms('local-dir:{path}')",
    )


def _write_datacomp(source: ExportSource, path: Path) -> Exported:
    name = _built_in_name(source)
    if name is None:
        raise InputError(
            f"{source.origin}: evaluate.py of DataComp builds a model by its name in open_clip, "
            "and no name stands for this architecture and preprocessing. Take "
            "export.format=local_dir, or siftclip eval."
        )
    checkpoint = path / CHECKPOINT_NAME
    delete_file(path / INFO_NAME)  # until the new one is complete
    _write_checkpoint(source, checkpoint)
    with atomic_path(path / INFO_NAME) as temporary:
        temporary.write_bytes(pickle.dumps(_training_info(source, name, checkpoint), protocol=4))
    return Exported(
        origin=source.origin,
        path=path,
        files=[checkpoint, path / INFO_NAME],
        loading=f"python evaluate.py --train_output_dir {path} --data_dir TASKS",
    )


def _training_info(source: ExportSource, model: str, checkpoint: Path) -> dict[str, Any]:
    """Return what DataComp's train.py writes into info.pkl, in types that any Python unpickles.

    `scale` is one of DataComp's where the run was trained exactly so, else `custom`.
    """
    info = {"scale": CUSTOM_SCALE, "checkpoint": str(checkpoint.resolve())}
    run = source.run
    if run is None:
        return {**info, "scale_config": {"model": model}, "data_dir": None}
    ours = {
        "batch_size": run.scale.global_batch_size,
        "learning_rate": run.optim.lr,
        "train_num_samples": run.scale.samples_seen,
        "warmup": run.optim.warmup_steps,
        "model": model,
        "beta2": run.optim.beta2,
    }
    for scale, theirs in DATACOMP_SCALES.items():
        if ours == {**theirs, "beta2": theirs["beta2"] or OPEN_CLIP_BETA2}:
            return {
                **info,
                "scale": scale,
                "scale_config": dict(theirs),
                "data_dir": run.pool_root,
            }
    return {**info, "scale_config": ours, "data_dir": run.pool_root}


def _built_in_name(source: ExportSource) -> str | None:
    """Find the name under which open_clip builds just this model, preprocessing included."""
    import open_clip

    config = source.clip.config
    default = open_clip.transform.PreprocessCfg()
    for key in ("mean", "std", "interpolation", "resize_mode", "mode", "fill_color"):
        ours, theirs = config["preprocess_cfg"][key], getattr(default, key)
        if (list(ours) if isinstance(ours, (list, tuple)) else ours) != (
            list(theirs) if isinstance(theirs, (list, tuple)) else theirs
        ):
            return None
    wanted = _comparable(config["model_cfg"])
    names = open_clip.list_models()
    if source.run is not None and source.run.model.name in names:  # first among equals
        names = [source.run.model.name, *names]
    return next(
        (name for name in names if _comparable(open_clip.get_model_config(name)) == wanted), None
    )


def _comparable(model_cfg: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return an architecture without what only random weights depend on."""
    skipped = ("init_logit_scale",)
    return {key: value for key, value in (model_cfg or {}).items() if key not in skipped}


_WRITERS: dict[str, Callable[[ExportSource, Path], Exported]] = {
    "open_clip": _write_open_clip,
    "local_dir": _write_local_dir,
    "datacomp": _write_datacomp,
}
