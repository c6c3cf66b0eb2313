"""Features of images and texts of tasks, shared among ranks.

Batches are cut before they are shared out, and rank r of W takes the batches r, r + W and so on. So
a feature does not depend on how many ranks there are, and no image is computed twice.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from siftclip.agreement import share_texts
from siftclip.datamodules.models.autocast import autocast
from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.models.typed import as_clip
from siftclip.datamodules.pool.image_formats import describe_formats
from siftclip.datamodules.streaming.device_copies import on_device
from siftclip.eval.encoding.texts import (
    check_tokens,
    encode_tokens,
    length_batches,
    token_lengths,
)
from siftclip.eval.tasks.images import ImageBatch, ImageDataset, ImageTable, only_item
from siftclip.progress import Progress, show_progress
from siftclip.ranks import OneRank, Ranks, sum_arrays

_ROWS_A_SUM = 65_536  # of features that ranks exchange at once
_TEXTS_A_TOKENIZING = 16_384
_NO_IMAGES = torch.empty(0)  # of batches that are encoded

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """How features are computed; `device` decides nothing about them but the last bits."""

    device: torch.device
    batch_size: int = 256
    num_workers: int = 0
    max_image_pixels: int = 178_956_970  # Pillow's own limit
    autocast: torch.dtype | None = None  # None: fp32
    progress: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFeatures:
    """Features of a table's images, on every rank."""

    features: np.ndarray  # float32 [U, d], unit vectors
    ids: np.ndarray  # uint64 [U], see `images.content_id`
    faults: dict[int, str]  # what is wrong with the image of a row


class _Batches(Sampler[list[int]]):
    def __init__(self, batches: Sequence[np.ndarray]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self.batches)


