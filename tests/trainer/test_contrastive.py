"""The loss: equal to open_clip's in one process, and to one process on several ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from siftclip.trainer.contrastive import contrastive_loss, gather_features

# Run by torchrun: every rank takes its part of one batch through DDP, rank 0 compares with the
# whole batch in one process.
WORKER = """
import copy, os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from siftclip.datamodules.clip_models import load_clip_model
from siftclip.trainer.contrastive import contrastive_loss

class Step(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, images, tokens, rank, world_size):
        image = self.model.encode_image(images, normalize=True)
        text = self.model.encode_text(tokens, normalize=True)
        scale = self.model.logit_scale.exp()
        return contrastive_loss(image, text, scale, rank=rank, world_size=world_size)

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = load_clip_model("tiny", architecture=dict(
    embed_dim=16,
    vision_cfg=dict(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
    text_cfg=dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1),
)).model
generator = torch.Generator().manual_seed(1)
images = torch.randn(16, 3, 16, 16, generator=generator)
tokens = torch.randint(1, 63, (16, 8), generator=generator)
alone = Step(copy.deepcopy(model))
reference = alone(images, tokens, 0, 1)
reference.backward()
local = 16 // world
part = slice(rank * local, (rank + 1) * local)
step = DistributedDataParallel(Step(model))
loss = step(images[part], tokens[part], rank, world)
loss.backward()
dist.all_reduce(loss := loss.detach())
torch.testing.assert_close(loss / world, reference.detach(), rtol=1e-5, atol=1e-6)
names = dict(alone.named_parameters())
for name, parameter in step.module.named_parameters():
    expected = names[name].grad
    torch.testing.assert_close(parameter.grad, expected, rtol=2e-4, atol=1e-6, msg=name)
assert float(names["model.logit_scale"].grad.abs()) > 1e-4
print(f"rank {rank} of {world} equal")
dist.destroy_process_group()
"""


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def test_loss_equals_open_clip() -> None:
    image, text, scale = unit(12, 6, 1), unit(12, 6, 2), torch.tensor(14.3)
    expected = open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(contrastive_loss(image, text, scale), expected)


def test_loss_equals_a_loop() -> None:
    image, text, scale = unit(5, 4, 3), unit(5, 4, 4), torch.tensor(7.0)
    total = 0.0
    for i in range(5):
        row = torch.stack([scale * image[i] @ text[j] for j in range(5)])
        column = torch.stack([scale * image[j] @ text[i] for j in range(5)])
        total += float(row.logsumexp(0) - row[i] + column.logsumexp(0) - column[i])
    assert float(contrastive_loss(image, text, scale)) == pytest.approx(total / 10, rel=1e-5)


def test_similarities_are_float32_also_under_autocast() -> None:
    image, text, scale = unit(64, 32, 5), unit(64, 32, 6), torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(image, text, scale)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, contrastive_loss(image, text, scale), rtol=0, atol=0)


def test_gather_of_one_process_is_its_input() -> None:
    features = unit(3, 2, 7)
    assert gather_features(features, world_size=1) is features


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_on_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(f"of {ranks} equal") == ranks
