"""Record what Siftclip answers: digests of selections, names of folders, losses to the bit.

    python tests/recording/record.py FOLDER             record into FOLDER
    python tests/recording/record.py FOLDER --keep      first make FOLDER/before.tar.xz anew

Everything goes through the command line, in the folder that before.tar.xz holds: a small pool with
features, tasks and columns, and what an earlier commit has kept of them. test_recording.py compares
with the files beside this one, and `make record` writes these: their diff says what a change of the
code changes for users.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "helpers"))
from python_server import run_requests, warm_up  # noqa: E402 - tests are no package

NAME_OF_BEFORE = "before.tar.xz"

POOL = [
    *("pool.root=pool", "features.root=features", "features.name=noise", "progress=false"),
    *("output_dir=outputs", "trainer.accelerator=cpu", "trainer.devices=1"),
]
TRAIN = [
    *(*POOL, "model=vit_tiny", "logger=csv", "data.num_workers=0", "trainer.log_every_n_steps=1"),
    *("scale.samples_seen=128", "scale.global_batch_size=16", "optim.warmup_steps=2"),
]
ALL = ["selector=random", "selector.fraction=1"]
HALF = ["selector=clip_score", "selector.fraction=0.5"]
JEST = ["selector@online.selector=jest", "online.selector.fraction=0.5"]
EASY = ["selector@online.selector=easy_reference", "online.selector.fraction=0.5"]
RUNS: dict[str, list[str]] = {
    "plain": [*HALF, "eval.root=eval"],
    "repetitions": ["selector=soft_cap", "selector.path=columns.parquet", "selector.column=score"],
    "siglip_resnet": [*ALL, "loss=siglip", "model=rn_tiny", "optim.ema_decay=0.9"],
    "jest_every_step": [*ALL, "online=every_step", *JEST],
    "easy_reference_micro_batches": [
        *(*ALL, "online=every_step", *EASY, "trainer.micro_batch_size=8"),
    ],
    "every_2_steps": [*ALL, "online=every_n_steps", "online.every_n_steps=2"],
    "every_epoch": [*HALF, "online=every_epoch"],
}
FSDP = [*ALL, "trainer.strategy=fsdp", "trainer.devices=2"]
# A model whose weights are few, of a run that is kept in the archive
FEW_WEIGHTS = [
    *("model.architecture.embed_dim=8", "model.architecture.text_cfg.width=2"),
    *("model.architecture.text_cfg.heads=1", "model.architecture.vision_cfg.width=16"),
    *("model.architecture.vision_cfg.head_width=8", "optim.weight_decay=0"),
]
FINISHED = [*TRAIN, *HALF, *FEW_WEIGHTS, "eval.root=eval", "seed=1"]
KILLED = [
    *(*TRAIN, *ALL, *FEW_WEIGHTS, "scale.samples_seen=320", "online=every_step", *JEST),
    *("trainer.checkpoint_every_n_steps=2", "seed=1"),
]
EMBED = [
    *("pool.root=pool", "progress=false", "trainer.accelerator=cpu", "trainer.devices=1"),
    *("features=open_clip", "features.name=tiny", "features.model.name=model"),
]
MODEL = ["model.name=model", "progress=false", "trainer.accelerator=cpu", "trainer.devices=1"]
TARGET = [*EMBED[1:], "target.root=eval", "target.split=test", "output_dir=outputs"]
EVAL = [*MODEL, "eval.root=eval", "output_dir=outputs"]


def _target(*nodes: str) -> list[str]:
    return [f"selector.{node}.path=target.npz" for node in nodes]


# Options of selectors beyond their names and POOL; those that are not here are in NOT_ALONE
SELECTORS: dict[str, list[str]] = {
    "a_optimal": [],
    "cabs": [],
    "cabs_frequency": [],
    "clip_score": [],
    "clip_score_b32_20pct": ["features.name=b32"],
    "clip_score_b32_30pct": ["features.name=b32"],
    "clip_score_column": [],
    "clipcov": _target("labels"),
    "clipcov_10pct": ["features.name=b32", *_target("labels")],
    "density": ["selector.clustering.clusters=4"],
    "dfn_hype_negclip_normsim": [
        *("selector.selectors.dfn.path=subset.npy", "selector.selectors.hype.path=subset.npy"),
        *_target("selectors.ours.stages.normsim.target"),
    ],
    "dfn_negclip_normsim": [
        "selector.selectors.dfn.path=subset.npy",
        *_target("selectors.ours.stages.normsim.target"),
    ],
    "dynamics": [],
    "external": [
        *("selector.path=columns.parquet", "selector.column=score", "selector.fraction=0.5"),
    ],
    "hard_cap": ["selector.path=columns.parquet", "selector.column=score"],
    "image_based": _target("target"),
    "metaclip": ["selector.entries=entries.txt"],
    "mix": [],
    "nearest": _target("target"),
    "nearest_rank": _target("target"),
    "negclip_30pct": [],
    "negclip_normsim2_target": _target("stages.normsim.target"),
    "negclip_normsim_d": _target("selectors.static.stages.normsim.target"),
    "negclip_normsim_in1k": _target("stages.normsim.target"),
    "negclip_normsim_target": _target("stages.normsim.target"),
    "negcliploss": [],
    "negcliploss_dfn_p": [],
    "normsim": _target("target"),
    "normsim_d": ["selector.steps=5"],
    "normsim_d_clip": ["selector.stages.normsim_d.steps=5"],
    "plugin": ["selector.plugin=clip_score", "+selector.features=noise"],
    "quota": ["selector.clusters.path=columns.parquet"],
    "random": [],
    "rank_sum": _target("selectors.normsim.target"),
    "semdedup": ["selector.clustering.clusters=4"],
    "soft_cap": ["selector.path=columns.parquet", "selector.column=score"],
    "softmax": [],
    "v_optimal": _target("target"),
    "vas": _target("target"),
    "vas_clip": _target("stages.vas.target"),
    "vas_d": ["selector.steps=5"],
    "vas_d_clip": ["selector.stages.vas_d.steps=5"],
}
# These need a learner in training, or a package or model that is not installed with Siftclip
NOT_ALONE = {
    *("hard", "jest", "learnability", "easy_reference", "running_vas", "infobatch"),
    *("basic", "image_based_captions", "image_based_clip_score", "laion2b", "text_based"),
}
KEPT_SELECTORS = ("clip_score", "negcliploss", "vas_clip", "normsim_d", "clipcov", "quota")
COMMANDS = {  # options without which `--cfg job` composes what nobody uses
    **dict.fromkeys(("index", "embed", "target", "score", "eval", "eval_watch", "eval_diff"), ()),
    **dict.fromkeys(("eval_download", "export", "data_compact", "data_bench", "demo"), ()),
    "select": ("selector=vas_clip",),
    "train": ("online=every_step", "selector@online.first_stage.selector=clip_score"),
    "compare": ("experiment=testbed_online",),
}
OF_TIME = ("time", "second", "wait", "memory")  # parts of names whose values no run repeats
_REUSE = re.compile(r"INFO (not )?reused")
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d")


# ---- running commands ---------------------------------------------------------------------------
class Commands:
    """Runs `siftclip ...` in a folder, in processes forked from this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._output = Path(tempfile.mkdtemp(prefix="recorded-"))
        drop = ("RANK", "WORLD_SIZE", "TORCHELASTIC", "WANDB", "SIFTCLIP", "HYDRA")
        kept = {k: v for k, v in os.environ.items() if not any(word in k for word in drop)}
        self.environment = {**kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

    def run(self, *words: str, ranks: int | None = None) -> tuple[str, str]:
        """What a command prints, to its output and as errors; it has to end well."""
        (printed,) = self.run_all([words], ranks)
        return printed

    def run_all(
        self, commands: Sequence[Sequence[str]], ranks: int | None = None
    ) -> list[tuple[str, str]]:
        """What commands print that run one after the other in one process, which is faster."""
        requests = [self._request(words, ranks) for words in commands]
        child = _start(requests)
        child.join()
        printed = []
        for request in requests:
            files = [Path(request[name]) for name in ("stdout", "stderr")]
            if not files[0].exists():  # the one before it failed
                break
            printed.append(tuple(path.read_text(encoding="utf-8") for path in files))
        if child.exitcode:
            words = " ".join(commands[len(printed) - 1])
            raise RuntimeError(f"siftclip {words}: {child.exitcode}\n{printed[-1][1][-3000:]}")
        return printed

    def kill(self, *words: str, once: str) -> None:
        """Run a command, and kill it as soon as a file of this name, a pattern, is there."""
        child = _start([self._request(words, None)])
        while not list(self.folder.glob(once)):
            if child.exitcode is not None:
                raise RuntimeError(f"siftclip {' '.join(words)} ended before it was killed")
            time.sleep(0.001)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()

    def _request(self, words: Sequence[str], ranks: int | None) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(dir=self._output))
        return {
            "words": ["-m", "siftclip.trainer.cli", *words],
            "cwd": str(self.folder),
            "environment": self.environment,
            "ranks": ranks,
            "stdout": str(folder / "stdout"),
            "stderr": str(folder / "stderr"),
        }


