"""Our training step under Lightning against a bare loop of open_clip's parts, taking turns.

python benchmarks/training_step.py
python benchmarks/training_step.py --device cuda --model ViT-B-32 --batch 1024 \\
    --precision bf16-mixed --compile

Same model, batch, precision and threads; data is in memory, so nothing but the step is measured.
The bare loop is open_clip's: ClipLoss, AdamW in its two groups, cosine, clamp; once with torch's
default AdamW, as open_clip makes it, and then with the fused one, which ours uses. Ours also takes
the norm of the gradients, to log it and to skip steps that are not finite; open_clip does so with
`--grad-clip-norm`.
"""

import argparse
import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterator

import lightning
import torch
from common import describe_machine
from open_clip.loss import ClipLoss

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.streaming.batches import Batch, StepBatch
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.models.compilation import compile_towers
from siftclip.trainer.optim.gradients import Objective
from siftclip.trainer.settings.optim import OptimSettings

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
SMALL = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def optim_config(steps: int, clip: float | None = None) -> OptimSettings:
    """open_clip's defaults."""
    return OptimSettings(
        lr=5e-4,
        beta1=0.9,
        beta2=0.98,
        eps=1e-6,
        weight_decay=0.2,
        warmup_steps=min(10, steps),
        grad_clip_norm=clip,
    )


class Repeated:
    """The same batch, so many times."""

    def __init__(self, batch: StepBatch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[StepBatch]:
        return (self.batch for _ in range(self.steps))


class Clock(lightning.pytorch.callbacks.Callback):
    """Seconds of all steps but the first few."""

    def __init__(self, skipped: int) -> None:
        self.skipped, self.seconds, self.start = skipped, 0.0, 0.0

    def on_train_batch_end(self, trainer, module, *args) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step in (self.skipped, trainer.max_steps):
            synchronize(module.device)
            self.seconds = time.perf_counter() - self.start
            self.start = time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(  # type: ignore[no-untyped-def]
    model, batches: list[Batch], steps: int, skipped: int, options, clip: float | None
) -> float:
    """Seconds a step of these micro-batches."""
    module = ClipTraining(
        copy.deepcopy(model),
        objective=Objective(loss=SoftmaxLoss()),
        optim=optim_config(steps, clip),
        total_steps=steps + skipped,
        global_batch_size=sum(len(batch.rows) for batch in batches),
        seed=0,
        log_every_n_steps=50,
    )
    if options.compile:
        compile_towers(module.model, backend=options.backend)
    clock = Clock(skipped)
    trainer = lightning.Trainer(
        accelerator=options.device,
        devices=1,
        precision=options.precision,
        max_steps=steps + skipped,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_dataloaders=Repeated(StepBatch(batches), steps + skipped))
    return clock.seconds / steps


def bare(  # type: ignore[no-untyped-def]
    model, batch: Batch, steps: int, skipped: int, options, fused: bool, clip: float | None
) -> float:
    """Seconds a step of open_clip's loop, reduced to what computes."""
    device = torch.device(options.device)
    model = copy.deepcopy(model).to(device).train()
    model.output_dict = True
    parameters = list(model.named_parameters())
    excluded = ("bn", "ln", "bias", "logit_scale")
    plain = [p for n, p in parameters if p.ndim < 2 or any(word in n for word in excluded)]
    chosen = {id(p) for p in plain}
    decayed = [p for _, p in parameters if id(p) not in chosen]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=fused or None)
    loss = ClipLoss(local_loss=True, gather_with_grad=True)
    forward = torch.compile(model, backend=options.backend) if options.compile else model
    autocast = AUTOCAST.get(options.precision)
    start = 0.0
    for step in range(steps + skipped):
        if step == skipped:
            synchronize(device)
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * 0.5 * (1 + math.cos(math.pi * step / (steps + skipped)))
        images = batch.images.to(device, non_blocking=True)
        tokens = batch.tokens.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            outputs = forward(images, tokens)
            total = loss(**outputs, output_dict=True)["contrastive_loss"]
        total.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
    synchronize(device)
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default=None, help="of open_clip; default: a small ViT")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    clip = (
        load_clip_model("small", architecture=SMALL)
        if options.model is None
        else load_clip_model(options.model)
    )
    size = clip.config["preprocess_cfg"]["size"]
    side = size[0] if isinstance(size, (list, tuple)) else size
    on_gpu = options.device == "cuda"
    images = torch.randn(options.batch, 3, side, side)
    batch = Batch(
        images=images.pin_memory() if on_gpu else images,
        tokens=clip.tokenizer(["a photo of a cat"] * options.batch),
        rows=torch.arange(options.batch),
        valid=torch.ones(options.batch, dtype=torch.bool),
    )
    given = (clip.model, batch, options.steps, 5, options)
    of_ours = (clip.model, [batch], options.steps, 5, options)
    sides = {
        "open_clip": lambda: bare(*given, fused=False, clip=None),
        "open_clip, fused AdamW": lambda: bare(*given, fused=True, clip=None),
        "open_clip, fused AdamW, clipped": lambda: bare(*given, fused=True, clip=1.0),
        "ours": lambda: ours(*of_ours, clip=None),
        "ours, clipped": lambda: ours(*of_ours, clip=1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for round_number in range(options.rounds):
        for turn in range(len(names)):  # each side is first, second, ... in turn
            name = names[(round_number + turn) % len(names)]
            seconds[name].append(sides[name]())
    print(describe_machine(), "\n")
    print("| | ms a step | samples/s | times as fast as open_clip |\n|---|---|---|---|")
    base = statistics.median(seconds["open_clip"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"| {name} | {1e3 * median:.2f} | {options.batch / median:,.0f} | {base / median:.3f} |"
        )


if __name__ == "__main__":
    main()
