"""Features of a pool: made by a model, or brought along by the pool."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.features.store import open_features
from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import ParameterError
from siftclip.selectors.core.source import IMAGE, TEXT
from siftclip.trainer.api.sections import (
    LoadingArguments,
    PathLike,
    common_settings,
    data_settings,
    model_place,
    pool_settings,
    require_known,
    require_pool,
    trainer_settings,
    whole_model,
)
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import EmbedCommand, TargetCommand
from siftclip.trainer.settings.given import given_group
from siftclip.trainer.settings.model import EmbeddingModel
from siftclip.trainer.settings.pool import FeaturesSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model: TypeAlias = PathLike | RunDir | EmbeddingModel


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Features:
    """A feature set of a pool: image and text features by one model, in files."""

    pool: Pool
    settings: FeaturesSettings
    folder: Path | None  # None: the pool's own metadata

    @property
    def name(self) -> str:
        """The arrays are NAME_img and NAME_txt."""
        return self.settings.name

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Read all features: images float [n, d] and texts float [n, e], by the pool's rows.

        As they are stored, mostly as float16; NaN where a sample has none. This is for pools whose
        features fit into memory.
        """
        keys = (f"{self.name}_{IMAGE}", f"{self.name}_{TEXT}")
        bound = self.pool.options.max_bad_fraction
        store = open_features(self.pool, folder=self.folder, keys=keys, max_bad_fraction=bound)
        rows = RowFeatures.build(store, keys, len(self.pool))
        there = np.flatnonzero(rows.part_of_row >= 0)
        gathered = rows.gather(there)
        images, texts = (_scattered(gathered[key].numpy(), there, len(self.pool)) for key in keys)
        return images, texts

    def __repr__(self) -> str:
        place = "the pool's metadata" if self.folder is None else str(self.folder)
        return f"Features({self.name!r} of {len(self.pool):,} samples, in {place})"


def _scattered(values: np.ndarray, rows: np.ndarray, samples: int) -> np.ndarray:
    if len(rows) == samples:
        return values
    everywhere = np.full((samples, values.shape[1]), np.nan, dtype=values.dtype)
    everywhere[rows] = values
    return everywhere


def pool_features(pool: Pool, features: Features | str | None) -> Features:
    """Return features of a pool, from what names them.

    Args:
        pool: whose features they are.
        features: such; or the name of those that the pool's metadata has, such as "l14"; None: any,
            for selectors that read none.
    """
    if isinstance(features, Features):
        return features
    if features is not None and "/" in features:
        raise ParameterError(
            "must be what siftclip.embed returns, or the name of a feature set of the pool's "
            "metadata",
            parameter="features",
            value=features,
            way_out="Features in a folder: siftclip.embed(pool, model, folder=...).",
        )
    own = {} if features is None else {"name": features}
    settings = given_group(FeaturesSettings, "features", {"name": "l14", "model": None, **own})
    return Features(pool=pool, settings=settings, folder=None)


def features_settings(
    model: Model, pretrained: str | None, *, name: str | None, **others: Any
) -> FeaturesSettings:
    """Return the options of a feature set that a model makes."""
    if isinstance(model, EmbeddingModel):
        model = whole_model(model, pretrained)
    else:
        model = EmbeddingModel(name=model_place(model), pretrained=pretrained)
    if name is None:
        parts = (str(model.name), model.pretrained)
        name = "-".join(re.sub(r"[^\w.]+", "_", Path(part).name) for part in parts if part)
    given = {"name": name, "model": model, **{k: v for k, v in others.items() if v is not None}}
    settings: FeaturesSettings = given_group(FeaturesSettings, "features", given)
    return settings


def embed(
    pool: Pool | PathLike,
    model: Model,
    pretrained: str | None = None,
    *,
    name: str | None = None,
    folder: PathLike | None = None,
    batch_size: int | None = None,
    **common: Unpack[LoadingArguments],
) -> Features:
    """Embed images and captions of a pool with an open_clip model, as `siftclip embed` does.

    Args:
        pool: to embed; tars that have been embedded before are not embedded again.
        model: its name in open_clip, hf-hub:org/repo, a model folder, or a run; or all of its
            settings.
        pretrained: an open_clip tag such as "openai", or a checkpoint file.
        name: of the feature set; None: one made of the names of model and weights.
        folder: for the features; None: one in the pool's cache.
        batch_size: samples that the model embeds at once.
        **common: see `LoadingArguments`.

    Raises:
        InputError: the model cannot be built or has no weights, too many samples are bad, or the
            folder holds features of another model or pool.
    """
    from siftclip.trainer.stages.embed import embed_stage

    require_known(embed, common, LoadingArguments)
    pool = require_pool("embed", pool)
    root = None if folder is None else str(folder)
    settings = EmbedCommand(
        common=common_settings(common),
        pool=pool_settings(pool),
        features=features_settings(model, pretrained, name=name, root=root, batch_size=batch_size),
        data=data_settings(common),
        trainer=trainer_settings(common),
    )
    written = embed_stage(settings, pool=pool)
    return Features(pool=pool, settings=settings.features, folder=written)


def embed_target(
    tasks: PathLike,
    model: Model,
    pretrained: str | None = None,
    *,
    name: str | None = None,
    names: list[str] | None = None,
    split: str = "train",
    folder: PathLike | None = None,
    **common: Unpack[LoadingArguments],
) -> Path:
    """Embed target tasks for selectors that need a target, as `siftclip target` does.

    Args:
        tasks: a folder of tasks in clip_benchmark's layout, or one task.
        model: the one that has embedded the pool, see `embed`.
        pretrained: see `embed`.
        name: see `embed`.
        names: of the tasks; None: all.
        split: which of their splits; it must not be the one that is tested on.
        folder: for the files; None: one below `output_dir`.
        **common: see `LoadingArguments`.

    Returns:
        The folder, for `FeatureFile(path=folder, key="img")`.

    Raises:
        InputError: the model cannot be built, or a task is missing or damaged.
    """
    from siftclip.trainer.settings.tools import TargetSettings
    from siftclip.trainer.stages.target import target_stage

    require_known(embed_target, common, LoadingArguments)
    settings = TargetCommand(
        common=common_settings(common),
        features=features_settings(model, pretrained, name=name),
        data=data_settings(common),
        trainer=trainer_settings(common),
        target=TargetSettings(
            root=str(tasks),
            tasks=None if names is None else tuple(names),
            split=split,
            folder=None if folder is None else str(folder),
        ),
    )
    written, _ = target_stage(settings)
    return written
