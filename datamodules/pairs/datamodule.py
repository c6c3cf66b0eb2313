"""A `LightningDataModule` of selected pairs, for anybody's `LightningModule` and `Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from lightning import LightningDataModule, Trainer

from siftclip.cores import suggested_workers
from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.models.load import Transform
from siftclip.datamodules.pairs.forms import (
    Form,
    as_tuple,
    checked_tokenizer,
    checked_transform,
)
from siftclip.datamodules.pairs.loader import PairLoader, Progress
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.selection.selection import (
    SelectedSamples,
    Selection,
    expand_rows,
    row_weights,
)
from siftclip.datamodules.streaming.batches import SampleDataset
from siftclip.datamodules.streaming.datamodule import warn_of_copies, warn_of_small_cache
from siftclip.datamodules.streaming.load_counts import LoadCounts
from siftclip.datamodules.streaming.loader import LoaderOptions
from siftclip.datamodules.streaming.order import SampleOrder, require_window
from siftclip.datamodules.streaming.pixels import Normalization
from siftclip.errors import (
    InputError,
    ParameterError,
    require_choice,
    require_fraction,
    require_int,
)

if TYPE_CHECKING:
    from siftclip.datamodules.streaming.image_transform import LoaderResize

log = logging.getLogger(__name__)

Selected: TypeAlias = SelectedSamples | Selection | np.ndarray | Sequence[int]


class SelectedPairs(LightningDataModule):
    """Streams the selected pairs of a pool into any training loop.

    As the `datamodule` of `Trainer.fit`, or as a plain iterable from `loader`. Both give what
    Siftclip's own training reads with the same seed and global batch, to the bit, and continue in
    the middle of a pass, where a checkpoint was written.
    """

    def __init__(
        self,
        pool: Pool,
        selection: Selected | None = None,
        *,
        batch_size: int,
        transform: Transform,
        tokenizer: Callable[[list[str]], Any],
        seed: int = 0,
        num_workers: int | None = None,
        form: Form = as_tuple,
        window_shards: int | None = None,
        max_image_pixels: int = 25_000_000,
        max_bad_fraction: float = 0.01,
        resize: LoaderResize = "pillow",
        finished: bool = True,
        loader_options: LoaderOptions | None = None,
    ) -> None:
        """Set what is streamed.

        Args:
            pool: to read from.
            selection: what `siftclip.select` returns, a selection, or rows of the pool, int64 [n],
                those that count several times repeated; None: all samples.
            batch_size: samples of a batch on each device, as everywhere in Lightning.
            transform: RGB image -> float32 [3, h, w], such as open_clip's `preprocess_train` or a
                pipeline of torchvision. Its random numbers may come from torch, numpy and Python.
            tokenizer: captions -> int64 [n, t], such as open_clip's `get_tokenizer(name)`, or one
                of Hugging Face.
            seed: of order, augmentation and substitutes of bad samples.
            num_workers: loader processes per device; None: one for each of its cores but one.
            form: what a batch is to the training loop: `as_tuple`, `as_dict`, or a function.
            window_shards: shuffle over so many tars at a time; None: over the whole selection.
            max_image_pixels: larger images are bad samples; checked before decoding.
            max_bad_fraction: how many of the samples may be bad. They are replaced by others.
            resize: `torch` takes half the time, and some values differ, most by 1 of 255.
            finished: whether images come as float32, for any loop. False: as uint8, a quarter of
                the bytes for processes and copies to a device, where `normalization` finishes them;
                `ClipTraining` does so by itself. For transforms that end as open_clip's do.
            loader_options: more about the loader processes, in place of `num_workers`.

        Raises:
            InputError: an argument is not what it must be, or no sample of the selection is here.
        """
        super().__init__()
        if loader_options is not None and num_workers is not None:
            raise ParameterError(
                "must not be given beside loader_options, which have it, too",
                owner=self,
                parameter="num_workers",
                value=num_workers,
            )
        workers = suggested_workers() if num_workers is None else num_workers
        self.batch_size = require_int("batch_size", batch_size, minimum=1, owner=self)
        self.rows, weights = _rows_and_weights(pool, selection)
        if weights is not None and form is as_tuple:
            raise ParameterError(
                "must hand on the weights that this selection has",
                owner=self,
                parameter="form",
                got="as_tuple",
                way_out="Give as_dict as the form, or a selection whose weights are None.",
            )
        pixels = require_int("max_image_pixels", max_image_pixels, minimum=1, owner=self)
        self.options = loader_options or LoaderOptions(num_workers=workers)
        require_choice("resize", resize, ("pillow", "torch"), owner=self)
        self.seed, self.form = require_int("seed", seed, minimum=0, owner=self), form
        self.window_shards = require_window(window_shards)
        if max_bad_fraction != 0:
            require_fraction("max_bad_fraction", max_bad_fraction, owner=self)
        owner = f"pool {pool.root}"
        self.copies_fraction = 0.0  # of the batches, that hold a sample twice
        # of this rank, in the loader that a trainer has asked for last
        self.counts = LoadCounts(owner=owner, max_bad_fraction=max_bad_fraction)
        self.dataset = SampleDataset(
            reader=SampleReader(pool=pool, max_image_pixels=pixels),
            transform=checked_transform(transform),
            tokenizer=checked_tokenizer(tokenizer),
            seed=seed,
            substitutes=np.unique(self.rows),
            weights=weights,
            resize=resize,
            finished=finished,
        )
        if not finished and self.normalization is None:
            raise ParameterError(
                "needs a transform that ends with ToTensor and Normalize, as open_clip's do",
                owner=self,
                parameter="finished",
                value=finished,
                way_out="Leave it at True.",
            )
        warn_of_small_cache(pool, self.rows, self.window_shards)

    @property
    def pool(self) -> Pool:
        """The pool that is read."""
        return self.dataset.reader.pool

    @property
    def normalization(self) -> Normalization | None:
        """What makes float32 of images that are uint8, by a call; None with other transforms."""
        return self.dataset.normalization

    def uids(self, rows: Any) -> list[str]:
        """Return the uids of samples, such as those of `batch["rows"]`, int64 [b]."""
        return [format_uid(uid) for uid in self.pool.uids[np.asarray(rows)]]

    def loader(self, *, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> PairLoader:
        """Make an iterable of the batches of one rank, for a training loop without Lightning.

        Args:
            rank: of this process, as `torch.distributed.get_rank()` says.
            world_size: processes that train together, each with batches of `batch_size`.
            pin_memory: copy batches to page-locked memory, which a GPU reads faster.

        Raises:
            InputError: the rank is none of these processes.
        """
        require_int("world_size", world_size, minimum=1, owner=self)
        if require_int("rank", rank, minimum=0, owner=self) >= world_size:
            rule = f"must be below world_size={world_size}"
            raise ParameterError(rule, owner=self, parameter="rank", value=rank)
        order = SampleOrder(
            rows=self.rows,
            seed=self.seed,
            global_batch=self.batch_size * world_size,
            shard_of_row=self.pool.shard_of_row,
            window_shards=self.window_shards,
        )
        loader = PairLoader(
            order=order,
            dataset=self.dataset,
            counts=LoadCounts(
                owner=self.counts.owner, max_bad_fraction=self.counts.max_bad_fraction
            ),
            form=self.form,
            options=self.options,
            rank=rank,
            world_size=world_size,
            pin_memory=pin_memory,
        )
        if rank == 0:
            self.copies_fraction = warn_of_copies(order, first_step=0, steps=len(loader))
        return loader

    def train_dataloader(self) -> PairLoader:
        """Make the loader of this rank. Its state is part of Lightning's checkpoints.

        Raises:
            InputError: the trainer is to train on the same few batches again and again.
        """
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("this is called by a Trainer; without one, use loader()")
        if trainer.overfit_batches:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            raise InputError(
                "SelectedPairs gives other batches in each epoch, so that overfit_batches has no "
                "meaning. Train on few samples instead: SelectedPairs(pool, range(64), ...)."
            )
        loader = self.loader(
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        # What Lightning counts as done, a checkpoint has exactly: also one that is written while a
        # batch is under way, which is then trained on again.
        loader.find_progress = lambda: _progress_of(trainer)
        self.counts = loader.counts
        return loader

    def teardown(self, stage: str) -> None:
        """Say what was replaced."""
        if stage == "fit":
            self.counts.say_at_end()


def _progress_of(trainer: Trainer) -> Progress:
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress  # whose types say too little
    return Progress(batches=batches.total.processed, of_epoch=batches.current.processed)


def _rows_and_weights(
    pool: Pool, selection: Selected | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the selected rows, int64 [n], sorted, and float32 weights by the pool's rows."""
    if selection is None:
        return np.arange(len(pool)), None
    if isinstance(selection, SelectedSamples):
        selection = selection.selection
    if isinstance(selection, Selection):
        rows, coverage = expand_rows(selection, pool)
        if coverage.present < coverage.named:
            log.warning("the pool %s has %s of the selection", pool.root, coverage)
        return rows, row_weights(selection, pool)
    rows = np.sort(np.asarray(selection))
    if (
        rows.ndim != 1
        or len(rows) == 0
        or rows.dtype.kind not in "iu"
        or rows[0] < 0
        or rows[-1] >= len(pool)
    ):
        raise ParameterError(
            f"must be a Selection, or rows of the pool: integers from 0 to {len(pool) - 1}",
            owner="SelectedPairs",
            parameter="selection",
            value=selection,
        )
    return rows.astype(np.int64), None
