"""Which language a caption is written in, and what its words mean: optional packages and files."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from siftclip.errors import InputError, ParameterError
from siftclip.reading import read_bytes

_CACHED_WORDS = 1 << 20


class LanguageIdentifier(Protocol):
    """Tells the languages of captions. Its public attributes are its parameters."""

    def __call__(self, captions: Sequence[str]) -> list[str | None]:
        """Return a language code for each caption, such as "en"; None where it is unknown."""


class Lexicon(Protocol):
    """Tells the meanings of words. Its public attributes are its parameters."""

    def __call__(self, word: str) -> int | None:
        """Return the WordNet offset of the first synset of a word, None if it has none."""


class _Loaded:
    """Holds something that is loaded at the first use, and left out when pickled."""

    def __init__(self) -> None:
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def model(self) -> Any:
        """Return the model, which is loaded at the first call."""
        if self._model is None:
            self._model = self.load()
        return self._model

    def load(self) -> Any:
        """Load the model."""
        raise NotImplementedError


class FastText(_Loaded):
    """fastText's language identification, with which DataComp filters: the model `lid.176`.

    Captions are judged many at a time, which fasttext-wheel 0.9.2 can with numpy 2. The packages
    named after numpy 2 train on memory that they have not set, so they are not recommended.
    """

    def __init__(self, *, path: str) -> None:
        """Name the model: https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.bin."""
        super().__init__()
        self.path = path

    def load(self) -> Any:
        if not Path(self.path).is_file():
            raise ParameterError(
                "must be an existing file",
                owner=self,
                parameter="path",
                value=self.path,
                way_out="Download lid.176.bin from "
                "https://fasttext.cc/docs/en/language-identification.html.",
            )
        fasttext = _import("fasttext", "fasttext-wheel")
        try:
            return fasttext.load_model(self.path)
        except ValueError as error:
            raise ParameterError(
                f"cannot be read: {error}", owner=self, parameter="path", value=self.path
            ) from error

    def __call__(self, captions: Sequence[str]) -> list[str | None]:
        labels, _ = self.model().predict([one_line(text) for text in captions], k=1)
        return [best[0].removeprefix("__label__") if best else None for best in labels]


class Gcld3(_Loaded):
    """Google's Compact Language Detector 3, which the LAION-2B rule of DataComp uses."""

    def load(self) -> Any:
        gcld3 = _import("gcld3", "cld3-py")
        return gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)

    def __call__(self, captions: Sequence[str]) -> list[str | None]:
        find = self.model().FindLanguage
        return [find(text=one_line(text)).language for text in captions]


class WordNet(_Loaded):
    """WordNet as NLTK reads it, with its rules for the base forms of words."""

    def load(self) -> Any:
        wordnet = _import("nltk", "nltk").corpus.wordnet
        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise InputError(
                "WordNet: NLTK's corpus is not on this machine. Download it with: "
                "python -m nltk.downloader wordnet"
            ) from error

        @lru_cache(_CACHED_WORDS)
        def first_synset(word: str) -> int | None:
            synsets = wordnet.synsets(word)
            return synsets[0].offset() if synsets else None

        return first_synset

    def __call__(self, word: str) -> int | None:
        offset: int | None = self.model()(word)
        return offset


def one_line(text: str) -> str:
    """Prepare a text for language models: without line feeds, and without broken characters."""
    return text.replace("\n", " ").encode("utf-8", "replace").decode("utf-8")


def is_language(
    captions: Sequence[str], identifier: LanguageIdentifier, language: str
) -> np.ndarray:
    """Find the captions that are written in a language: bool [n]."""
    return np.array([code == language for code in identifier(captions)], dtype=bool)


def read_list(path: str, *, owner: object, parameter: str) -> tuple[str, str]:
    """Return the text of a file that the user wrote, and a digest that tells when it has changed.

    A path alone would let a killed run continue with what it had worked out for another text.

    Args:
        path: of the file.
        owner, parameter: where the path comes from, as in `ParameterError`.
    """
    try:
        data = read_bytes(path)
        return data.decode("utf-8"), hashlib.blake2b(data, digest_size=8).hexdigest()
    except (InputError, UnicodeDecodeError) as error:
        raise ParameterError(
            f"cannot be read: {error}", owner=owner, parameter=parameter, value=path
        ) from error


def parse_offsets(path: str, text: str) -> frozenset[int]:
    """Return the WordNet offsets of a list of synsets such as n02084071, one per line.

    The released code of DataComp drops the letter, the part of speech; so does this.
    """
    lines = text.split()
    wrong = [line for line in lines if not (line[1:].isascii() and line[1:].isdigit())]
    if wrong or not lines:
        raise InputError(
            f"{path} must have one WordNet synset a line, such as n02084071. "
            f"Got {wrong[0][:40] if wrong else 'an empty file'!r}."
        )
    return frozenset(int(line[1:]) for line in lines)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"The Python module {module} is not installed. Install it with: pip install {package}"
        ) from error