def _start(requests: list[dict[str, Any]]) -> multiprocessing.Process:
    context = multiprocessing.get_context("fork")
    child: Any = context.Process(target=run_requests, args=(requests,))
    child.start()
    return child  # type: ignore[no-any-return]  # a ForkProcess is a Process


def unpack(archive: Path, folder: Path) -> Path:
    """The folder that an archive of `keep` holds, with the times of its files."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "before"


# ---- what an earlier commit keeps ---------------------------------------------------------------
def keep(archive: Path) -> None:
    """Make the inputs, run commands on them, and archive both."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "before"
        make_inputs(folder)
        commands = Commands(folder)
        for name in KEPT_SELECTORS:
            commands.run("select", *POOL, f"selector={name}", *SELECTORS[name])
        commands.run("train", *FINISHED)
        (run,) = (folder / "outputs" / "train").iterdir()
        shutil.copytree(run / "model", folder / "model")
        _set_times(folder / "model")
        shutil.rmtree(run / "checkpoints")  # large, and not needed any more
        commands.run("embed", *EMBED)
        commands.run("target", *TARGET)
        commands.kill("train", *KILLED, once="outputs/train/*+jest*/checkpoints/step-8.ckpt")
        for path in folder.glob("outputs/train/random*/**/.*.tmp"):
            path.unlink()  # of the kill
        archive.unlink(missing_ok=True)
        with tarfile.open(archive, "w:xz", format=tarfile.PAX_FORMAT, preset=9) as tar:
            tar.add(folder, arcname="before", filter=_anonymous)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def make_inputs(folder: Path) -> None:
    """A pool with features of random numbers, columns, a subset, a target, and tasks."""
    import pandas as pd
    from numpy.lib.recfunctions import unstructured_to_structured

    from siftclip.trainer.demo.pool import write_demo_data

    sizes = {"classification_samples": 12, "count_samples": 12, "retrieval_samples": 8}
    write_demo_data(folder, pool_samples=96, teacher_samples=1, progress=False, **sizes)  # type: ignore[arg-type]  # all are whole numbers
    for name in ("teacher", "truth", "subsets"):
        shutil.rmtree(folder / name)
    (folder / "demo_data.json").unlink()
    generator = np.random.default_rng(0)
    (metadata,) = (folder / "pool" / "metadata").glob("*.parquet")
    table = pd.read_parquet(metadata)
    samples = len(table)
    table["cluster"] = generator.integers(0, 4, samples)
    table["concepts"] = [generator.choice(6, size, replace=False) for size in table["cluster"]]
    for model in ("noise", "b32"):
        table[f"clip_{model}_similarity_score"] = generator.random(samples)
    table.to_parquet(metadata, index=False)
    uids = np.array([[int(uid[:16], 16), int(uid[16:], 16)] for uid in table["uid"]], dtype="u8")
    arrays = {}
    for model in ("noise", "b32", "l14"):
        image = generator.standard_normal((samples, 8))
        text = image + generator.standard_normal((samples, 8))
        for key, values in (("img", image), ("txt", text)):
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            arrays[f"{model}_{key}"] = values.astype(np.float16)
    (folder / "features").mkdir()
    np.savez(folder / "features" / "part.npz", uids=uids, **arrays)
    target = {key: generator.standard_normal((n, 8)) for key, n in (("img", 12), ("class_txt", 5))}
    np.savez(
        folder / "target.npz",
        **{k: (v / np.linalg.norm(v, axis=1)[:, None]).astype("f4") for k, v in target.items()},  # type: ignore[arg-type]
    )
    columns = {"uid": table["uid"], "score": generator.standard_normal(samples)}
    columns["cluster"] = generator.integers(0, 3, samples).astype("f8")
    pd.DataFrame(columns).to_parquet(folder / "columns.parquet", index=False)
    subset = unstructured_to_structured(uids[generator.random(samples) < 0.4], np.dtype("u8,u8"))
    np.save(folder / "subset.npy", np.sort(subset))
    shutil.copy(HERE.parent / "lists" / "entries.txt", folder)
    _set_times(folder)


