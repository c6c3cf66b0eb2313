"""Item `kernels`: what selectors compute, against plain torch, one CPU thread and GEMM's peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plain_selectors as plain
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checks.harness import Facts, Setup, require
from gpu_checks.measuring import gemm_tflops, seconds_of
from siftclip.selectors import JEST, ModelFeatures
from siftclip.selectors.fitting.covariance import mean_moment, quadratic_form, second_moment
from siftclip.selectors.kernels.largest_product import largest_product
from siftclip.selectors.kernels.most_similar import most_similar
from siftclip.selectors.kernels.pair_log_sums import pair_log_sums
from siftclip.trainer import choose_sub_batch

TEMPERATURE = 0.01
CPU_SAMPLES = 8192  # of the plain side on one thread, which is linear in them but for a few ms
PLAIN_ROWS = 8192  # of plain products with all targets, whose matrix must fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Unit features, float16."""

    image: Tensor  # [n, d]
    text: Tensor  # [n, d]
    targets: Tensor  # [m, d]
    block: int  # samples of a batch of negCLIPLoss

    def part(self, samples: int, device: str) -> Data:
        """The first samples, elsewhere."""
        image, text = (values[:samples].to(device) for values in (self.image, self.text))
        block = min(samples, self.block)
        return Data(image=image, text=text, targets=self.targets.to(device), block=block)

    @property
    def blocks(self) -> list[Tensor]:
        return list(torch.arange(len(self.image), device=self.image.device).split(self.block))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Both sides of a computation, and its floating-point operations a sample."""

    ours: Callable[[Data], Tensor]
    plain: Callable[[Data], Tensor]
    flop: Callable[[Data], float]
    limit: float = 1e-4  # of the largest difference, in parts of the largest value


def _negcliploss(data: Data) -> Tensor:
    scores = (data.image.float() * data.text.float()).sum(1)
    for start in range(0, len(scores), data.block):
        at = slice(start, start + data.block)
        rows, columns = pair_log_sums(data.image[at], data.text[at], TEMPERATURE)
        scores[at] -= TEMPERATURE / 2 * (rows + columns)
    return scores


def _by_rows(function: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    return torch.cat([function(rows.float()) for rows in image.split(PLAIN_ROWS)])


def _covariance(data: Data) -> Tensor:
    return data.targets.float().T @ data.targets.float()


KERNELS = {
    "negcliploss": Kernel(
        ours=_negcliploss,
        plain=lambda d: plain.negcliploss(d.image, d.text, TEMPERATURE, d.blocks),
        flop=lambda d: 2 * d.block * d.image.shape[1],
    ),
    "normsim_inf": Kernel(
        ours=lambda d: largest_product(d.image, d.targets),
        plain=lambda d: plain.normsim(d.image, d.targets, float("inf")),
        flop=lambda d: 2 * d.targets.numel(),
    ),
    "nearest centroid": Kernel(
        ours=lambda d: most_similar(d.image, d.targets)[1],
        plain=lambda d: _by_rows(lambda x: (x @ d.targets.float().T).amax(1), d.image),
        flop=lambda d: 2 * d.targets.numel(),
    ),
    "vas": Kernel(
        ours=lambda d: quadratic_form(d.image, _covariance(d)),
        plain=lambda d: plain.vas(d.image, _covariance(d)),
        flop=lambda d: 2 * d.image.shape[1] ** 2,
    ),
    "second moment": Kernel(
        ours=lambda d: mean_moment(second_moment(d.image), len(d.image)),
        plain=lambda d: d.image.float().T @ d.image.float() / len(d.image),
        flop=lambda d: 2 * d.image.shape[1] ** 2,
        limit=1e-3,  # ours is exact, the plain one is rounded after each sample
    ),
}


def kernels(setup: Setup, facts: Facts) -> None:
    """Time both sides, compare their answers, and then the choice of a sub-batch."""
    samples, dim = setup.size((1_000_000, 512), (4096, 64))
    data = Data(
        image=_unit(setup, samples, dim, seed=0),
        text=_unit(setup, samples, dim, seed=1),
        targets=_unit(setup, setup.size(20_000, 500), dim, seed=2),
        block=setup.size(32_768, 1024),
    )
    peaks = {"bf16": gemm_tflops(setup, torch.bfloat16)}
    if setup.on_gpu:
        peaks["TF32"] = gemm_tflops(setup, torch.float32, tf32=True)
    for name, kernel in KERNELS.items():
        facts[name] = _compared(setup, kernel, data, peaks)
    facts["jest ms"] = _jest(setup)
    facts.note_peak(setup)


def _compared(
    setup: Setup, kernel: Kernel, data: Data, peaks: dict[str, float]
) -> dict[str, float]:
    samples = len(data.image)
    found, expected = kernel.ours(data).double(), kernel.plain(data).double()
    difference = float((found - expected).abs().max() / expected.abs().max())
    require(difference < kernel.limit, f"differs from plain torch by {difference:.1e}")
    ours = seconds_of(setup, lambda: kernel.ours(data))
    theirs = seconds_of(setup, lambda: kernel.plain(data))
    reached = kernel.flop(data) * samples / ours / 1e12
    shares = {f"of {name} GEMM": round(reached / peak, 3) for name, peak in peaks.items()}
    return {
        "ms": round(1e3 * ours, 2),
        "times plain": round(theirs / ours, 2),
        "times a CPU thread": round(_cpu_seconds(setup, kernel, data) * samples / ours, 1),
        "TFLOP/s": round(reached, 3),
        **shares,
    }


def _cpu_seconds(setup: Setup, kernel: Kernel, data: Data) -> float:
    """Seconds a sample of the plain side on one thread of the CPU, by those of a part."""
    part = data.part(CPU_SAMPLES, "cpu")
    more = kernel.flop(data) / kernel.flop(part)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds_of(setup, lambda: kernel.plain(part), repeats=1) * more / len(part.image)
    finally:
        torch.set_num_threads(before)


def _jest(setup: Setup) -> dict[str, float]:
    """Milliseconds in which a sub-batch is chosen, from features on the device."""
    samples, kept = setup.size((20_480, 4096), (640, 128))
    names = ("learner", "reference")
    features = {
        name: (_unit(setup, samples, 512, seed=at).float(), _unit(setup, samples, 512, seed=at + 9))
        for at, name in enumerate(names)
    }
    learner, reference = (
        ModelFeatures(name=name, logit_scale=100.0, logit_bias=-10.0) for name in names
    )
    times = {}
    for loss in ("sigmoid", "softmax"):
        jest = JEST(learner=learner, reference=reference, loss=loss, fraction=0.2)
        chosen = lambda jest=jest: choose_sub_batch(jest, features, keep=kept, step=0)  # noqa: E731
        times[f"{loss}, {samples} to {kept}"] = round(1e3 * seconds_of(setup, chosen), 1)
    return times


def _unit(setup: Setup, samples: int, dim: int, *, seed: int) -> Tensor:
    generator = torch.Generator(setup.device).manual_seed(seed)
    values = torch.randn(samples, dim, generator=generator, device=setup.device)
    values[:, 0] += 2.0  # a cone, as the features of CLIP are
    return F.normalize(values, dim=1).half()
