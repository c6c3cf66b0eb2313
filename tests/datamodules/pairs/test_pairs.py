"""Selected pairs as plain batches: the stream of Siftclip's own training, in epochs, resumable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from siftclip.datamodules import PairLoader, SelectedPairs, as_dict, make_selection
from siftclip.datamodules.models.load import Tokenizer, Transform
from siftclip.datamodules.pairs.forms import HuggingFaceTokens
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.streaming.batches import Batch
from siftclip.datamodules.streaming.datamodule import StreamDataModule
from siftclip.datamodules.streaming.loader import LoaderOptions
from siftclip.errors import InputError, ParameterError

Make = Callable[..., Any]
BATCH = 4


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]) -> Pool:
    return load_pool(write_pool(make_samples(20), shards=3))


@pytest.fixture
def rows() -> np.ndarray:
    """Nine of the twenty samples, one of them three times: three batches of four make a pass."""
    return np.array([17, 0, 2, 3, 3, 3, 8, 10, 11, 14, 19])


@pytest.fixture
def make_pairs(
    pool: Pool, rows: np.ndarray, transform: Transform, tokenizer: Tokenizer
) -> Callable[..., SelectedPairs]:
    def make(selection: Any = rows, **options: Any) -> SelectedPairs:
        defaults = {
            "batch_size": BATCH,
            "transform": transform,
            "tokenizer": tokenizer,
            "seed": 7,
            "num_workers": 0,
            "form": as_dict,
            "max_bad_fraction": 0.0,
        }
        return SelectedPairs(options.pop("pool", pool), selection, **{**defaults, **options})

    return make


def assert_equal(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def epochs(loader: PairLoader, count: int) -> list[dict[str, Tensor]]:
    return [batch for _ in range(count) for batch in loader]


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_are_those_of_siftclips_own_training(
    make_pairs: Callable[..., SelectedPairs],
    pool: Pool,
    rows: np.ndarray,
    transform: Transform,
    tokenizer: Tokenizer,
    world_size: int,
) -> None:
    for rank in range(world_size):
        own = StreamDataModule(
            pool=pool,
            rows=np.sort(rows),
            transform=transform,
            tokenizer=tokenizer,
            seed=7,
            global_batch_size=BATCH,
            total_steps=9,
            loader=LoaderOptions(num_workers=0),
            max_image_pixels=10_000,
            max_bad_fraction=0.0,
        )
        own.trainer = SimpleNamespace(  # type: ignore[assignment]  # what the module asks of it
            global_rank=rank,
            world_size=world_size,
            global_step=0,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        expected = [
            as_dict(part.finished())
            for step in own.train_dataloader()
            for part in step.micro_batches
        ]
        pairs = make_pairs(batch_size=BATCH // world_size)
        assert_equal(epochs(pairs.loader(rank=rank, world_size=world_size), 3), expected)


def test_images_are_floats_unless_a_loop_finishes_them(
    make_pairs: Callable[..., SelectedPairs],
) -> None:
    floats = next(iter(make_pairs().loader()))["images"]
    assert floats.dtype == torch.float32
    pairs = make_pairs(finished=False)
    pixels = next(iter(pairs.loader()))["images"]
    assert pixels.dtype == torch.uint8
    assert pairs.normalization is not None
    assert torch.equal(pairs.normalization(pixels), floats)
    with pytest.raises(ParameterError, match=r"SelectedPairs: finished needs a transform that"):
        make_pairs(finished=False, transform=lambda image: torch.zeros(3, 4, 4))


def test_an_epoch_holds_each_sample_and_later_ones_another_order(
    make_pairs: Callable[..., SelectedPairs], rows: np.ndarray
) -> None:
    loader = make_pairs().loader()
    assert (len(loader), loader.num_batches, loader.num_samples) == (3, 3, 12)
    assert loader.batch_size == BATCH
    seen = [torch.cat([batch["rows"] for batch in loader]).tolist() for _ in range(2)]
    assert Counter(seen[0][:11]) == Counter(rows.tolist())
    assert Counter(seen[0][11:] + seen[1][:10]) == Counter(rows.tolist())
    assert loader.epoch == 2
    other = make_pairs(seed=8).loader()
    assert torch.cat([batch["rows"] for batch in other]).tolist() != seen[0]


def test_a_tuple_is_what_a_loop_gets_and_uids_name_the_samples(
    make_pairs: Callable[..., SelectedPairs], make_samples: Make, tokenizer: Tokenizer
) -> None:
    pairs = make_pairs()
    (named, *_) = pairs.loader()
    samples = [make_samples(20)[row] for row in named["rows"]]
    assert pairs.uids(named["rows"]) == [sample.uid for sample in samples]
    (plain, *_) = SelectedPairs(
        pairs.pool,
        pairs.rows,
        batch_size=BATCH,
        transform=pairs.dataset.transform,
        tokenizer=tokenizer,
        seed=7,
        num_workers=0,
    ).loader()
    images, tokens = plain
    assert (images.shape, images.dtype) == ((BATCH, 3, 16, 16), torch.float32)
    assert torch.equal(images, named["images"])
    assert torch.equal(tokens, tokenizer([sample.caption.decode() for sample in samples]))


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_state_resumes_at_the_next_batch(
    make_pairs: Callable[..., SelectedPairs], stop: int
) -> None:
    whole = epochs(make_pairs().loader(), 3)
    loader, read = make_pairs().loader(), []
    while len(read) < stop:
        for batch in loader:
            read.append(batch)
            if len(read) == stop:
                state = json.loads(json.dumps(loader.state_dict()))
                break
    resumed = make_pairs().loader()
    resumed.load_state_dict(state)
    assert resumed.epoch == stop // 3
    resumed.set_epoch(stop // 3)  # as loops do before each epoch: no step back
    rest = []
    while len(read) + len(rest) < 9:
        rest += list(resumed)
    assert_equal(read + rest, whole)
    assert resumed.counts.loaded_samples == 9 * BATCH


def test_set_epoch_begins_that_epoch(make_pairs: Callable[..., SelectedPairs]) -> None:
    whole = epochs(make_pairs().loader(), 3)
    loader = make_pairs().loader()
    loader.set_epoch(2)
    assert_equal(list(loader), whole[6:])
    loader.set_epoch(1)
    next(iter(loader))
    assert_equal(list(loader), whole[4:6])  # what was begun continues
    with pytest.raises(ParameterError, match="epoch must be an integer of at least 0"):
        loader.set_epoch(-1)


def test_state_of_another_stream_is_refused(make_pairs: Callable[..., SelectedPairs]) -> None:
    state = make_pairs().loader().state_dict()
    for other in (make_pairs(seed=8), make_pairs(batch_size=2), make_pairs(np.arange(5))):
        with pytest.raises(InputError, match="another selection, seed, global batch or window"):
            other.loader().load_state_dict(state)
    make_pairs(batch_size=2).loader(world_size=2).load_state_dict(state)  # the same global batch


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(make_pairs: Callable[..., SelectedPairs], num_workers: int) -> None:
    expected = epochs(make_pairs().loader(), 2)
    assert_equal(epochs(make_pairs(num_workers=num_workers).loader(), 2), expected)
    options = LoaderOptions(num_workers=num_workers, prefetch_batches=1)
    assert_equal(epochs(make_pairs(num_workers=None, loader_options=options).loader(), 2), expected)


def test_bad_samples_are_replaced_counted_and_bounded(
    make_samples: Make,
    write_pool: Make,
    load_pool: Callable[..., Pool],
    make_pairs: Callable[..., SelectedPairs],
) -> None:
    samples = make_samples(20)
    samples[3].image = b"no image"
    pool = load_pool(write_pool(samples, folder="spoilt"))
    loader = make_pairs(np.arange(20), pool=pool, max_bad_fraction=0.1).loader()
    read = torch.cat([batch["rows"] for batch in loader]).tolist()
    assert len(read) == 20
    assert 3 not in read
    assert loader.counts.faults.counts == {"whose image cannot be decoded": 1}
    assert make_pairs(np.arange(20), pool=pool, max_bad_fraction=0.1).loader().state_dict()[
        "faults"
    ] == {"counts": {}, "examples": {}}
    with pytest.raises(InputError, match=r"1 of .* samples are bad, more than"):
        list(make_pairs(np.arange(20), pool=pool).loader())


def test_selections_arrays_and_all(
    make_pairs: Callable[..., SelectedPairs], pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    uids = np.concatenate([pool.uids[[2, 5]], np.zeros((1, 2), dtype=np.uint64)])
    selection = make_selection(uids, np.array([1, 2, 1]), {})
    assert make_pairs(selection).rows.tolist() == [2, 5, 5]
    assert "of the selection" in caplog.text
    assert make_pairs(None).rows.tolist() == list(range(20))
    assert make_pairs([4, 1]).rows.tolist() == [1, 4]
    for wrong in ([], [20], [-1], [0.5], [[1]]):
        with pytest.raises(ParameterError, match="SelectedPairs: selection must be a Selection"):
            make_pairs(wrong)


def test_weights_reach_the_loop_or_are_refused(
    make_pairs: Callable[..., SelectedPairs], pool: Pool
) -> None:
    weights = np.array([0.5, 2.0], dtype=np.float32)
    selection = make_selection(pool.uids[[2, 5]], np.ones(2, dtype=np.int64), {}, weights=weights)
    (batch, *_) = make_pairs(selection, batch_size=2).loader()
    expected = {2: 0.5, 5: 2.0}
    assert batch["weights"].tolist() == [expected[row] for row in batch["rows"].tolist()]
    with pytest.raises(ParameterError, match=r"form must hand on the weights .*Give as_dict"):
        SelectedPairs(
            pool, selection, batch_size=2, transform=lambda image: image, tokenizer=lambda x: x
        )
    assert make_pairs(replace(selection, weights=None)).rows.tolist() == [2, 5]


def test_images_of_pairs_have_one_size(make_pairs: Callable[..., SelectedPairs]) -> None:
    for finished in (True, False):
        with pytest.raises(
            ParameterError, match=r"resize must be one of pillow, torch\. Got 'gpu'"
        ):
            make_pairs(resize="gpu", finished=finished)


def test_any_form_transform_and_tokenizer(make_pairs: Callable[..., SelectedPairs]) -> None:
    pipeline = v2.Compose(
        [v2.PILToTensor(), v2.RandomResizedCrop((8, 10)), v2.ToDtype(torch.float32, scale=True)]
    )

    def lengths(captions: list[str]) -> Tensor:
        return torch.tensor([[len(caption)] for caption in captions])

    def form(batch: Batch) -> list[Tensor]:
        return [batch.images.mean((1, 2, 3)), batch.tokens]

    pairs = make_pairs(transform=pipeline, tokenizer=lengths, form=form)
    (first, *_) = pairs.loader()
    means, tokens = first
    assert means.shape == (BATCH,)
    assert (means > 0).all()
    assert (means < 1).all()
    assert set(tokens.flatten().tolist()) <= {
        len("caption of sample 1"),
        len("caption of sample 11"),
    }
    assert torch.equal(
        first[0],
        next(iter(make_pairs(transform=pipeline, tokenizer=lengths, form=form).loader()))[0],
    )


def test_a_tokenizer_of_hugging_face(make_pairs: Callable[..., SelectedPairs]) -> None:
    import tokenizers
    import transformers

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "caption", "sample"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    kinds = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, model_max_length=6, **kinds
    )
    pairs = make_pairs(tokenizer=wrapped)
    assert isinstance(pairs.dataset.tokenizer, HuggingFaceTokens)
    (batch, *_) = pairs.loader()
    assert batch["tokens"].tolist() == [[2, 1, 3, 1, 0, 0]] * BATCH
    endless = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **kinds)
    with pytest.raises(ParameterError, match="tokenizer must say how long captions may be"):
        make_pairs(tokenizer=endless)


def test_wrong_arguments_are_refused(make_pairs: Callable[..., SelectedPairs]) -> None:
    with pytest.raises(ParameterError, match="SelectedPairs: batch_size must be an integer"):
        make_pairs(batch_size=0)
    with pytest.raises(ParameterError, match=r"tokenizer must make an int64 tensor .*Got list"):
        make_pairs(tokenizer=lambda captions: captions)
    with pytest.raises(ParameterError, match="num_workers must not be given beside loader_options"):
        make_pairs(loader_options=LoaderOptions(num_workers=1))
    with pytest.raises(ParameterError, match="num_workers must be an integer of at least 0"):
        make_pairs(num_workers=-1)
    with pytest.raises(ParameterError, match="seed must be an integer of at least 0"):
        make_pairs(seed=-1)
    with pytest.raises(ParameterError, match="max_bad_fraction must be a number in the range"):
        make_pairs(max_bad_fraction=2)
    for wrong in (lambda image: image, v2.PILToTensor(), lambda image: torch.rand(4, 4)):
        with pytest.raises(ParameterError, match=r"transform must make a float tensor \[3, h, w\]"):
            make_pairs(transform=wrong)
    with pytest.raises(ParameterError, match=r"rank must be below world_size=2\. Got 2"):
        make_pairs().loader(rank=2, world_size=2)
    with pytest.raises(RuntimeError, match=r"without one, use loader\(\)"):
        make_pairs().train_dataloader()
