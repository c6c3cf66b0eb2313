"""DataComp's filters on captions, sizes and metadata, and the packages that they need."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.compose import Then
from siftclip.selectors.core.description import describe
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, DictCache
from siftclip.selectors.methods.captions.datacomp_filters import (
    BasicFilter,
    CaptionFilter,
    HasEntity,
    IsLanguage,
)
from siftclip.selectors.methods.captions.languages import (
    FastText,
    Gcld3,
    WordNet,
    one_line,
    parse_offsets,
    read_list,
)
from siftclip.selectors.methods.external import External


class FirstLetter:
    """Tells the language of captions by their first letter."""

    def __call__(self, captions: Sequence[str]) -> list[str | None]:
        return ["en" if text[:1] in "rsab" else None for text in captions]


class Length:
    """A lexicon: the meaning of a word is how long it is."""

    def __call__(self, word: str) -> int | None:
        return len(word) if word.isalpha() else None


def make_source(captions: list[str], **arrays: Any) -> MemorySource:
    rows = np.arange(len(captions))
    uids = np.stack([rows, rows], axis=1).astype(np.uint64)
    return MemorySource(Chunk(rows=rows, uids=uids, captions=captions, **arrays))


def kept(selector: Selector, source: MemorySource) -> list[int]:
    return np.flatnonzero(selector.select(source).multiplicities).tolist()


def test_basic_filter_asks_for_all_limits() -> None:
    captions = ["a red bird", "a red bird", "a red bird", "a redbird", "a b c"]
    sizes = np.array([[200, 600], [199, 300], [200, 601], [400, 400], [400, 400]])
    source = make_source(captions, sizes=sizes)
    assert kept(BasicFilter(), source) == [0]
    assert kept(BasicFilter(min_side=199, max_aspect=4), source) == [0, 1, 2]
    assert kept(BasicFilter(min_words=2, min_characters=0), source) == [0, 3, 4]


def test_then_asks_for_the_language_last() -> None:
    source = make_source(["a red bird", "un oiseau rouge", "a b"], sizes=np.full((3, 2), 300))
    basic = Then(stages=[BasicFilter(), IsLanguage(identifier=FirstLetter())])
    assert kept(basic, source) == [0]


def test_caption_filter_counts_tokens() -> None:
    assert kept(CaptionFilter(), make_source(["abcdef", "abc def", "a\n1234", "a b"])) == [1, 2]


def test_laion_rule() -> None:
    source = make_source(
        ["an apple", "an apple", "ein apfel", "ein apfel"], column=np.array([0.28, 0.27, 0.3, 0.1])
    )
    laion = Then(
        stages=[
            External(path=None, column="clip_b32_similarity_score", threshold=0.28),
            IsLanguage(identifier=FirstLetter()),
        ]
    )
    assert kept(laion, source) == [0]


def test_has_entity_reads_its_list(tmp_path: Path) -> None:
    path = tmp_path / "synsets.txt"
    path.write_text("n00000003\nn00000009\n")
    selector = HasEntity(lexicon=Length(), entities=str(path))
    assert kept(selector, make_source(["one apple", "four apples", "12 345", "carefully"])) == [
        0,
        3,
    ]


def test_a_changed_list_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache, source = tmp_path / "a.txt", DictCache(), make_source(["red", "blue"])
    monkeypatch.setattr(source, "cache", lambda selector: cache)
    for synset, rows in (("n3", [0]), ("v4", [1])):
        path.write_text(synset)
        assert kept(HasEntity(lexicon=Length(), entities=str(path)), source) == rows


@pytest.mark.parametrize("text", ["", "n0000000x\n", "n\n", "n1 n²\n"])
def test_a_wrong_list_of_synsets_is_named(text: str) -> None:
    with pytest.raises(InputError, match=r"a.txt must have one WordNet synset"):
        parse_offsets("a.txt", text)


def test_an_unreadable_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"entities cannot be read: .*missing.txt"):
        read_list("missing.txt", owner=None, parameter="entities")
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"entities cannot be read: .*utf-8.*a.txt"):
        read_list(str(path), owner=None, parameter="entities")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BasicFilter(min_words=-1), "min_words must be an integer"),
        (lambda: BasicFilter(min_side=0), "min_side must be an integer of at least 1"),
        (lambda: BasicFilter(max_aspect=0.5), "max_aspect must be at least 1"),
        (lambda: CaptionFilter(min_tokens="2"), "min_tokens must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_wrong_parameters_are_named(make: Callable[[], Selector], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BasicFilter(),
        lambda: CaptionFilter(),
        lambda: IsLanguage(identifier=FirstLetter()),
    ],
)
def test_contract(make: Callable[[], Selector]) -> None:
    check_selector(make)


def test_contract_of_has_entity(tmp_path: Path) -> None:
    path = tmp_path / "synsets.txt"
    path.write_text("n00000004")
    check_selector(lambda: HasEntity(lexicon=Length(), entities=str(path)))


def test_a_list_that_is_missing_by_now_is_named() -> None:
    selector = HasEntity(lexicon=Length(), entities="missing.txt")
    source = make_source(["a"])
    for read in (lambda: selector.fit(source), lambda: selector.tasks(source, 0)):
        with pytest.raises(InputError, match=r"^HasEntity: entities cannot be read: .*missing"):
            read()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tmp_path / "lid.176.bin"
    model.write_bytes(b"")
    for module, call, package in (
        ("fasttext", lambda: FastText(path=str(model))(["a"]), "fasttext-wheel"),
        ("gcld3", lambda: Gcld3()(["a"]), "cld3-py"),
        ("nltk", lambda: WordNet()("a"), "nltk"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=f"{module} is not installed.*pip install {package}"):
            call()


def test_a_missing_model_is_named() -> None:
    with pytest.raises(
        InputError, match=r"^FastText: path must be an existing file. Got 'lid.176.bin'. Download"
    ):
        FastText(path="lid.176.bin")(["a"])


def test_models_are_parameters_by_their_paths_alone() -> None:
    model = FastText(path="lid.176.bin")
    before = describe(model)
    model._model = lambda text: text  # cannot be pickled, as a loaded model
    assert describe(model) == before
    assert "lid.176.bin" in str(before)
    assert pickle.loads(pickle.dumps(model))._model is None  # noqa: S301 - our own bytes


def test_one_line_makes_a_text_fit_for_a_model() -> None:
    assert one_line("a\nb") == "a b"
    one_line("a\udce9b").encode("utf-8")  # a lone surrogate cannot be encoded


def test_fasttext_tells_languages(tmp_path: Path) -> None:
    fasttext = pytest.importorskip("fasttext")
    text = tmp_path / "text.txt"
    text.write_text("__label__en the red house\n__label__de das rote haus\n" * 50)
    trained = fasttext.train_supervised(
        str(text), dim=8, epoch=50, lr=0.2, thread=1, verbose=0, bucket=100
    )
    path = tmp_path / "model.bin"
    trained.save_model(str(path))
    model = FastText(path=str(path))
    assert model(["the\nhouse", "das haus", "red \udce9"]) == ["en", "de", "en"]
    assert kept(IsLanguage(identifier=model), make_source(["rote", "the red", "haus"])) == [1]
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"^FastText: path cannot be read: .*model.bin"):
        FastText(path=str(path))(["a"])


def test_gcld3_gets_the_limits_of_the_released_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    class Identifier:
        def __init__(self, *, min_num_bytes: int, max_num_bytes: int) -> None:
            assert (min_num_bytes, max_num_bytes) == (0, 1000)

        def FindLanguage(self, *, text: str) -> SimpleNamespace:
            assert "\n" not in text
            return SimpleNamespace(language="en" if "the" in text else "und")

    monkeypatch.setitem(sys.modules, "gcld3", SimpleNamespace(NNetLanguageIdentifier=Identifier))
    assert Gcld3()(["the\nhouse", "das haus"]) == ["en", "und"]


def test_cld3_tells_languages() -> None:
    pytest.importorskip("gcld3", reason="needs the extra: pip install siftclip[text]")
    captions = ["a photo of a brown dog\nin the park", "ein Foto von einem braunen Hund im Park"]
    assert Gcld3()(captions) == ["en", "de"]


class FakeWordNet:
    """The two methods of NLTK's reader that are used."""

    def __init__(self, *, installed: bool) -> None:
        self.installed, self.asked = installed, 0

    def ensure_loaded(self) -> None:
        if not self.installed:
            raise LookupError("Resource wordnet not found")

    def synsets(self, word: str) -> list[SimpleNamespace]:
        self.asked += 1
        return [SimpleNamespace(offset=lambda: 5), SimpleNamespace(offset=lambda: 6)][: len(word)]


def test_wordnet_takes_the_first_synset(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FakeWordNet(installed=True)
    corpus = SimpleNamespace(corpus=SimpleNamespace(wordnet=reader))
    monkeypatch.setitem(sys.modules, "nltk", corpus)
    lexicon = WordNet()
    assert [lexicon(word) for word in ("dog", "", "dog")] == [5, None, 5]
    assert reader.asked == 2  # words repeat: their meanings are kept
    reader.installed = False
    with pytest.raises(InputError, match=r"python -m nltk.downloader wordnet"):
        WordNet()("dog")
