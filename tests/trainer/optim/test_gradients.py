"""Micro-batches give the gradients of the whole batch, for every kind of model and loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import CocaLoss, ContrastiveLoss, DistillLoss, SigLipLoss, SoftmaxLoss
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients

SAMPLES = 12
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}
DECODER = {
    "context_length": 15,
    "vocab_size": 49408,
    "width": 32,
    "heads": 2,
    "layers": 1,
    "mlp_ratio": 4,
    "dim_head": 16,
    "n_queries": 4,
    "attn_pooler_heads": 2,
}


def make_model(**changes: Any) -> nn.Module:
    torch.manual_seed(5)
    architecture = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, **changes}
    model = load_clip_model("tiny", architecture=architecture).model
    model.output_dict = True  # type: ignore[assignment]
    return model.double().train()  # so that rounding hides nothing


def clip() -> nn.Module:
    return make_model()


def siglip() -> nn.Module:
    return make_model(custom_text=True, init_logit_bias=-10.0, init_logit_scale=2.3)


def coca() -> nn.Module:
    text = {**TEXT, "embed_cls": True, "output_tokens": True, "context_length": 15}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    return make_model(
        embed_dim=32, text_cfg=text, vision_cfg=vision, multimodal_cfg=DECODER, custom_text=True
    )


def make_batch(model: nn.Module, *, weights: bool = False, teacher: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 49407, (SAMPLES, model.context_length), generator=generator)  # type: ignore[call-overload]
    for index in range(SAMPLES):  # captions of different lengths
        end = 3 + index % 10
        tokens[index, end], tokens[index, end + 1 :] = 49407, 0
    unit = torch.nn.functional.normalize
    return Batch(
        images=torch.randn(SAMPLES, 3, 32, 32, generator=generator).double(),
        tokens=tokens,
        rows=torch.arange(SAMPLES),
        valid=torch.ones(SAMPLES, dtype=torch.bool),
        weights=torch.rand(SAMPLES, generator=generator) if weights else None,
        references={
            key: unit(torch.randn(SAMPLES, 8, generator=generator).double(), dim=-1)
            for key in ("image", "text")
        }
        if teacher
        else {},
    )


def split(batch: Batch, parts: int) -> list[Batch]:
    size = len(batch.rows) // parts
    slices = [slice(start, start + size) for start in range(0, len(batch.rows), size)]
    return [
        replace(
            batch,
            images=batch.images[at],
            tokens=batch.tokens[at],
            rows=batch.rows[at],
            valid=batch.valid[at],
            weights=None if batch.weights is None else batch.weights[at],
            references={key: value[at] for key, value in batch.references.items()},
        )
        for at in slices
    ]


def gradients(
    model: nn.Module, objective: Objective, micro_batches: list[Batch], **context: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = copy.deepcopy(model)
    terms = compute_gradients(model, objective, micro_batches, StepContext(**context))
    return terms, {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def references(batch: Batch) -> tuple[Tensor, Tensor] | None:
    return (batch.references["image"], batch.references["text"]) if batch.references else None


CASES = {
    "clip": (clip, SoftmaxLoss, {}),
    "weighted": (clip, SoftmaxLoss, {"weights": True}),
    "siglip": (siglip, lambda: SigLipLoss("bidir"), {}),
    "softmax with a bias": (siglip, SoftmaxLoss, {}),
    "coca": (coca, SoftmaxLoss, {}),
    "coca, weighted": (coca, SoftmaxLoss, {"weights": True}),
    "distil": (clip, lambda: DistillLoss(teacher_logit_scale=50.0), {"teacher": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_gradients_of_the_whole_batch(case: str, parts: int) -> None:
    build, loss, options = CASES[case]
    model = build()
    batch = make_batch(model, **options)  # type: ignore[arg-type]
    objective = Objective(loss=loss(), teacher=references)
    whole_terms, whole = gradients(model, objective, [batch])
    terms, found = gradients(model, objective, split(batch, parts))
    assert terms.keys() == whole_terms.keys()
    for name, value in whole_terms.items():
        torch.testing.assert_close(
            terms[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert found.keys() == whole.keys() == dict(model.named_parameters()).keys()
    assert whole["logit_scale"] != 0
    for name, value in whole.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("seeds", [[11], [11, 12, 13]])
def test_the_dropout_of_a_micro_batch_follows_its_seed(seeds: list[int]) -> None:
    """And a second pass repeats it: the gradients are those of one pass that keeps its graph."""
    model = make_model(vision_cfg={**VISION, "patch_dropout": 0.5})
    batch = make_batch(model)
    objective = Objective(loss=SoftmaxLoss())
    parts = split(batch, len(seeds))
    terms, found = gradients(model, objective, parts, seeds=seeds)

    images, texts = [], []
    for seed, part in zip(seeds, parts, strict=True):
        torch.manual_seed(seed)
        images.append(model.encode_image(part.images, normalize=True))  # type: ignore[operator]
        texts.append(model.encode_text(part.tokens, normalize=True))  # type: ignore[operator]
    logits = model.logit_scale.exp() * torch.cat(images) @ torch.cat(texts).T  # type: ignore[operator]
    labels = torch.arange(SAMPLES)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    loss.backward()
    torch.testing.assert_close(terms["loss"], loss.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found[name],
            parameter.grad,
            rtol=1e-7,
            atol=1e-10,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_batch_norm_statistics_count_a_micro_batch_once() -> None:
    model = make_model(vision_cfg=RESNET)
    batch = make_batch(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for part in split(batch, 3):
            expected.encode_image(part.images)  # type: ignore[operator]
    compute_gradients(model, Objective(loss=SoftmaxLoss()), split(batch, 3), StepContext())
    for (name, found), value in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, value, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_exchanged_once_a_step() -> None:
    """All backward passes but the last run where gradients stay on the rank."""
    events: list[str] = []

    @contextmanager
    def unsynced():  # type: ignore[no-untyped-def]
        events.append("unsynced")
        yield
        events.append("end")

    def backward(total: Tensor) -> None:
        events.append("backward")
        total.backward()

    model = clip()
    compute_gradients(
        model,
        Objective(loss=SoftmaxLoss()),
        split(make_batch(model), 3),
        StepContext(backward=backward, unsynced=unsynced),
    )
    assert events == ["unsynced", "backward", "end"] * 2 + ["backward"]


@pytest.mark.parametrize("locked", [("visual",), ("visual", "text")])
def test_locked_towers_get_no_gradient(locked: tuple[str, ...]) -> None:
    model = make_model(custom_text=True)
    for name in locked:
        getattr(model, name).requires_grad_(False)
    batch = make_batch(model)
    objective = Objective(loss=SoftmaxLoss())
    _, whole = gradients(model, objective, [batch])
    _, found = gradients(model, objective, split(batch, 3))
    assert found.keys() == whole.keys()
    assert not any(name.split(".")[0] in locked for name in found)
    for name, value in whole.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_weights_of_the_terms_of_coca() -> None:
    model = coca()
    batch = make_batch(model)
    once, _ = gradients(model, Objective(loss=CocaLoss(caption_weight=1.0)), [batch])
    twice, _ = gradients(
        model,
        Objective(loss=CocaLoss(contrastive_weight=3.0, caption_weight=2.0)),
        split(batch, 2),
    )
    torch.testing.assert_close(twice["contrastive_loss"], 3 * once["contrastive_loss"])
    torch.testing.assert_close(twice["caption_loss"], 2 * once["caption_loss"])
    torch.testing.assert_close(twice["loss"], twice["contrastive_loss"] + twice["caption_loss"])


def test_weights_count_in_both_losses_of_coca() -> None:
    """Against loops over samples and tokens; captions differ in length, one sample counts 0."""
    model = coca()
    batch = make_batch(model, weights=True)
    assert batch.weights is not None
    batch.weights[3] = 0
    weights = batch.weights.double().tolist()
    terms, found = gradients(model, Objective(loss=SoftmaxLoss()), [batch])
    outputs = model(batch.images, batch.tokens)
    caption, tokens = torch.zeros((), dtype=torch.float64), 0.0
    for weight, logits, labels in zip(weights, outputs["logits"], outputs["labels"], strict=True):
        for logit, label in zip(logits, labels.tolist(), strict=True):
            if label != 0:
                caption = caption - weight * logit.log_softmax(0)[label]
                tokens += weight
    logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
    contrastive = torch.zeros((), dtype=torch.float64)
    for index, weight in enumerate(weights):
        pair = logits[index].log_softmax(0)[index] + logits[:, index].log_softmax(0)[index]
        contrastive = contrastive - weight * pair / 2
    expected = {
        "contrastive_loss": contrastive / sum(weights),
        "caption_loss": 2 * caption / tokens,
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-6, atol=0)
    sum(expected.values()).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found[name],
            parameter.grad,
            rtol=1e-5,
            atol=1e-8,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
def test_only_the_ratios_of_weights_count(factor: float) -> None:
    """Also where the weights of all tokens together are below 1."""
    model = coca()
    batch = make_batch(model)
    terms, _ = gradients(model, Objective(loss=SoftmaxLoss()), [batch])
    same = replace(batch, weights=torch.full((SAMPLES,), factor))
    found, _ = gradients(model, Objective(loss=SoftmaxLoss()), [same])
    for name, value in terms.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)


def test_teacher_features_of_any_length_and_precision_teach_alike() -> None:
    """A cache may hold them in half precision, and of what length the model gave."""
    model = clip()
    objective = Objective(loss=DistillLoss(teacher_logit_scale=50.0), teacher=references)
    batch = make_batch(model, teacher=True)
    halves = {key: value.half() for key, value in batch.references.items()}
    lengths = torch.linspace(0.25, 4, SAMPLES)[:, None].exp2().half()
    expected, _ = gradients(
        model, objective, [replace(batch, references={k: v.double() for k, v in halves.items()})]
    )
    # powers of two, or the half-precision products would be others
    longer = {key: value * lengths.log2().round().exp2() for key, value in halves.items()}
    found, _ = gradients(model, objective, split(replace(batch, references=longer), 2))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)


STEP_ON_RANKS = Path(__file__).with_name("step_on_ranks.py")


def test_coca_trains_on_two_ranks_what_one_trains(run_python: Any, tmp_path: Path) -> None:
    result = run_python(str(STEP_ON_RANKS), str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "4 cases equal" in result.stdout


def test_coca_is_open_clips() -> None:
    """Against open_clip's own CoCaLoss on the outputs of the same model."""
    from open_clip.loss import CoCaLoss

    model = coca()
    batch = make_batch(model)
    terms, found = gradients(model, Objective(loss=SoftmaxLoss()), [batch])
    loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    expected = loss(**model(batch.images, batch.tokens), output_dict=True)
    for name, value in expected.items():
        torch.testing.assert_close(
            terms[name], value.detach(), msg=lambda text, name=name: f"{name}: {text}"
        )
    sum(expected.values()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found[name],
            parameter.grad,
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


Build = Callable[[], nn.Module]
Loss = Callable[[], ContrastiveLoss]
