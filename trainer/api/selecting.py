"""Scores and selections: of a pool, or of arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.features.files import read_feature_file
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.selection import SelectedSamples, make_selection
from siftclip.errors import ParameterError
from siftclip.selectors.core.arrays import GIVEN, Array, Arrays, array_source
from siftclip.selectors.core.base import Selector, run
from siftclip.selectors.core.description import nested
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.selectors.core.source import FeatureFile
from siftclip.trainer.api.features import Features, pool_features
from siftclip.trainer.api.nodes import node_of_selector, recorded_parameters, selector_name
from siftclip.trainer.api.sections import (
    CommonArguments,
    PathLike,
    common_settings,
    pool_settings,
    require_known,
    require_pool,
    require_selector,
    trainer_settings,
)
from siftclip.trainer.builders.selection import PoolSelection, score_stage, select_stage
from siftclip.trainer.settings.commands import SelectSections

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FILE_ROWS = 65536  # of a feature file that are read at a time


def score(
    pool: Pool | PathLike,
    features: Features | str | None,
    selector: Selector,
    *,
    name: str | None = None,
    **common: Unpack[CommonArguments],
) -> np.ndarray:
    """Score the samples of a pool, as `siftclip score` does.

    Args:
        pool: whose samples are scored.
        features: from `embed`; or the name of a feature set of the pool's metadata, such as "l14".
        selector: one with scores.
        name: of the selector, for messages.
        **common: see `CommonArguments`.

    Returns:
        float32 [n] by the pool's rows, NaN for samples without a score.

    Raises:
        InputError: the selector chooses sets and has no scores, or a file is missing or damaged.
    """
    require_known(score, common, CommonArguments)
    opened, settings = select_settings("score", pool, features, selector, name=name, common=common)
    return score_stage(settings, pool=opened).scores


@overload
def select(
    pool: Pool | PathLike,
    features: Features | str | None,
    selector: Selector,
    *,
    name: str | None = None,
    **common: Unpack[CommonArguments],
) -> PoolSelection: ...


@overload
def select(
    pool: None = None,
    features: Arrays | tuple[Array, Array] | None = None,
    selector: Selector = ...,
    *,
    captions: Sequence[str] | None = None,
    sizes: Array | None = None,
    column: Array | None = None,
    uids: np.ndarray | None = None,
) -> SelectedSamples: ...


def select(
    pool: Pool | PathLike | None = None,
    features: Features | str | Arrays | tuple[Array, Array] | None = None,
    selector: Selector | None = None,
    *,
    name: str | None = None,
    captions: Sequence[str] | None = None,
    sizes: Array | None = None,
    column: Array | None = None,
    uids: np.ndarray | None = None,
    **common: Unpack[CommonArguments],
) -> SelectedSamples:
    """Select samples of a pool, as `siftclip select` does; or of arrays, without a pool.

    Args:
        pool: whose samples are selected; None: those of the arrays.
        features: from `embed`; or the name of a feature set of the pool's metadata, such as "l14".
            Without a pool: images and texts, float [n, d] of numpy or torch each; images alone; or
            a mapping of arrays by key. Rows that are not of unit norm are scaled to it.
        selector: what decides, such as `siftclip.selectors.NegCLIPLoss(fraction=0.3)`. The features
            that it does not name itself are those that are given.
        name: of the selector, for folders and tables; None: what the command line calls it.
        captions: n texts, without a pool.
        sizes: int [n, 2], width and height in pixels, without a pool.
        column: float [n], external scores, without a pool.
        uids: uint64 [n, 2], without a pool; None: the numbers of the samples.
        **common: see `CommonArguments`; with a pool.

    Returns:
        What was selected. With a pool it can be trained on, and is kept below `output_dir`.

    Raises:
        InputError: nothing is kept, or something that the selector reads is missing.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> images = np.array([[1, 0], [0, 1], [0.8, 0.6]], dtype=np.float32)
        >>> texts = np.array([[1, 0], [1, 0], [1, 0]], dtype=np.float32)
        >>> selector = siftclip.selectors.ClipScore(fraction=0.67)
        >>> selection = siftclip.select(features=(images, texts), selector=selector)
        >>> selection, selection.rows
        (SelectedSamples(clip_score: 2 samples), array([0, 2]))
        >>> selection.scores
        array([1. , 0.8], dtype=float32)
    """
    require_known(select, common, CommonArguments)
    chosen = require_selector("select", selector)
    arrays = {"captions": captions, "sizes": sizes, "column": column, "uids": uids}
    given = [key for key, value in arrays.items() if value is not None]
    if pool is None and not isinstance(features, Features):
        if common:
            rule = "has no place without a pool: nothing is written, and nothing kept is read"
            raise ParameterError(rule, owner="select", parameter=next(iter(common)))
        return _of_arrays(chosen, features, name=name, **arrays)
    if given:
        rule = "has no place beside a pool, which has its own"
        raise ParameterError(rule, owner="select", parameter=given[0])
    if pool is None and isinstance(features, Features):
        pool = features.pool
    opened, settings = select_settings("select", pool, features, chosen, name=name, common=common)
    return select_stage(settings, may_launch=True, pool=opened)


def select_settings(
    owner: str,
    pool: Any,
    features: Any,
    selector: Any,
    *,
    name: str | None,
    common: Mapping[str, Any],
) -> tuple[Pool, SelectSections]:
    """Return the pool, and the options of scoring or selecting."""
    opened = require_pool(owner, pool)
    if features is not None and not isinstance(features, Features | str):
        raise ParameterError(
            "must be what siftclip.embed returns, or the name of a feature set of the pool's "
            'metadata, such as "l14"',
            owner=owner,
            parameter="features",
            got=type(features).__name__,
            way_out="Arrays in memory are selected from without a pool: select(features=...).",
        )
    chosen = require_selector(owner, selector)
    if features is None and bind_features(chosen, GIVEN) is not chosen:
        raise ParameterError(
            f"must be given: {type(chosen).__name__} reads features and names none",
            owner=owner,
            parameter="features",
            way_out='Give what siftclip.embed returns, or the name of a set, such as "l14".',
        )
    of_pool = pool_features(opened, features)
    return opened, SelectSections(
        common=common_settings(common),
        pool=pool_settings(opened),
        features=of_pool.settings,
        selector=node_of_selector(chosen, place="selector", features=of_pool.name, name=name),
        trainer=trainer_settings(common),
    )


def _of_arrays(
    selector: Selector, features: Any, *, name: str | None, **others: Any
) -> SelectedSamples:
    """Select among samples in memory."""
    if isinstance(features, tuple) and len(features) != 2:
        rule = f"must be images and texts, two arrays. Got {len(features)}"
        raise ParameterError(rule, owner="select", parameter="features")
    images, texts = features if isinstance(features, tuple) else (features, None)
    bound = bind_features(selector, GIVEN)
    requires = bound.requires
    source = array_source(
        requires,
        owner=selector,
        images=images,
        texts=texts,
        files={file: _read_file(file) for file in _files(bound)},
        **others,
    )
    choice = run(bound, source)
    manifest = {
        "selector": selector_name(type(selector)) if name is None else name,
        "parameters": recorded_parameters(bound),
    }
    kept = np.flatnonzero(choice.multiplicities)
    selection = make_selection(
        source.uids, choice.multiplicities, manifest, weights=choice.weights, scores=choice.scores
    )
    return SelectedSamples(selection=selection, rows=np.repeat(kept, choice.multiplicities[kept]))


def _files(selector: Selector) -> list[FeatureFile]:
    members = nested(selector, Selector)  # type: ignore[type-abstract]  # mypy 4717
    return list(dict.fromkeys(file for member in members for file in member.requires.files))


def _read_file(file: FeatureFile) -> Tensor:
    return torch.cat([*read_feature_file(file, _FILE_ROWS)])
