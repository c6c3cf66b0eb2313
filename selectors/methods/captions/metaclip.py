"""MetaCLIP: balance a pool over the entries of a metadata list (arXiv 2309.16671, algorithm 1)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

import numpy as np

from siftclip.errors import InputError, require_int, require_int_or_auto
from siftclip.hashing import mix64
from siftclip.ranks import sum_arrays
from siftclip.selectors.core.base import Choice, Requirements, Selector, Source, WorkUnit
from siftclip.selectors.core.noise import noise, noise_state
from siftclip.selectors.core.source import Cache
from siftclip.selectors.methods.captions.datacomp_filters import captions_of
from siftclip.selectors.methods.captions.languages import read_list

_SPACED = str.maketrans({mark: f" {mark} " for mark in ",.;:?!`"} | dict.fromkeys("\t\n\r", " "))


class Matcher:
    """Finds the entries of a list in captions, as MetaCLIP's released code does.

    A caption gets a space around each of the marks , . ; : ? ! ` and at both ends; tabs and line
    breaks become spaces. An entry matches where it stands between two spaces. Letters count as they
    are, and nothing else is changed: an entry with one of these marks inside a word never matches.

    The released code runs an Aho-Corasick automaton over the characters. An entry between spaces is
    a row of whole words, so that here a table is asked for the rows that begin at each word, with
    no more words than an entry that begins with this word has. The matches are the same.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        """Build the tables: `entries` are distinct texts, known by their number afterwards."""
        self._numbers = {entry: number for number, entry in enumerate(entries)}
        lengths: dict[str, set[int]] = {}
        for entry in entries:
            words = entry.split(" ")
            lengths.setdefault(words[0], set()).add(len(words))
        self._lengths = {word: tuple(sorted(of_word)) for word, of_word in lengths.items()}

    def __call__(self, caption: str) -> list[int]:
        """Return the numbers of the entries that match, ascending, each once."""
        # What stands between two spaces; split gives an empty text at either end beside these.
        words = caption.translate(_SPACED).split(" ")
        numbers = set()
        for start, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                if start + length <= len(words):
                    row = word if length == 1 else " ".join(words[start : start + length])
                    number = self._numbers.get(row)
                    if number is not None:
                        numbers.add(number)
        return sorted(numbers)


def match_all(matcher: Matcher, captions: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Find the entries that match each caption.

    Returns:
        their numbers int32 [m], one caption after the other, and how many each has, int32 [n].
    """
    matches = [matcher(caption) for caption in captions]
    numbers = np.fromiter((number for entries in matches for number in entries), dtype=np.int32)
    return numbers, np.array([len(entries) for entries in matches], dtype=np.int32)


def keep_probabilities(counts: np.ndarray, t: int) -> np.ndarray:
    """Return the probability that a match of an entry is drawn, min(1, t / count): float64 [c]."""
    probabilities: np.ndarray = t / np.maximum(counts, t)
    return probabilities


def entry_state(entries: Sequence[str]) -> np.ndarray:
    """Hash the text of each entry to a number: uint64 [c]."""
    digests = (
        hashlib.blake2b(entry.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for entry in entries
    )
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def draw_balanced(
    uids: np.ndarray,
    numbers: np.ndarray,
    lengths: np.ndarray,
    probabilities: np.ndarray,
    states: np.ndarray,
    *,
    seed: int,
) -> np.ndarray:
    """Keep a sample if at least one of its matches is drawn: bool [n].

    Each match is drawn independently with the probability of its entry, as in the released code
    (`balance_sampling`); the noise is a function of (seed, uid, text of the entry).

    Args:
        uids: uint64 [n, 2].
        numbers: int [m], the entries of the samples, one sample after the other.
        lengths: int [n], how many each sample has.
        probabilities: float64 [c], of the entries.
        states: uint64 [c], from `entry_state`.
        seed: any integer of at least 0.
    """
    owners = np.repeat(np.arange(len(uids)), lengths)
    state = mix64(noise_state(uids, seed)[owners] ^ states[numbers])
    drawn = noise(state, 0) < probabilities[numbers]
    return np.bincount(owners[drawn], minlength=len(uids)) > 0


def parse_entries(path: str, text: str) -> list[str]:
    """Parse the distinct entries of a metadata list: a JSON list of texts, or one entry per line.

    Raises:
        InputError: the file at `path`, whose text this is, holds something else.
    """
    try:
        entries = json.loads(text) if path.endswith(".json") else re.split("\r?\n", text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise InputError(f"{path} must be a JSON list of texts.")
    distinct = list(dict.fromkeys(entry for entry in entries if entry.strip()))
    if not distinct:
        raise InputError(f"{path} has no entries.")
    return distinct


_SAMPLES_PER_T = 80_000  # of the pool, as published: t is 20,000 for 1.6 G pairs


class MetaClip(Selector):
    """Keep the captions that match a metadata list, with at most about `t` for each entry.

    The rare entries keep all their samples and the frequent ones are thinned out. Samples that
    match nothing are dropped. Counting and drawing take one pass over the captions: the matches of
    each task are kept, about 16 bytes per sample.
    """

    def __init__(self, *, entries: str, seed: int, t: int | str = "auto") -> None:
        """Set the list and the balance.

        Args:
            entries: a file with the metadata list, `.json` or one entry per line.
            seed: any integer of at least 0.
            t: matches of an entry that are kept on average, at most; at least 1. The paper takes
                20,000 for 400 M pairs (from 1.6 G), and 170,000 for 2.5 G. "auto": an 80,000th of
                the samples, as in the first.
        """
        self.entries = entries
        self.t = require_int_or_auto("t", t, owner=self)
        self.seed = require_int("seed", seed, minimum=0, owner=self)

    @property
    def requires(self) -> Requirements:
        return Requirements(captions=True)

    def select(self, source: Source) -> Choice:
        """Match, count over all ranks, and draw."""
        text, digest = read_list(self.entries, owner=self, parameter="entries")
        entries = parse_entries(self.entries, text)
        cache = source.cache(self)
        mine = source.mine(source.tasks(self.requires, label=f"{digest}-"))
        self._match(source, cache, mine, entries)
        counts = np.zeros(len(entries), dtype=np.int64)
        for task in mine:
            counts += np.bincount(_matches(cache, task)[0], minlength=len(entries))
        counts = sum_arrays(source.ranks, counts)
        scaled = max(1, round(len(source) / _SAMPLES_PER_T))
        t = self.t if isinstance(self.t, int) else scaled
        if t >= counts.max() > 0:
            source.warn(
                f"MetaClip: no entry has more than t={t} matches (the most frequent one has "
                f"{counts.max()}), so that nothing is balanced. Let t be auto ({scaled} here)"
            )
        probabilities = keep_probabilities(counts, t)
        states = entry_state(entries)
        kept = np.zeros(len(source), dtype=np.int64)
        for task in mine:
            numbers, lengths = _matches(cache, task)
            at = source.index_of(task.rows)
            kept[at] = draw_balanced(
                source.uids[at], numbers, lengths, probabilities, states, seed=self.seed
            )
        return Choice(multiplicities=sum_arrays(source.ranks, kept))

    def _match(
        self, source: Source, cache: Cache, tasks: Sequence[WorkUnit], entries: Sequence[str]
    ) -> None:
        """Keep the matches of the tasks that have none yet."""
        todo = [task for task in tasks if cache.get(task.name) is None]
        if not todo:
            return
        matcher = Matcher(entries)
        with source.bar(sum(len(task.rows) for task in todo), type(self).__name__) as bar:
            for task in todo:
                matches = [
                    match_all(matcher, captions_of(chunk))
                    for chunk in source.chunks(task.rows, self.requires)
                ]
                numbers, lengths = (np.concatenate(arrays) for arrays in zip(*matches, strict=True))
                cache.put(task.name, numbers=numbers, lengths=lengths)
                bar.update(len(task.rows))


def _matches(cache: Cache, task: WorkUnit) -> tuple[np.ndarray, np.ndarray]:
    kept = cache.get(task.name)
    if kept is None:
        raise RuntimeError(f"the matches of {task.name} were put, and are gone")
    return kept["numbers"], kept["lengths"]
