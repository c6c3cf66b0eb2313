"""The filters of DataComp that read captions and sizes (arXiv 2304.14108, section 4)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import ParameterError, require_finite, require_int
from siftclip.selectors.core.base import Chunk, Requirements, ScoreSelector, Source, WorkUnit
from siftclip.selectors.methods.captions.caption_rules import (
    captions_with_entities,
    large_images,
    long_captions,
    tokenized_captions,
)
from siftclip.selectors.methods.captions.languages import (
    LanguageIdentifier,
    Lexicon,
    is_language,
    parse_offsets,
    read_list,
)


class Predicate(ScoreSelector):
    """A yes or no about each sample: score 1 or 0, and the yes are kept."""

    def __init__(self) -> None:
        super().__init__(threshold=0.5)

    @property
    def requires(self) -> Requirements:
        return Requirements(captions=True)

    @abstractmethod
    def holds(self, chunk: Chunk) -> np.ndarray:
        """Return which samples of a chunk to keep: bool [n]."""

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(self.holds(chunk).astype(np.float32))


class IsLanguage(Predicate):
    """Keep the captions in one language."""

    def __init__(self, *, identifier: LanguageIdentifier, language: str = "en") -> None:
        """Set how languages are told, and the code of the wanted one."""
        super().__init__()
        self.identifier, self.language = identifier, language

    def holds(self, chunk: Chunk) -> np.ndarray:
        return is_language(captions_of(chunk), self.identifier, self.language)


class BasicFilter(Predicate):
    """DataComp's basic filter without its language test: captions and images of a minimal size.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> captions = ["a red car", "car", "a blue car"]
        >>> sizes = np.array([[640, 480], [640, 480], [99, 99]])
        >>> selector = siftclip.selectors.BasicFilter()
        >>> siftclip.select(captions=captions, sizes=sizes, selector=selector).rows
        array([0])
    """

    def __init__(
        self,
        *,
        min_words: int = 3,
        min_characters: int = 6,
        min_side: int = 200,
        max_aspect: float = 3.0,
    ) -> None:
        """Set the limits; the defaults are DataComp's.

        Args:
            min_words: of a caption, split at white space.
            min_characters: of a caption.
            min_side: of the original image's shorter side, in pixels.
            max_aspect: of its longer side to its shorter one.
        """
        super().__init__()
        self.min_words = require_int("min_words", min_words, minimum=0, owner=self)
        self.min_characters = require_int("min_characters", min_characters, minimum=0, owner=self)
        self.min_side = require_int("min_side", min_side, minimum=1, owner=self)
        self.max_aspect = require_finite("max_aspect", max_aspect, owner=self)
        if self.max_aspect < 1:
            rule = "must be at least 1"
            raise ParameterError(rule, owner=self, parameter="max_aspect", value=max_aspect)

    @property
    def requires(self) -> Requirements:
        return Requirements(captions=True, sizes=True)

    def holds(self, chunk: Chunk) -> np.ndarray:
        if chunk.sizes is None:
            raise ValueError("the chunk lacks the sizes that BasicFilter.requires names")
        long = long_captions(
            captions_of(chunk), min_words=self.min_words, min_characters=self.min_characters
        )
        large = large_images(chunk.sizes, min_side=self.min_side, max_aspect=self.max_aspect)
        passes: np.ndarray = long & large
        return passes


class CaptionFilter(Predicate):
    """The caption test of DataComp's image-based filter, without its language test.

    Example:
        >>> import siftclip
        >>> selector = siftclip.selectors.CaptionFilter(min_tokens=2, min_characters=6)
        >>> captions = ["a red car", "car", "a dog", "two dogs"]
        >>> siftclip.select(captions=captions, selector=selector).rows
        array([0, 3])
    """

    def __init__(self, *, min_tokens: int = 2, min_characters: int = 6) -> None:
        """Set the limits, of fastText's tokens and of characters; the defaults are DataComp's."""
        super().__init__()
        self.min_tokens = require_int("min_tokens", min_tokens, minimum=0, owner=self)
        self.min_characters = require_int("min_characters", min_characters, minimum=0, owner=self)

    def holds(self, chunk: Chunk) -> np.ndarray:
        return tokenized_captions(
            captions_of(chunk), min_tokens=self.min_tokens, min_characters=self.min_characters
        )


class HasEntity(Predicate):
    """Keep the captions that name an entity: DataComp's text-based filter, without its language."""

    def __init__(self, *, lexicon: Lexicon, entities: str) -> None:
        """Set how words are understood, and what is wanted.

        Args:
            lexicon: gives the first synset of a word.
            entities: a file with one WordNet synset a line, such as ImageNet-21k's list.
        """
        super().__init__()
        self.lexicon, self.entities = lexicon, entities
        self._offsets: frozenset[int] = frozenset()

    def tasks(self, source: Source, pass_number: int) -> Sequence[WorkUnit]:
        _, digest = read_list(self.entities, owner=self, parameter="entities")
        return source.tasks(self.requires, label=f"{digest}-")

    def fit(self, source: Source) -> None:
        text, _ = read_list(self.entities, owner=self, parameter="entities")
        self._offsets = parse_offsets(self.entities, text)

    def holds(self, chunk: Chunk) -> np.ndarray:
        return captions_with_entities(captions_of(chunk), self.lexicon, self._offsets)


def captions_of(chunk: Chunk) -> list[str]:
    """Return the captions of a chunk, which were asked for."""
    if chunk.captions is None:
        raise ValueError("the chunk lacks the captions that the selector requires")
    return chunk.captions
