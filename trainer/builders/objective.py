"""The objective of the settings: the loss, its teacher or reference features, its weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.features.store import open_features
from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.models.typed import as_clip
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.columns import read_column
from siftclip.datamodules.selection.selection import row_weights
from siftclip.datamodules.streaming.batches import Batch
from siftclip.errors import InputError
from siftclip.files import content_digest
from siftclip.selectors.core.base import product_of_weights
from siftclip.trainer.builders.losses import check_model, loss_from, loss_identity
from siftclip.trainer.builders.models import clip_model_from, model_files
from siftclip.trainer.builders.selection import PoolSelection
from siftclip.trainer.losses import LossRun
from siftclip.trainer.optim.gradients import Objective, TeacherFeatures, no_teacher
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.settings.loss import LossSettings, SampleWeights
from siftclip.trainer.settings.loss import TeacherFeatures as CachedFeatures

_PROBE = ["a photo of a cat", "Two dogs, 3 birds & a very small car!"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossData:
    """What the batches carry for the loss."""

    references: RowFeatures | None  # features of a teacher
    weights: np.ndarray | None  # float32 [n] by the pool's rows, of `loss.weights` and `selector`
    identity: dict[str, Any]  # of the files that these come from


def open_loss_data(
    loss: LossSettings, selected: PoolSelection, *, max_bad_fraction: float
) -> LossData:
    """Open the files that the loss needs and check them against the selection.

    Raises:
        InputError: a file is missing or damaged, or lacks a selected sample.
    """
    pool, rows = selected.pool, np.unique(selected.rows)
    identity: dict[str, Any] = {}
    references = weights = None
    cached = loss.cached_teacher
    if cached is not None:
        name, root = cached.name, cached.root
        keys = (f"{name}_img", f"{name}_txt")
        store = open_features(
            pool,
            folder=None if root is None else Path(root),
            keys=keys,
            max_bad_fraction=max_bad_fraction,
        )
        references = RowFeatures.build(store, keys, len(pool))
        lacking = int((references.part_of_row[rows] < 0).sum())
        if lacking:
            raise InputError(
                f"loss.teacher.features: {lacking} of {len(rows)} selected samples have no "
                f"features {name} in {store.folder}. Embed the pool, or select among samples that "
                "have them."
            )
        identity["features"] = store.fingerprint
    weighed = loss.sample_weights
    if weighed is not None and weighed.path is not None:
        weights = _sample_weights(weighed, weighed.path, pool, rows)
        identity["weights"] = content_digest(Path(weighed.path))
    if loss.live_teacher is not None:
        identity["teacher"] = model_files(loss.live_teacher)
    identity |= loss_identity(loss)
    weights = product_of_weights(weights, row_weights(selected.selection, pool))
    return LossData(references=references, weights=weights, identity=identity)


def _sample_weights(settings: SampleWeights, path: str, pool: Pool, rows: np.ndarray) -> np.ndarray:
    """Read what each sample counts: float32 by the pool's rows."""
    with options_of(under("loss.weights", "path", "column")):
        weights = read_column(pool, Path(path), settings.column).astype(np.float32)
    chosen = weights[rows]
    bad = int((~(np.isfinite(chosen) & (chosen >= 0))).sum())  # NaN: a sample without a weight
    if bad:
        raise InputError(
            f"loss.weights.path={path!r} must give every selected sample a finite weight of at "
            f"least 0. {bad} of {len(rows)} have none, or another one."
        )
    if not chosen.any():
        raise InputError(f"loss.weights.path={path!r}: all weights are 0.")
    return weights


def objective_from(
    loss: LossSettings, clip: ClipModel, data: LossData, rows: np.ndarray
) -> Objective:
    """Build the objective that trains `clip`.

    Args:
        loss: its settings.
        clip: the model to be trained.
        data: of the loss.
        rows: int64 [n], the selection.

    Raises:
        InputError: loss, model and teacher do not go together.
    """
    teacher: TeacherFeatures = no_teacher
    cached, live = loss.cached_teacher, loss.live_teacher
    scale = cached.logit_scale if isinstance(cached, CachedFeatures) else None
    if data.references is not None:
        teacher = CachedTeacher(data.references.keys)
    elif live is not None:
        model = clip_model_from(live, trained=True)
        _check_same_inputs(clip, model)
        teacher = ModelTeacher(model.model)
        scale = float(as_clip(model.model).logit_scale.exp())
    run = LossRun(selected_rows=np.unique(rows), teacher_logit_scale=scale)
    built = loss_from(loss, run)
    check_model(built, clip.model, loss.title)
    _check_tokens(clip, loss.title)
    if built.fixed_logit_scale is not None:
        _fix_logit_scale(clip.model, built.fixed_logit_scale)
    return Objective(loss=built, teacher=teacher)


def _check_tokens(clip: ClipModel, title: str) -> None:
    """Check that a text decoder, if there is one, can write all tokens of its tokenizer."""
    from open_clip.tokenizer import HFTokenizer

    decoder: Any = getattr(clip.model, "text_decoder", None)
    if decoder is None or not isinstance(clip.tokenizer, HFTokenizer):
        return
    outputs, tokens = decoder.text_projection.shape[1], len(clip.tokenizer.tokenizer)
    if outputs < tokens:
        raise InputError(
            f"{title}: the text decoder of this model can write {outputs} tokens, and its "
            f"tokenizer makes {tokens}. Set model.architecture.text_cfg.vocab_size={tokens}."
        )


def _fix_logit_scale(model: nn.Module, scale: float) -> None:
    with torch.no_grad():
        as_clip(model).logit_scale.fill_(math.log(scale))
    model.logit_scale.requires_grad_(False)


def _check_same_inputs(student: ClipModel, teacher: ClipModel) -> None:
    """Check that the teacher sees the student's images and tokens, as in open_clip."""
    # through JSON, because open_clip has lists where files are read and tuples elsewhere
    ours, theirs = (
        json.loads(json.dumps(clip.config["preprocess_cfg"])) for clip in (student, teacher)
    )
    different = {
        key: (ours.get(key), theirs.get(key)) for key in ours if ours[key] != theirs.get(key)
    }
    if different:
        raise InputError(
            f"loss.teacher.model must take the images of the model. They differ in {different} "
            "(model, teacher). Use cached features (loss.teacher.features) instead."
        )
    if not same_tokens(student, teacher):
        raise InputError(
            "loss.teacher.model must have the tokenizer and context length of the model. Use "
            "cached features (loss.teacher.features) instead."
        )


def same_tokens(first: ClipModel, second: ClipModel) -> bool:
    """Return whether two models make the same tokens of a text, equally many."""
    tokens = [clip.tokenizer(_PROBE) for clip in (first, second)]
    return tokens[0].shape == tokens[1].shape and torch.equal(*tokens)


class CachedTeacher:
    """Takes the teacher's features from the batch."""

    reads_images = False

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.image_key, self.text_key = keys

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.references[self.image_key], batch.references[self.text_key]


class ModelTeacher:
    """A frozen model. It is no part of the trained module, so no checkpoint holds it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = torch.device("cpu")  # where load_clip_model builds models

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.device != batch.images.device:  # once: it walks over all weights
            self.device = batch.images.device
            self.model.to(self.device)
        return (
            as_clip(self.model).encode_image(batch.images, normalize=True),
            as_clip(self.model).encode_text(batch.tokens, normalize=True),
        )
