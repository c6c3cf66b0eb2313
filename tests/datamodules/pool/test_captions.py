"""Captions that would keep a tokenizer busy are bad samples, and known by their size unread."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest

from siftclip.datamodules.pool.pool import MAX_CAPTION_BYTES, Pool
from siftclip.datamodules.pool.reader import (
    MAX_WORD_LETTERS,
    BadSampleError,
    SampleReader,
    decode_caption,
)
from siftclip.errors import InputError
from siftclip.trainer.settings.pool import PoolSettings

LONG = "with a caption of more than max_caption_bytes"


def letters(count: int) -> str:
    return "".join(random.Random(count).choices(string.ascii_lowercase, k=count))


def repeated(text: str, size: int) -> str:
    return text * (size // len(text.encode()))


CAPTIONS: dict[str, Callable[[int], str]] = {
    "one letter": lambda size: "x" * size,
    "letters": letters,
    "letters with accents": lambda size: repeated(letters(100) + "\u00e9", size),
    "combining accents": lambda size: repeated("a\u0301", size),
    "accents alone": lambda size: "a" + repeated("\u0301\u0302", size - 1),
    "words": lambda size: repeated("ab ", size),
    "long words": lambda size: repeated(letters(MAX_WORD_LETTERS) + " ", size),
    "Chinese": lambda size: repeated("\u4e00\u9fa5\u5b57", size),
    "Cyrillic": lambda size: repeated("\u0430\u0431\u0432\u0436", size),
    "digits": lambda size: "7" * size,
    "signs": lambda size: repeated("!?#", size),
    "entities": lambda size: repeated("&amp;", size),
    "emoji": lambda size: repeated("\U0001f468\u200d", size),
    "white space": lambda size: "a" + " " * (size - 2) + "b",
}


@pytest.mark.parametrize("size", [MAX_CAPTION_BYTES, 1_000_000, 10_000_000])
@pytest.mark.parametrize("kind", CAPTIONS)
def test_no_caption_keeps_a_tokenizer_busy(kind: str, size: int) -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = CAPTIONS[kind](size).encode()
    start = time.process_time()
    try:
        tokenizer([decode_caption(data)])
    except BadSampleError as error:
        assert size > MAX_CAPTION_BYTES or "a word of more than 250 letters" in str(error)  # noqa: PT017
    else:
        assert size <= MAX_CAPTION_BYTES
    assert time.process_time() - start < 2


def test_what_is_refused() -> None:
    assert decode_caption(b"ab " * 5000) == ("ab " * 5000).strip()
    assert decode_caption(b"12345", 5) == "12345"
    with pytest.raises(BadSampleError, match=LONG):
        decode_caption(b"123456", 5)
    with pytest.raises(BadSampleError, match=LONG):
        decode_caption(b"\xff" * (MAX_CAPTION_BYTES + 1))  # not decoded
    word = letters(MAX_WORD_LETTERS)
    assert decode_caption(f"a {word}, {word}1{word}".encode())
    with pytest.raises(BadSampleError, match="with a word of more than 250 letters in the caption"):
        decode_caption(f"a {word}x".encode())
    assert decode_caption("\u6587\u5b57".encode() * 1000)  # scripts without spaces cost little


def test_the_default_stands_once() -> None:
    settings = PoolSettings(root="here")
    assert settings.max_caption_bytes == MAX_CAPTION_BYTES


@pytest.fixture
def long_root(make_samples: Any, write_pool: Any) -> Path:
    """Ten samples; the fourth has a caption of 300 bytes, the sixth one of a megabyte."""
    samples = make_samples(10)
    samples[3].caption, samples[5].caption = b"ab " * 100, b"ab " * 333_333
    root: Path = write_pool(samples, shards=1)
    return root


def test_a_caption_is_refused_by_its_size_and_not_read(long_root: Path, tmp_path: Path) -> None:
    pool = Pool(long_root, cache_dir=tmp_path / "cache", progress=False)
    reader = SampleReader(pool=pool, max_image_pixels=10_000)
    samples = dict(reader.read(np.arange(10)))
    assert [row for row, sample in samples.items() if isinstance(sample, BadSampleError)] == [5]
    assert str(samples[5]) == LONG
    assert str(reader.read_captions(np.array([5]))[0]) == LONG
    with pytest.raises(BadSampleError, match=LONG):
        reader.read_caption(5)
    strict = Pool(long_root, cache_dir=tmp_path / "cache", max_caption_bytes=200, progress=False)
    read = SampleReader(pool=strict, max_image_pixels=10_000).read_captions(np.arange(10))
    bad = [row for row, part in enumerate(read) if isinstance(part, BadSampleError)]
    assert bad == [3, 5]


def test_the_bound_counts_where_a_caption_exceeds_it(long_root: Path, tmp_path: Path) -> None:
    def identity(bound: int) -> dict[str, int]:
        pool = Pool(
            long_root, cache_dir=tmp_path / "cache", max_caption_bytes=bound, progress=False
        )
        return pool.caption_identity

    assert identity(2_000_000) == {}
    assert identity(1000) == {"max_caption_bytes": 1000}
    assert identity(100) != identity(1000)


def test_a_bound_of_nothing_is_refused(long_root: Path) -> None:
    with pytest.raises(InputError, match=r"max_caption_bytes must be an integer of at least 1"):
        Pool(long_root, max_caption_bytes=0)


def test_batches_count_long_captions(
    long_root: Path, load_pool: Any, stream: Callable[..., Any]
) -> None:
    pool = load_pool(long_root)
    batches = stream(pool, np.arange(10), substitutes=np.arange(3))
    causes = {cause for batch in batches for cause, _ in batch.faults}
    assert causes == {LONG}
    assert all(batch.valid.all() and 5 not in batch.rows for batch in batches)
