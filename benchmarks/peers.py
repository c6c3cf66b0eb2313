"""What a user would take instead of siftclip to train on a selection, as functions to be timed.

* `webdataset_pairs` with uids: webdataset over the whole pool, which drops what is not selected;
* `reshard`, then `webdataset_pairs`: the selection written to tars of its own, as DataComp does;
* `open_clip_pipeline`: open_clip's own data code over such tars.

The first two need nothing but webdataset; their shuffle is open_clip's (shards in random order, a
buffer of 5000 samples that starts at 1000) and they leave it to the caller to hold the time. Run as
a script, each is tried on a few shards of a pool:

    python benchmarks/peers.py POOL --shards 2

open_clip 3.3 does not run on webdataset 1.0 (see `open_clip_pipeline`). To have it take part:

    pip install --target OLD --no-deps webdataset==0.2.86
    PYTHONPATH=OLD python benchmarks/peers.py POOL
"""

import argparse
import inspect
import io
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import webdataset as wds
from PIL import Image

SHUFFLE_SAMPLES = 5000  # open_clip_train.data._SAMPLE_SHUFFLE_SIZE and ..._INITIAL
SHUFFLE_INITIAL_SAMPLES = 1000

Decode = Callable[[bytes], Any]
Tokenize = Callable[[str], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resharded:
    """What `reshard` wrote."""

    shards: tuple[Path, ...]
    samples: int
    bytes_written: int
    seconds: float


def image_decode(transform: Callable[[Image.Image], torch.Tensor]) -> Decode:
    """JPEG to tensor as in open_clip's pipeline (decode "pilrgb", then `transform`); picklable."""
    return partial(_decode_image, transform)


def _decode_image(transform: Callable[[Image.Image], torch.Tensor], data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return transform(image.convert("RGB"))


def _is_selected(uids: set[str] | frozenset[str], sample: dict[str, Any]) -> bool:
    return json.loads(sample["json"])["uid"] in uids


def _pair(decode: Decode | None, tokenize: Tokenize | None, sample: dict[str, Any]) -> tuple:
    image, caption = sample["jpg"], sample["txt"].decode()
    return (
        image if decode is None else decode(image),
        caption if tokenize is None else tokenize(caption)[0],
    )


def _collate(samples: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Two columns: tensors are stacked, bytes and captions become lists."""
    columns = (list(column) for column in zip(*samples, strict=True))
    return [torch.stack(c) if isinstance(c[0], torch.Tensor) else c for c in columns]


def webdataset_pairs(
    shards: Iterable[str | Path],
    *,
    uids: set[str] | frozenset[str] | None = None,
    decode: Decode | None = None,
    tokenize: Tokenize | None = None,
    batch_size: int | None = None,
    shuffle_samples: int = SHUFFLE_SAMPLES,
    seed: int = 0,
    epoch: int = 0,
    partial_batches: bool = False,
) -> wds.DataPipeline:
    """One pass over the samples of the shards, as pairs or, with `batch_size`, as batches.

    An `IterableDataset` to iterate or to hand to `loader`. Each worker reads whole shards and so
    needs at least one; a batch never joins samples of two workers. The order of the shards follows
    from seed and epoch (0 samples in the shuffle buffer: sorted), that of the samples does not.

    Args:
        shards: Tars.
        uids: The selection; None takes all samples. Worker processes that are not forked get a
            pickled copy each.
        decode: Of the image's bytes; None leaves them as they are. See `image_decode`.
        tokenize: Gives tokens of shape (1, T) for a caption; None leaves the caption.
        partial_batches: Whether the last batch of a worker may be smaller; if not, it is dropped.
    """
    order = sorted(str(shard) for shard in shards)
    if shuffle_samples:
        random.Random(f"{seed} {epoch}").shuffle(order)
    stages: list[Any] = [
        wds.SimpleShardList(order),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(),
    ]
    if uids is not None:  # before the buffer, so that it holds selected samples only
        stages.append(wds.select(partial(_is_selected, frozenset(uids))))
    if shuffle_samples:
        initial = min(SHUFFLE_INITIAL_SAMPLES, shuffle_samples)
        stages.append(wds.shuffle(shuffle_samples, initial=initial))
    stages.append(wds.map(partial(_pair, decode, tokenize)))
    if batch_size is not None:
        stages.append(wds.batched(batch_size, collation_fn=_collate, partial=partial_batches))
    return wds.DataPipeline(*stages)


def loader(dataset: wds.DataPipeline, workers: int, **options: Any) -> wds.WebLoader:
    """A loader of a dataset that makes its own batches; `options` are those of `DataLoader`."""
    return wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=workers, **options)


def _reshard_part(
    shards: Sequence[str], part: int, *, uids: frozenset[str], folder: Path, shard_samples: int
) -> tuple[list[Path], int]:
    paths: list[Path] = []
    samples = 0
    source = wds.DataPipeline(
        wds.SimpleShardList(list(shards)),
        wds.tarfile_to_samples(),
    )
    with ExitStack() as open_writers:
        for sample in source:
            uid = json.loads(sample["json"])["uid"]
            if uid not in uids:
                continue
            if samples % shard_samples == 0:
                open_writers.close()
                paths.append(folder / f"{part:03d}{len(paths):05d}.tar")
                # the encoder would only look at what is bytes already
                writer = wds.TarWriter(str(paths[-1]), encoder=False)
                open_writers.enter_context(writer)
            files = {k: sample[k] for k in ("jpg", "txt", "json")}
            writer.write({"__key__": f"{uid}-0", **files})
            samples += 1
    return paths, samples


def reshard(
    shards: Iterable[str | Path],
    uids: set[str] | frozenset[str],
    folder: Path,
    shard_samples: int = 10_000,
    workers: int = 1,
) -> Resharded:
    """Write the selection to new tars, in the order of the pool, as DataComp's resharder does.

    Every byte of the pool is read and every json parsed. Each worker takes a contiguous range of
    shards and leaves one short tar at its end. Nothing is synced to the disk. `folder` has to be
    empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"reshard needs an empty folder, {folder} is not")
    begin = time.perf_counter()
    order = sorted(str(shard) for shard in shards)
    workers = min(workers, len(order))
    parts = [
        order[len(order) * i // workers : len(order) * (i + 1) // workers] for i in range(workers)
    ]
    write = partial(_reshard_part, uids=frozenset(uids), folder=folder, shard_samples=shard_samples)
    jobs = [(part, number) for number, part in enumerate(parts)]
    if workers == 1:
        results = [write(*jobs[0])]
    else:
        with multiprocessing.Pool(workers) as pool:
            results = pool.starmap(write, jobs)
    paths = tuple(path for part_paths, _ in results for path in part_paths)
    return Resharded(
        shards=paths,
        samples=sum(samples for _, samples in results),
        bytes_written=sum(path.stat().st_size for path in paths),
        seconds=time.perf_counter() - begin,
    )


def open_clip_pipeline(
    shards: Iterable[str | Path],
    *,
    transform: Callable[[Image.Image], torch.Tensor],
    tokenizer: Tokenize,
    batch_size: int,
    samples: int,
    workers: int = 0,
    resampled: bool = False,
    seed: int = 0,
    epoch: int = 0,
) -> wds.WebLoader:
    """The training loader of `open_clip_train.data.get_wds_dataset` over all samples of the shards.

    One pass is `samples` rounded up to whole batches for each worker, whatever the shards hold: it
    begins anew or stops short to give that number. `loader.num_samples` has the rounded number.
    Workers have to be forked, because the pipeline holds a lambda.

    Raises:
        RuntimeError: Where open_clip cannot read with the installed webdataset. That of 1.0 ends
            each tar with a marker `{}`, in which open_clip 3.3 looks for "fname" (KeyError at the
            end of a worker's first tar). webdataset 0.2.86 runs, and so does 1.0.2 once the caller
            sets `open_clip_train.data.tar_file_expander` to a partial with `eof_value=None`.
    """
    from open_clip_train import data  # asks for packages that nothing else here does

    _check_end_of_tar(data)
    paths = sorted(str(shard) for shard in shards)
    args = SimpleNamespace(
        train_data="::".join(paths),  # a list is what its expand_urls cannot split
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=resampled,
        batch_size=batch_size,
        workers=workers,
        world_size=1,
        seed=seed,
    )
    if not resampled and len(paths) < workers:
        raise ValueError(f"open_clip needs a shard for each worker, got {len(paths)} for {workers}")
    info = data.get_wds_dataset(args, transform, is_train=True, epoch=epoch, tokenizer=tokenizer)
    return info.dataloader


def _check_end_of_tar(data: Any) -> None:
    """Raise where the marker that this webdataset sends at the end of a tar is not understood."""
    marker = inspect.signature(data.tar_file_expander).parameters.get("eof_value")
    if marker is None or marker.default is None:
        return
    try:
        list(data.group_by_keys_nothrow(iter([marker.default])))
    except KeyError as error:
        raise RuntimeError(
            f"open_clip's data code fails on webdataset {wds.__version__} at the end of a tar "
            f"(KeyError {error}); put webdataset 0.2.86 first on PYTHONPATH to run it"
        ) from error


# ---- the smoke run ---------------------------------------------------------------------------


def _read_uids(shards: Sequence[Path], fraction: float) -> frozenset[str]:
    source = wds.DataPipeline(
        wds.SimpleShardList([str(s) for s in shards]),
        wds.tarfile_to_samples(),
    )
    uids = (json.loads(sample["json"])["uid"] for sample in source)
    return frozenset(uid for uid in uids if int(uid[:8], 16) < fraction * 2**32)


def _report(name: str, batches: Iterable[Any], limit_batches: int | None = None) -> None:
    begin = time.perf_counter()
    samples = sum(len(batch[1]) for batch in islice(batches, limit_batches))
    seconds = time.perf_counter() - begin
    print(f"{name:<48} {samples:>6} samples {seconds:6.2f} s {samples / seconds:>8.0f} samples/s")


def main() -> None:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pool", type=Path, help="a folder that make_pool.py wrote")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shards = sorted((args.pool / "shards").glob("*.tar"))[: args.shards]
    uids = _read_uids(shards, args.fraction)
    transform = image_transform_v2(PreprocessCfg(size=224), is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    raw: dict[str, Any] = {"batch_size": args.batch_size, "partial_batches": True}
    full = raw | {"decode": image_decode(transform), "tokenize": tokenizer}
    print(f"webdataset {wds.__version__}, {len(shards)} shards, {len(uids)} samples selected")

    _report("webdataset, filtered, bytes", webdataset_pairs(shards, uids=uids, **raw))
    filtered = webdataset_pairs(shards, uids=uids, **full)
    _report("webdataset, filtered, decoded", filtered)
    _report(f"... {args.workers} workers", loader(filtered, args.workers))
    with TemporaryDirectory() as folder:
        new = reshard(shards, uids, Path(folder) / "new", shard_samples=1000)
        print(
            f"{'reshard':<48} {new.samples:>6} samples {new.seconds:6.2f} s "
            f"{new.samples / new.seconds:>8.0f} samples/s, {new.bytes_written / 1e6:.0f} MB written"
        )
        _report("webdataset, resharded, bytes", webdataset_pairs(new.shards, **raw))
        plain = webdataset_pairs(new.shards, **full)
        _report("webdataset, resharded, decoded", plain)
        _report(f"... {args.workers} workers", loader(plain, args.workers))
        for workers in (0, args.workers):
            try:
                batches = open_clip_pipeline(
                    new.shards,
                    transform=transform,
                    tokenizer=tokenizer,
                    batch_size=args.batch_size,
                    samples=new.samples,
                    workers=workers,
                )
            except RuntimeError as error:
                print(f"open_clip: {error}")
                break
            _report(f"open_clip, resharded, decoded, {workers} workers", batches)


if __name__ == "__main__":
    main()
