"""The presets of `scale`: published numbers, models that exist, headers with what to expect."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
from omegaconf import DictConfig

from siftclip.trainer.optim.schedules import check_schedule
from siftclip.trainer.settings.budget import budget_from
from siftclip.trainer.settings.data import ScaleSettings
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.optim import OptimSettings

CONFIGS = Path(__file__).parents[2] / "configs"
SCALES = sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
FACTS = ("Command", "Hardware", "Hours", "Metric")

Compose = Callable[..., DictConfig]

# DataComp: scale_configs.py, with train.py's and open_clip's defaults for what it leaves open.
# Conceptual Captions: open_clip's README, and its defaults for models that are no ViT.
# model, batch, samples, steps, lr, warm-up, beta2, eps, weight decay, gradient checkpointing
PUBLISHED = {
    "datacomp_debug": ("ViT-B-32", 1024, 128_000, 125, 1e-4, 500, 0.98, 1e-6, 0.2, True),
    "datacomp_small": ("ViT-B-32", 4096, 12_800_000, 3_125, 5e-4, 500, 0.98, 1e-6, 0.2, True),
    "datacomp_medium": ("ViT-B-32", 4096, 128_000_000, 31_250, 5e-4, 500, 0.98, 1e-6, 0.2, True),
    "datacomp_large": ("ViT-B-16", 8192, 128 * 10**7, 156_250, 5e-4, 500, 0.98, 1e-6, 0.2, True),
    "datacomp_xlarge": (
        *("ViT-L-14", 90112, 128 * 10**8, 142_046),
        *(1e-3, 10_000, 0.95, 1e-6, 0.2, True),
    ),
    "cc3m": ("RN50", 1024, 30 * 2_905_954, 85_136, 1e-3, 10_000, 0.999, 1e-8, 0.1, False),
    "cc12m": ("RN50", 1024, 32 * 10_968_539, 342_767, 5e-4, 10_000, 0.999, 1e-8, 0.1, False),
}


def header(scale: str) -> dict[str, str]:
    """The facts at the head of a preset, by name; a fact goes on in lines that are indented."""
    lines = (CONFIGS / "scale" / f"{scale}.yaml").read_text().splitlines()
    facts: dict[str, str] = {}
    name = None
    for line in lines:
        if not line.startswith("#"):
            break
        found = re.fullmatch(r"# (\w+):\s+(\S.*)", line)
        if found and found.group(1) in FACTS:
            name = found.group(1)
            facts[name] = found.group(2)
        elif name is not None and line.startswith("#   "):
            facts[name] += " " + line[1:].strip()
        else:
            name = None
    return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a scale decides."""

    model: ModelSettings
    optim: OptimSettings
    scale: ScaleSettings
    trainer: TrainerSettings


@pytest.mark.parametrize("scale", PUBLISHED)
def test_numbers_are_the_published_ones(scale: str, compose: Compose) -> None:
    config = compose("train", [f"scale={scale}"], kind=Recipe)
    budget, optim = budget_from(config.scale), config.optim
    assert PUBLISHED[scale] == (
        config.model.name,
        budget.global_batch_size,
        budget.samples_seen,
        budget.total_steps,
        optim.lr,
        optim.warmup_steps,
        optim.beta2,
        optim.eps,
        optim.weight_decay,
        config.trainer.grad_checkpointing,
    )
    assert (optim.beta1, optim.schedule, optim.decay_rule) == (0.9, "cosine", "open_clip_3")
    assert optim.grad_clip_norm is None


@pytest.mark.parametrize("choice", [*SCALES, *(f"experiment:{name}" for name in EXPERIMENTS)])
def test_the_model_exists_and_the_schedule_fits(choice: str, compose: Compose) -> None:
    group, _, name = choice.rpartition(":")
    config = compose("train", [f"{group or 'scale'}={name}"], kind=Recipe)
    check_schedule(config.optim, budget_from(config.scale).total_steps)
    if config.model.architecture is None:
        assert config.model.name in open_clip.list_models()


@pytest.mark.parametrize("scale", SCALES)
def test_header_says_what_to_expect(scale: str) -> None:
    facts = header(scale)
    assert tuple(facts) == FACTS
    assert facts["Command"].startswith(f"siftclip train scale={scale} ")
    assert "GPU" in facts["Hardware"] or "CPU" in facts["Hardware"]
    text = (CONFIGS / "scale" / f"{scale}.yaml").read_text()
    if scale != "tiny":
        assert "# Siftclip has not run this scale.\n" in text
        assert "estimate" in facts["Hours"] or "open_clip/issues/" in facts["Hours"]


@pytest.mark.parametrize("scale", SCALES)
def test_command_of_the_header_composes(scale: str, compose: Compose) -> None:
    words = header(scale)["Command"].split()
    overrides = [word for word in words[2:] if re.match(r"[\w.]+=", word)]
    config = compose("train", overrides)
    if config.trainer.devices == "auto":
        return
    nodes = 1 if config.trainer.num_nodes == "auto" else config.trainer.num_nodes
    devices = config.trainer.devices * nodes
    per_device, rest = divmod(config.scale.global_batch_size, devices)
    assert rest == 0
    assert f"{devices} GPUs with {per_device} samples each" in header(scale)["Hardware"]


# Billions of operations a sample, both towers (open_clip's docs/model_profile.csv; two for each
# multiply-add), and A100 hours of the same model's run on LAION-400M (its docs/PRETRAINED.md).
PACE = {
    "datacomp_debug": (14.78, 4_600),
    "datacomp_small": (14.78, 4_600),
    "datacomp_medium": (14.78, 4_600),
    "datacomp_large": (41.09, 10_700),
    "datacomp_xlarge": (175.33, 50_800),
}


@pytest.mark.parametrize("scale", PACE)
def test_estimates_follow_from_their_sources(scale: str, compose: Compose) -> None:
    samples = compose("train", [f"scale={scale}"], kind=Recipe).scale.samples_seen
    giga_operations, hours_of_laion = PACE[scale]
    text = header(scale)["Hours"]
    hours = float(re.match(r"([\d.,]+) A100 hours", text).group(1).replace(",", ""))  # type: ignore[union-attr]
    assert hours == pytest.approx(hours_of_laion * samples / (32 * 400e6), rel=0.1)
    compute = re.search(r"= ([\d.e]+) MACs", text)
    if compute:
        macs = giga_operations / 2 * 1e9 * samples
        assert float(compute.group(1)) == pytest.approx(macs, rel=0.05)
    else:
        assert scale == "datacomp_debug"