def _set_times(folder: Path) -> None:
    """Give files times in whole seconds, which an archive gives back exactly."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1_700_000_000, 1_700_000_000))


# ---- the recording ------------------------------------------------------------------------------
def record(before: Path, to: Path) -> None:
    """Write the recording into the folder `to`.

    Args:
        before: the archive of an earlier commit.
        to: gets behaviour.json, wheel.txt, and the configuration of each command.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = unpack(before, Path(parent))
        commands = Commands(folder)
        found: dict[str, Any] = {"machine": machine()}
        found["reused"] = reuse(commands)
        found["continued"] = continued(commands)
        shutil.rmtree(folder / "outputs")
        found["selectors"] = selected(commands)
        found["runs"] = trained(commands, RUNS) | trained(commands, {"fsdp": FSDP}, ranks=2)
        commands.run("eval", *EVAL)
        (results,) = folder.glob("outputs/eval/*/*.jsonl")
        found["eval"] = [_without_time(entry) for entry in _read_jsonl(results)]
        (to / "commands").mkdir(parents=True, exist_ok=True)
        asked = [[*name.split("_"), *words, "--cfg", "job"] for name, words in COMMANDS.items()]
        for name, (text, _) in zip(COMMANDS, commands.run_all(asked), strict=True):
            (to / "commands" / f"{name}.yaml").write_text(text, encoding="utf-8")
        (to / "wheel.txt").write_text(wheel(Path(parent)), encoding="utf-8")
    text = json.dumps(found, indent=1) + "\n"
    (to / "behaviour.json").write_text(text, encoding="utf-8")


