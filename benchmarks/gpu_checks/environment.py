"""Items `environment` and `tests`: what runs here, and whether it computes as the CPU does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from common import describe_machine

from gpu_checks.harness import CheckError, Facts, Setup, require
from gpu_checks.measuring import gemm_tflops, seconds_of, stated_tflops

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "torchvision", "triton", "lightning", "open_clip_torch", "timm", "numpy", "pyarrow",
    "pandas", "scikit-learn", "scipy", "webdataset", "hydra-core", "pillow", "simplejpeg", "pytest",
)  # fmt: skip


def environment(setup: Setup, facts: Facts) -> None:
    """Say what machine this is, what is installed, and what it reaches at best."""
    facts["machine"] = describe_machine()
    facts["usable cores"] = len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts["memory GiB"] = round(pages / 2**30, 1)
    facts["versions"] = {name: _version(name) for name in PACKAGES}
    if setup.on_gpu:
        require(torch.cuda.is_available(), "torch sees no GPU: --device cpu --tiny runs without")
        facts["GPU"] = torch.cuda.get_device_name()
        facts["GPUs"] = torch.cuda.device_count()
        facts["GPU memory GiB"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
        facts["driver"] = _driver()
        facts["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    reached = {name: round(gemm_tflops(setup, dtype), 2) for name, dtype in types.items()}
    if setup.on_gpu:
        reached["TF32"] = round(gemm_tflops(setup, torch.float32, tf32=True), 2)
        reached["stated bf16"] = stated_tflops(setup) or float("nan")
    facts["GEMM TFLOP/s"] = reached
    facts["copy GB/s"] = _copy_rates(setup)


def _copy_rates(setup: Setup) -> dict[str, float]:
    """From page-locked memory to the device, by the type of a batch's images."""
    rates = {}
    for dtype in (torch.uint8, torch.float32):
        images = torch.zeros(setup.size(1024, 16), 3, 224, 224, dtype=dtype)
        images = images.pin_memory() if setup.on_gpu else images
        seconds = seconds_of(
            setup, lambda images=images: images.to(setup.device, non_blocking=True, copy=True)
        )
        rates[str(dtype).removeprefix("torch.")] = round(images.nbytes / seconds / 1e9, 2)
    return rates


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {type(error).__name__}"
    return found.stdout.strip().splitlines()[0]


def tests(setup: Setup, facts: Facts) -> None:
    """Run the tests marked gpu; a part of them where the check is tiny."""
    # By their files: the modules of other tests import what is not on the machine.
    files = sorted(map(str, (ROOT / "tests").rglob("test_on_gpu.py")))
    which = setup.size(files, [str(ROOT / "tests/trainer/optim/test_on_gpu.py")])
    words = [sys.executable, "-m", "pytest", *which, "-m", "gpu", "--device", setup.device.type]
    # Other versions of packages than the tested ones may warn, which is no fault of a kernel.
    words += ["-q", "-W", "default", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8 and not setup.tiny:
        words += ["-n", "4", "--dist", "worksteal"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
    facts["tests"] = {name: int(count) for count, name in counts}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        facts["failed"] = failed[:20]
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise CheckError(f"pytest ended with {done.returncode}: {' '.join(last)}")
    require(any(name == "passed" for _, name in counts), "no test has run")
