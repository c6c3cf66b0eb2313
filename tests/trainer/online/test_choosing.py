"""In-loop selection in anybody's training loop."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import open_clip
import pytest
import torch
import torch.nn.functional as F
from doc_examples import python_blocks, run_code
from torch import Tensor
from torchvision.transforms import v2

from siftclip.datamodules import SelectedPairs
from siftclip.errors import InputError, ParameterError
from siftclip.selectors import And, ClipScore, InfoBatch
from siftclip.trainer import choose_sub_batch

SCRIPT = Path(__file__).with_name("choosing_on_ranks.py")
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SCORE = ClipScore(features="own", fraction=1.0)


def pair(samples: int = 10, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, samples, 4, generator=generator)
    return image, text


def test_clip_score_keeps_the_best_pairs() -> None:
    image, text = pair()
    cosine = (F.normalize(image, dim=1) * F.normalize(text, dim=1)).sum(1)
    expected = cosine.topk(4).indices.sort().values
    chosen = choose_sub_batch(SCORE, {"own": (image, text)}, keep=4, step=0)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, expected)
    scaled = {"own": (5 * image.double(), 0.1 * text)}  # features as a model gives them
    assert torch.equal(choose_sub_batch(SCORE, scaled, keep=4, step=0), expected)


def test_groups_have_equal_shares() -> None:
    image, text = pair(12)
    cosine = (F.normalize(image, dim=1) * F.normalize(text, dim=1)).sum(1)
    expected = torch.cat([cosine[g].topk(2).indices.sort().values + g.start
                          for g in (slice(0, 6), slice(6, 12))])  # fmt: skip
    chosen = choose_sub_batch(SCORE, {"own": (image, text)}, keep=4, step=0, groups=2)
    assert torch.equal(chosen, expected)


def test_draws_are_functions_of_seed_and_step() -> None:
    features = {"own": pair(64)}

    def drawn(step: int, seed: int = 0) -> list[int]:
        options = {"keep": 16, "temperature": 1.0}
        return choose_sub_batch(SCORE, features, step=step, seed=seed, **options).tolist()

    assert len({*map(tuple, (drawn(0), drawn(1), drawn(2), drawn(0, seed=1)))}) == 4
    assert drawn(1) == drawn(1)
    assert len(set(drawn(1))) == 16


def test_the_state_of_torch_and_gradients_are_left_alone() -> None:
    image, text = (values.requires_grad_() for values in pair())
    before = torch.get_rng_state()
    chosen = choose_sub_batch(SCORE, {"own": (image, text)}, keep=3, step=0, temperature=2.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not chosen.requires_grad
    assert image.grad is None


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ({}, {}, "features must have what ClipScore reads: own_img, own_txt. Got nothing"),
        ({"other": pair()}, {}, "Got other_img, other_txt.*own_img is one of them"),
        ({"own": (pair()[0], pair(9)[0])}, {}, r"must be pairs of tensors \[n, d\] of the same n"),
        ({"own": (pair()[0][0], pair()[0])}, {}, r"Got {'own_img': \[4\]"),
        ({"own": pair()}, {"keep": 11}, "keep must be at most the 10 samples .*Got 11"),
        ({"own": pair()}, {"keep": 0}, "keep must be an integer of at least 1"),
        ({"own": pair()}, {"step": -1}, "step must be an integer of at least 0"),
        ({"own": pair()}, {"groups": 3}, "groups must be a multiple of the 1 ranks.*Got 3"),
        ({"own": pair()}, {"groups": 0}, "groups must be an integer of at least 1"),
    ],
)
def test_wrong_arguments_are_refused(features: Any, options: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=f"choose_sub_batch: .*{message}"):
        choose_sub_batch(SCORE, features, **{"keep": 4, "step": 0, **options})


def test_selectors_that_need_more_are_refused() -> None:
    features = {"own": pair()}
    with pytest.raises(InputError, match="InfoBatch reads more than features, or weighs samples"):
        choose_sub_batch(InfoBatch(seed=0), features, keep=4, step=0)
    selector = And(selectors={"one": SCORE, "other": ClipScore(features="own", threshold=0)})
    with pytest.raises(InputError, match="decides by itself how many samples it keeps"):
        choose_sub_batch(selector, features, keep=4, step=0)


# ---- a stranger's module ------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("method", ["jest", "clip_score"])
def test_example_of_the_documentation(
    method: str, make_samples: Any, write_pool: Any, load_pool: Any, tmp_path: Path
) -> None:
    pairs = SelectedPairs(
        load_pool(write_pool(make_samples(20), shards=2)),
        batch_size=10,
        transform=v2.Compose(
            [v2.PILToTensor(), v2.Resize((16, 16)), v2.ToDtype(torch.float32, scale=True)]
        ),
        tokenizer=open_clip.SimpleTokenizer(context_length=12),
        num_workers=0,
    )
    torch.manual_seed(2)
    models = [open_clip.CLIP(**ARCHITECTURE, output_dict=True) for _ in range(2)]
    seen: list[int] = []

    def loss(**outputs: Tensor) -> Tensor:
        seen.append(len(outputs["image_features"]))
        return open_clip.ClipLoss()(**outputs)

    (example,) = python_blocks("online.md")
    names: dict[str, Any] = {"learner": models[0], "reference": models[1], "loss": loss}
    run_code(example, names)
    if method == "clip_score":
        names["jest"] = ClipScore(features="learner", fraction=1.0)
    before = models[0].text_projection.detach().clone()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(names["Mine"](), datamodule=pairs)
    assert seen == [5] * 4
    assert not torch.equal(models[0].text_projection, before)


@pytest.mark.slow
def test_two_ranks_choose_what_one_does(run_python: Callable[..., Any], tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from choosing_on_ranks import choices
    finally:
        sys.path.pop(0)
    result = run_python(str(SCRIPT), str(tmp_path), cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr[-4000:]
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    expected = choices(0, 1)
    assert len(expected) == 12
    assert len({tuple(chosen) for chosen in expected.values()}) > 6
    assert {name: parts[0][name] + parts[1][name] for name in expected} == expected
