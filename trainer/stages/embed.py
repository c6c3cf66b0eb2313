"""The embed stage: an open_clip model over every sample of a pool, features written shard by shard.

A shard's features are one npz, written when its last sample is embedded, so that a killed run
continues with the next shard. Ranks take turns with the shards.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from siftclip.damaged import set_aside
from siftclip.datamodules.features.provenance import (
    MANIFEST_NAME,
    SOURCE,
    is_stale,
    shard_source,
)
from siftclip.datamodules.features.store import check_activation, is_readable
from siftclip.datamodules.identity.identities import differences, kept_identity, say_reused
from siftclip.datamodules.index.faults import FaultLog
from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.models.record import fingerprint, model_record
from siftclip.datamodules.pool.image_formats import describe_formats
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.streaming.batches import Request
from siftclip.datamodules.streaming.device_copies import on_device
from siftclip.datamodules.streaming.loader import make_loader
from siftclip.errors import InputError
from siftclip.files import has_content, read_json_object, write_json, write_npz
from siftclip.locks import LOCK_NAME, locked
from siftclip.progress import show_progress
from siftclip.ranks import Ranks, of_first_rank
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.builders.selection import features_folder, pool_from
from siftclip.trainer.models.embedding import embed_batch, embedding_dataset
from siftclip.trainer.runtime.cores import share_cores
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.runtime.lightning_setup import (
    loader_options,
    local_ranks,
    make_fabric,
    resolve_precision,
)
from siftclip.trainer.runtime.selection_ranks import ranks_of
from siftclip.trainer.settings.commands import EmbedCommand
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.writing import delete_file

if TYPE_CHECKING:
    from lightning import Fabric

_State = Literal["missing", "damaged", "stale", "kept"]  # stale: of what a tar held before

_WAY_OUT = (
    "Choose another features.name or features.root, or replace the features with reuse=false."
)

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class ShardSampler(Sampler[list[Request]]):
    """The rows of some shards in order, in batches that never cross a shard's end."""

    pool: Pool
    shards: list[int]
    batch_size: int

    def _batches(self) -> Iterator[np.ndarray]:
        for shard in self.shards:
            rows = self.pool.shard_rows(shard)
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return sum(1 for _ in self._batches())

    def __iter__(self) -> Iterator[list[Request]]:
        for rows in self._batches():
            yield [(row, row) for row in rows.tolist()]


def feature_path(folder: Path, pool: Pool, shard: int) -> Path:
    """Return where the features of a shard are."""
    return folder / f"{pool.shards[shard].stem}.npz"


def embed_stage(settings: EmbedCommand, *, pool: Pool | None = None) -> Path:
    """Embed every sample of the pool; returns the folder of the features.

    Bad samples get NaN features, so that no selector can keep them; they are counted and bounded by
    `pool.max_bad_fraction`.

    Args:
        settings: of the command.
        pool: that `settings` name, where it is open already.

    Raises:
        InputError: an option is wrong, the folder holds features of another model or pool, or too
            many samples are bad.
    """
    features, common = settings.features, settings.common
    if features.model is None:
        raise RuntimeError("settings without a model are refused where they are read")
    check_hardware(settings.trainer)
    clip = clip_model_from(features.model, trained=True)
    pool = pool_from(settings.pool, progress=common.progress) if pool is None else pool
    folder = features_folder(features, pool)
    if folder is None:
        raise RuntimeError("features with a model have a folder")
    workers = loader_options(settings.data, settings.trainer).num_workers
    share_cores(workers, local_ranks(settings.trainer))
    fabric = make_fabric(settings.trainer)
    fabric.launch()
    ranks = ranks_of(fabric)
    complete = (
        ranks.rank == 0  # whose answer counts: the others need not look
        and common.reuse
        and (folder / MANIFEST_NAME).exists()
        and all(_state(folder, pool, shard) == "kept" for shard in range(len(pool.shards)))
    )
    lock = locked(folder / LOCK_NAME, owner=f"The features {folder}", ranks=ranks, wait=True)
    with nullcontext() if of_first_rank(ranks, complete) else lock:
        _claim(folder, _manifest(settings, clip, pool), ranks, reuse=common.reuse)
        _embed(settings, clip, pool, folder, fabric)
    return folder


def _embed(
    settings: EmbedCommand, clip: ClipModel, pool: Pool, folder: Path, fabric: Fabric
) -> None:
    """Write the features that are missing."""
    features, common = settings.features, settings.common
    # By number, not by what is left: a rank that starts late sees what the others have written.
    share = list(range(fabric.global_rank, len(pool.shards), fabric.world_size))
    mine = _shards_to_embed(folder, pool, share) if common.reuse else share
    faults, formats = FaultLog(), Counter[str]()
    sampler = ShardSampler(pool=pool, shards=mine, batch_size=features.batch_size)
    loader = _loader(settings, clip, sampler, pin_memory=fabric.device.type == "cuda")
    bar = show_progress(
        total=sum(len(pool.shard_rows(shard)) for shard in mine),
        label="embed",
        unit="sample",
        bar=common.progress,
        speaks=fabric.global_rank == 0,
    )
    model = clip.model.to(fabric.device).eval()
    parts: list[tuple[Tensor, Tensor]] = []
    with bar:
        for batch in on_device(loader, fabric.device) if mine else ():
            with fabric.autocast():
                parts.append(embed_batch(model, batch))
            for cause, place in batch.faults:
                faults.add(cause, place)
            formats.update(batch.formats)
            rows = pool.shard_rows(int(pool.shard_of_row[int(batch.rows[0])]))
            if int(batch.rows[-1]) == rows[-1]:
                _write_shard(folder, pool, rows, features.name, parts)
                parts = []
            bar.update(len(batch.rows))
    if faults.samples:
        log.warning("embed: without features %s", faults.summary())
    total = sum(len(pool.shard_rows(shard)) for shard in mine)
    if formats:
        log.info("embed: %s", describe_formats(formats, total))
    faults.check(
        owner=f"embed {pool.root}",
        total=total,
        max_bad_fraction=settings.pool.max_bad_fraction,
    )
    fabric.barrier()  # the features are complete when any rank returns