class Encoder:
    """Runs the towers of a model on the images and texts of tasks.

    Args:
        clip: the model, in the mode and on the device that it is to be used in.
        options: how.
        ranks: with whom; all of them make the same calls.
    """

    def __init__(self, clip: ClipModel, options: EncodeOptions, ranks: Ranks | None = None) -> None:
        from siftclip.datamodules.streaming.image_transform import ImageTransform

        self.clip = clip
        self.options = options
        self.ranks: Ranks = OneRank() if ranks is None else ranks
        self._transform = ImageTransform(clip.eval_transform)

    def image_sets(self, table: ImageTable, sets: Sequence[np.ndarray]) -> Iterator[ImageFeatures]:
        """Yield the features of sets of images, one set after the other, with one loader for all.

        Args:
            table: of the images.
            sets: int64 rows of the table, each set in batches of its own, so that its features do
                not depend on what else is encoded.
        """
        size, ranks = self.options.batch_size, self.ranks
        cut = [[rows[i : i + size] for i in range(0, len(rows), size)] for rows in sets]
        numbered = [(owner, batch) for owner, batches in enumerate(cut) for batch in batches]
        mine = numbered[ranks.rank :: ranks.size]
        loader = self._loader(table, [batch for _, batch in mine]) if mine else ()
        arriving = on_device(loader, self.options.device)
        total = sum(map(len, sets))
        done = counted = images = 0
        formats = Counter[str]()
        with self._progress(total, "images") as bar:
            for owner, rows in enumerate(sets):
                parts: list[tuple[ImageBatch, np.ndarray]] = []
                while done < len(mine) and mine[done][0] == owner:
                    batch = next(arriving)
                    features = self._encode_images(batch.images)
                    parts.append((batch._replace(images=_NO_IMAGES), features))
                    counted, before = min(counted + len(batch.rows) * ranks.size, total), counted
                    bar.update(counted - before)
                    formats.update(batch.formats)
                    images += len(batch.rows)
                    done += 1
                if formats and done == len(mine):
                    log.info("tasks: %s", describe_formats(formats, images))
                    formats.clear()
                yield self._gather(table, rows, parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Compute unit features of texts, float32 [n, d], on the model's device and on every rank.

        Raises:
            InputError: the tokenizer is not that of the model.
        """
        model, device = self.clip.model, self.options.device
        tokens = torch.cat(
            [
                self.clip.tokenizer(list(texts[start : start + _TEXTS_A_TOKENIZING]))
                for start in range(0, len(texts), _TEXTS_A_TOKENIZING)
            ]
        )
        check_tokens(model, tokens)
        ends = token_lengths(model, tokens)
        lengths = torch.full((len(tokens),), tokens.shape[1]) if ends is None else ends
        batches = length_batches(lengths.numpy(), self.options.batch_size)
        mine = batches[self.ranks.rank :: self.ranks.size]
        parts = []
        with self._progress(sum(map(len, mine)), "texts", delay_seconds=1.0) as bar:
            for rows in mine:
                part = tokens[rows, : int(lengths[rows[0]])].to(device)
                with self._autocast():
                    parts.append((rows, encode_tokens(model, part).float().cpu().numpy()))
                bar.update(len(rows))
        features = self._place(len(texts), parts)
        return torch.from_numpy(features).to(device)

    def _loader(self, table: ImageTable, batches: Sequence[np.ndarray]) -> DataLoader[ImageBatch]:
        workers = min(self.options.num_workers, len(batches))
        return DataLoader(
            ImageDataset(table, self._transform, max_image_pixels=self.options.max_image_pixels),
            batch_sampler=_Batches(batches),
            num_workers=workers,
            collate_fn=only_item,  # type: ignore[arg-type]  # it gets no list
            prefetch_factor=2 if workers else None,
            pin_memory=self.options.device.type == "cuda",
            generator=torch.Generator(),  # without one it takes a number from the global generator
        )

    def _progress(self, total: int, label: str, *, delay_seconds: float = 0.0) -> Progress:
        return show_progress(
            total=total,
            label=label,
            unit=label.removesuffix("s"),
            bar=self.options.progress,
            speaks=self.ranks.rank == 0,
            delay_seconds=delay_seconds,
        )

    def _autocast(self) -> torch.autocast:
        return autocast(self.options.device, self.options.autocast)

    def _encode_images(self, images: Tensor) -> np.ndarray:
        if self._transform.normalization is not None:
            images = self._transform.normalization(images)
        with self._autocast():
            features = as_clip(self.clip.model).encode_image(images, normalize=True)
        array: np.ndarray = features.float().cpu().numpy()
        return array

    def _gather(
        self, table: ImageTable, rows: np.ndarray, parts: list[tuple[ImageBatch, np.ndarray]]
    ) -> ImageFeatures:
        """Gather the features of one set on all ranks, by position in `rows`."""
        place = np.empty(len(table), dtype=np.int64)
        place[rows] = np.arange(len(rows))
        features = self._place(len(rows), [(place[batch.rows], values) for batch, values in parts])
        ids = np.zeros(len(rows), dtype=np.int64)
        faulty = np.zeros(len(rows), dtype=np.int64)
        messages: dict[int, str] = {}
        for batch, _ in parts:
            ids[place[batch.rows]] = batch.ids.view(np.int64)
            for row, message in batch.faults:
                faulty[place[row]] = 1
                messages[int(place[row])] = message
        ids = sum_arrays(self.ranks, ids).view(np.uint64)
        where = np.flatnonzero(sum_arrays(self.ranks, faulty)).tolist()
        texts = share_texts(self.ranks, [messages.get(row, "") for row in where])
        return ImageFeatures(
            features=features, ids=ids, faults=dict(zip(where, texts, strict=True))
        )

    def _place(self, count: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Put rows that the ranks have computed together on all of them: float32 [count, d]."""
        width = np.asarray([parts[0][1].shape[1] if parts else 0])
        if self.ranks.size > 1:  # a rank without a batch does not know it
            known = sum_arrays(self.ranks, np.asarray([int(len(parts) > 0)]))
            width = sum_arrays(self.ranks, width) // np.maximum(known, 1)
        features = np.zeros((count, int(width[0])), dtype=np.float32)
        for rows, of_rows in parts:
            features[rows] = of_rows
        if self.ranks.size > 1:
            # All but one add zero to a number, so that the sums are exact
            for start in range(0, count, _ROWS_A_SUM):
                block = slice(start, start + _ROWS_A_SUM)
                features[block] = sum_arrays(self.ranks, features[block])
        return features