def machine() -> dict[str, Any]:
    """Where values are the same to the bit: processor, Python, and the packages that compute."""
    import torch

    from siftclip.selectors.kernels.hardware import int8_is_fast

    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "int8": int8_is_fast(),
        "model": _cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def reuse(commands: Commands) -> dict[str, list[str]]:
    """What commands say that they reuse of what the earlier commit has kept, by command."""
    asked = {f"select {name}": _selecting(name) for name in KEPT_SELECTORS}
    asked["score clip_score"] = ["score", *_selecting("clip_score")[1:]]
    asked |= {"embed": ["embed", *EMBED], "target": ["target", *TARGET]}
    asked["train"] = ["train", *FINISHED]
    found = {}
    for name, (output, errors) in zip(asked, commands.run_all([*asked.values()]), strict=True):
        lines = [line for line in (output + errors).splitlines() if _REUSE.match(line)]
        found[name] = [_TIME.sub("TIME", line) for line in lines]
    return found


def _selecting(name: str) -> list[str]:
    return ["select", *POOL, f"selector={name}", *SELECTORS[name]]


def continued(commands: Commands) -> dict[str, Any]:
    """The run that the earlier commit left killed, continued to its end."""
    (run,) = commands.folder.glob("outputs/train/*+jest*")
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    _, errors = commands.run("train", *KILLED)
    (line,) = (line for line in errors.splitlines() if "continuing from" in line)
    return {"kept": kept, "says": line, **_logged(run)}