def _write_shard(
    folder: Path, pool: Pool, rows: np.ndarray, name: str, parts: list[tuple[Tensor, Tensor]]
) -> None:
    image, text = (torch.cat(features).numpy() for features in zip(*parts, strict=True))
    shard = int(pool.shard_of_row[rows[0]])
    write_npz(
        feature_path(folder, pool, shard),
        **{"uids": pool.uids[rows], f"{name}_img": image, f"{name}_txt": text},
        **{SOURCE: shard_source(pool, shard)},
    )


def _shards_to_embed(folder: Path, pool: Pool, share: list[int]) -> list[int]:
    """Find those of some shards without features of their current tar; says what is reused."""
    by_state: dict[_State, list[int]] = {"missing": [], "damaged": [], "stale": [], "kept": []}
    for shard in share:
        by_state[_state(folder, pool, shard)].append(shard)
    damaged, stale, kept = by_state["damaged"], by_state["stale"], by_state["kept"]
    if damaged:
        log.warning(
            "the features of %d tars are damaged (such as of %s): they are made again",
            len(damaged),
            _names(pool, damaged),
        )
        for shard in damaged:
            set_aside(feature_path(folder, pool, shard))
    if stale:
        log.warning(
            "%d tars hold other members than when they were embedded (such as %s): they are "
            "embedded again",
            len(stale),
            _names(pool, stale),
        )
    if kept:
        paths = [feature_path(folder, pool, shard) for shard in kept]
        oldest = min(paths, key=lambda path: path.stat().st_mtime)
        say_reused(f"the features of {len(kept)} of {len(share)} shards", oldest)
    return sorted({*share}.difference(kept))


def _state(folder: Path, pool: Pool, shard: int) -> _State:
    """Return what there is of a shard's features."""
    path = feature_path(folder, pool, shard)
    if not path.exists():
        return "missing"
    if not is_readable(path):
        return "damaged"
    return "stale" if is_stale(path, pool, shard) else "kept"


def _names(pool: Pool, shards: list[int]) -> str:
    return ", ".join(pool.shards[shard].name for shard in shards[:3])


def _loader(
    settings: EmbedCommand, clip: ClipModel, sampler: ShardSampler, *, pin_memory: bool
) -> DataLoader[Any]:
    return make_loader(
        embedding_dataset(clip, sampler.pool, max_image_pixels=settings.data.max_image_pixels),
        sampler,
        loader_options(settings.data, settings.trainer),
        pin_memory=pin_memory,
    )


def _manifest(settings: EmbedCommand, clip: ClipModel, pool: Pool) -> dict[str, Any]:
    precision = resolve_precision(settings.trainer.precision)
    weights = fingerprint(clip)
    return {
        "name": settings.features.name,
        "model": to_plain(settings.features.model),
        "weights": weights,
        "loaded": model_record(clip),
        "pool": {"fingerprint": pool.fingerprint, "samples": len(pool)},
        "precision": precision,
        "identity": kept_identity(
            "features",
            {
                "model": weights,
                "pool": pool.fingerprint,
                "precision": precision,
                "data": {"max_image_pixels": settings.data.max_image_pixels},
                **pool.caption_identity,
            },
        ),
    }


def _claim(folder: Path, manifest: dict[str, Any], ranks: Ranks, *, reuse: bool) -> None:
    """Write the manifest before the first shard, or check that the one there is the same.

    Without reuse the features that are there go first: a run that is cut off would leave some of
    them beside new ones, under the new manifest.
    """
    path = folder / MANIFEST_NAME
    kept = of_first_rank(ranks, has_content(path))
    others = sorted(folder.glob("*.npz"))
    if not kept and of_first_rank(ranks, bool(others)):
        raise InputError(
            f"{folder} holds features without a {MANIFEST_NAME} that says what they are of. Delete "
            "them, or choose another features.name or features.root."
        )
    if kept and reuse:
        try:
            check_activation(folder)
            found = read_json_object(path)
        except InputError as error:
            raise InputError(f"{error} {_WAY_OUT}") from None
        reasons = differences_of_features(found, manifest)
        if reasons:
            raise InputError(
                f"{folder} holds features that differ in {' and '.join(reasons)} (see "
                f"{MANIFEST_NAME} there). {_WAY_OUT}"
            )
        return
    if ranks.rank == 0:
        for old in others:
            delete_file(old)
        write_json(path, manifest)
    ranks.barrier()  # the others look for features


def differences_of_features(kept: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """Say in what kept features differ from those that a manifest describes."""
    identity = kept.get("identity")
    if isinstance(identity, dict):
        return differences(identity, manifest["identity"])
    # An earlier version, whose precision may be "auto": bf16 on the GPUs that have it.
    keys = ["weights", "pool", *(["precision"] if kept.get("precision") != "auto" else [])]
    words = {"weights": "the model", "pool": "the pool", "precision": "the precision"}
    return [words[key] for key in keys if kept.get(key) != manifest[key]]
