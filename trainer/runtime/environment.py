"""What a run is computed with: code, packages, processors and threads, session by session.

A run is cut off and continues, perhaps elsewhere. `versions.json` says what its first session ran
on, and `sessions.jsonl` has a line for each session after which something was another.
"""

from __future__ import annotations

import logging
import platform
import reprlib
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import siftclip
from siftclip.damaged import set_aside
from siftclip.errors import DamagedError, InputError
from siftclip.files import (
    append_jsonl,
    content_digest,
    has_content,
    identity_hash,
    read_json_object,
    read_jsonl,
    write_json,
)
from siftclip.writing import delete_file

log = logging.getLogger(__name__)

VERSIONS_NAME = "versions.json"
SESSIONS_NAME = "sessions.jsonl"
PACKAGES = (
    "siftclip",
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "webdataset",
    "clip-benchmark",
    "wandb",
    "numpy",
    "pillow",
)
# What decides about results beyond rounding, and what moves them by rounding, which grows: on
# another processor, or with another number of threads, a run is as far from this as another seed
# after some 200 steps.
CODE = ("git", "siftclip", "source", "torch", "open_clip_torch", "torchvision", "lightning")
TARS = "tars"  # of the pool: their sizes and times
MACHINE = ("cpu", "cpu_capability", "gpu", "threads", "ranks", "precision")

FOLDERS = ("selectors", "datamodules", "eval", "trainer")  # of Siftclip's code

Environment = dict[str, Any]


def environment(*, ranks: int, loader_workers: int, precision: str) -> Environment:
    """Describe code, versions, processors and threads of this process, by name; plain values.

    Args:
        ranks: that train.
        loader_workers: processes that load, a rank.
        precision: as it was resolved.
    """
    versions: Environment = {"python": platform.python_version(), "git": git_commit()}
    versions["source"] = source_digest()
    versions["platform"] = platform.platform()
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        **versions,
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu_models(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "loader_workers": loader_workers,
        "precision": precision,
    }


def cpu_model() -> str:
    """Return the name of the processor, as the system calls it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_models() -> str | None:
    """Return the names of the GPUs that torch sees, each once; None without any."""
    if not torch.cuda.is_available():
        return None
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(dict.fromkeys(names))


def git_commit() -> str | None:
    """Return the commit of the checkout that runs, with `-dirty`; None when installed.

    Also where it is installed below somebody's checkout, which is of other code.
    """
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]
    is_tracked = [*git, "ls-files", "--error-unmatch", file.name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        for command in (is_tracked, describe):
            result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


@cache
def source_digest() -> str:
    """Hash the text of Siftclip itself to twelve digits; two edits of a commit differ."""
    root = Path(__file__).resolve().parents[2]
    paths = sorted(path for name in FOLDERS for path in (root / name).rglob("*.py"))
    digests = {str(path.relative_to(root)): content_digest(path) for path in paths}
    shared = sorted(Path(siftclip.__file__).parent.glob("*.py"))  # in a checkout not below the root
    return identity_hash(digests | {path.name: content_digest(path) for path in shared})


def keep_environment(folder: Path, now: Environment, *, step: int) -> list[str]:
    """Write down what a session of a run is computed with. Damaged notes are set aside.

    Args:
        folder: of the run.
        now: of this session.
        step: with which it begins.

    Returns:
        What is another than in the session before, such as "threads 8, before 4". Nothing for the
        first one.
    """
    first = folder / VERSIONS_NAME
    for path in (first, folder / SESSIONS_NAME):
        if not path.is_file():
            set_aside(path)
    earlier = [] if step == 0 else _whole_environments(folder)
    if not earlier:
        write_json(first, now)
        delete_file(folder / SESSIONS_NAME)
        return []
    before = earlier[-1]
    changed = [
        f"{name} {now.get(name)}, before {before.get(name)}"
        for name in (*CODE, *MACHINE, TARS)
        if now.get(name) != before.get(name)
    ]
    if changed:
        append_jsonl(folder / SESSIONS_NAME, {"step": step, "environment": now})
    return changed


def _whole_environments(folder: Path) -> list[Environment]:
    """Read `environments`; sets damaged ones aside, which say nothing that the run needs."""
    try:
        return environments(folder)
    except InputError as error:
        log.warning("%s It is set aside, and written anew from here on.", error.fault)
        for name in (VERSIONS_NAME, SESSIONS_NAME):
            set_aside(folder / name)
        return []


def environments(folder: Path) -> list[Environment]:
    """Read what the sessions of a run were computed with, in order; none if it does not say.

    Raises:
        InputError: a file is damaged.
    """
    first = folder / VERSIONS_NAME
    if not has_content(first):
        return []
    try:
        return [read_json_object(first), *map(_environment_of, read_jsonl(folder / SESSIONS_NAME))]
    except InputError as error:
        raise DamagedError(
            error,
            f"Delete {VERSIONS_NAME} and {SESSIONS_NAME} in {folder}: what the run was computed "
            "with is then not known.",
        ) from None


def _environment_of(session: Mapping[str, Any]) -> Environment:
    environment = session.get("environment")
    if not isinstance(environment, dict):
        raise InputError(
            f"{SESSIONS_NAME} must have an environment in each line. "
            f"Got {reprlib.repr(environment)}."
        )
    return environment


def mixed(runs: Mapping[str, Sequence[Environment]]) -> dict[str, dict[str, list[str]]]:
    """Find in what the environments of several runs differ.

    Args:
        runs: the environments of each run, by its name.

    Returns:
        For each name of `CODE` and `MACHINE` with more than one value: the runs by value.
    """
    differing = {}
    for name in (*CODE, *MACHINE):
        by_value: dict[str, list[str]] = {}
        for run, sessions in runs.items():
            values = (str(session.get(name, "not recorded")) for session in sessions)
            for value in dict.fromkeys(values):
                by_value.setdefault(value, []).append(run)
        if len(by_value) > 1:
            differing[name] = by_value
    return differing