def selected(commands: Commands) -> dict[str, Any]:
    """The answers of the selectors, and the names under which they are kept."""
    commands.run_all([[*_selecting(name), f"output_dir=alone/{name}"] for name in SELECTORS])
    return {name: _answer(commands.folder / "alone" / name) for name in SELECTORS}


def _answer(outputs: Path) -> dict[str, Any]:
    (folder,) = (outputs / "selections").iterdir()
    selection = np.load(folder / "selection.npy")
    kept: dict[str, list[np.ndarray]] = {}  # scores and statistics, by their folder
    for path in sorted((outputs / "scores").glob("*/*.npz")):
        with np.load(path) as arrays:
            kept.setdefault(path.parent.name, []).extend(arrays[k] for k in sorted(arrays.files))
    return {
        "selection": folder.name,
        "kept_samples": len(selection),
        "kept": _digest(selection),
        "scores": {name: _digest(*values) for name, values in kept.items()},
        "first_scores": [float(x) for values in kept.values() for x in values[0].ravel()[:4]],
    }


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def trained(
    commands: Commands, runs: Mapping[str, Sequence[str]], ranks: int | None = None
) -> dict[str, Any]:
    """The logs of runs, and their folders."""
    words = [["train", *TRAIN, *own, f"output_dir=trained/{name}"] for name, own in runs.items()]
    commands.run_all(words, ranks)
    return {name: _run(commands.folder / "trained" / name / "train") for name in runs}


def _run(folder: Path) -> dict[str, Any]:
    (run,) = folder.iterdir()
    results = run / "eval_results.jsonl"
    evaluated = _read_jsonl(results) if results.is_file() else []
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return {
        "folder": run.name,
        "files": files,
        **_logged(run),
        "eval": [*map(_without_time, evaluated)],
    }


def _logged(run: Path) -> dict[str, Any]:
    """The losses of a run to the bit, and its whole log by a digest."""
    log = [_without_time(entry) for entry in _read_jsonl(run / "metrics.jsonl")]
    losses = {entry["step"]: entry["train/loss"] for entry in log if "train/loss" in entry}
    text = json.dumps(log, sort_keys=True)
    return {
        "losses": {str(step): float(loss).hex() for step, loss in sorted(losses.items())},
        "log": hashlib.sha256(text.encode()).hexdigest()[:16],
        "log_names": sorted({name for entry in log for name in entry}),
    }


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _without_time(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in entry.items() if not any(word in name for word in OF_TIME)
    }


def wheel(folder: Path) -> str:
    """The names of the files in the wheel, one a line."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return "".join(f"{name}\n" for name in sorted(archive.namelist()))


def main() -> None:
    """Read the arguments and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, default=HERE / NAME_OF_BEFORE)
    parser.add_argument("--keep", action="store_true", help="make the archive anew, in the folder")
    arguments = parser.parse_args()
    warm_up()
    before = arguments.before
    if arguments.keep:
        before = arguments.folder / NAME_OF_BEFORE
        keep(before)
    record(before, arguments.folder)
    gc.unfreeze()  # else nanobind takes what Python leaves at its end for leaks


if __name__ == "__main__":
    main()
