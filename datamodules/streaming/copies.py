"""Keeps copies of a sample out of each other's batch: they would be each other's negatives.

A pass is cut into draws, the samples that a step takes. Where a draw holds a sample twice, one of
the two changes places with a sample of another draw; everything else stays where it was.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

_NONE = np.empty(0, dtype=np.int64)
_HELD_SAMPLES = 2_000_000  # of which is counted which draw holds them, at a time: 200 MB


def count_copies(rows: np.ndarray) -> int:
    """Count those of the samples, int64 [n], that are there already."""
    return len(rows) - len(np.unique(rows))


class CutPass:
    """One pass over a selection, cut into draws, whose samples change places.

    The first draw may hold samples of the pass before, which stay, and the last one continues
    in the pass behind.
    """

    def __init__(self, rows: np.ndarray, cuts: np.ndarray, *, before: np.ndarray) -> None:
        """Take a pass.

        Args:
            rows: int64 [n], in their order; changed in place.
            cuts: int64, ascending: where draws begin, without the pass's own beginning and end.
            before: int64, what the first draw holds of the pass before.
        """
        self.rows, self.before = rows, before
        self.edges = np.concatenate([[0], cuts, [len(rows)]])
        self.draws = len(cuts) + 1
        self._held: dict[int, Counter[int]] = {}
        self._most_held = max(8, _HELD_SAMPLES // int(np.diff(self.edges).max()))
        self._everywhere: set[int] = set()  # samples that no partner lacks

    def separate(self, *, repeats: bool, partners: range, chains: bool) -> None:
        """Let samples change places until no draw holds one twice, as far as that is possible.

        Each exchange leaves one copy less. Single exchanges are enough where `partners` are as
        large as any draw and at least as many as the copies of any sample: one of them then lacks
        the sample, and holds another that this draw lacks. The nearest is asked first, so that a
        pass reads its tars in nearly the same order.

        Args:
            repeats: whether the pass itself holds samples several times.
            partners: the draws that may take a copy.
            chains: whether to look for longer chains of exchanges where single ones are not
                enough. They are the augmenting paths of a flow of samples to draws, so that this
                finds a way if there is one.
        """
        for draw, places in self._conflicts(repeats):
            again = deque(places)
            seen: Counter[int] = Counter()  # places of a partner that have nothing to give
            while again:
                place = again.popleft()
                if self._holds(draw)[int(self.rows[place])] < 2:
                    continue
                if self._exchange(draw, place, partners, seen) or (
                    chains and self._exchange_in_turn(draw, place, partners)
                ):
                    again.append(place)  # what came may be a copy here, which it was there, too

    def _conflicts(self, repeats: bool) -> Iterator[tuple[int, list[int]]]:
        """Yield draws with the places of what they hold already."""
        start = self.rows[: self.edges[1]]
        places = np.flatnonzero(np.isin(start, self.before)) if len(self.before) else _NONE
        if repeats:
            order = np.argsort(self.rows, kind="stable")
            draws = self._draw_of(order)
            same = (np.diff(self.rows[order]) == 0) & (np.diff(draws) == 0)
            places = np.union1d(places, order[1:][same])
        draws = self._draw_of(places)
        for draw in np.unique(draws).tolist():
            yield draw, places[draws == draw].tolist()

    def _draw_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.edges, places, side="right") - 1

    def _places(self, draw: int) -> range:
        return range(int(self.edges[draw]), int(self.edges[draw + 1]))

    def _holds(self, draw: int) -> Counter[int]:
        if draw not in self._held:
            if len(self._held) >= self._most_held:  # what is left of them is counted again
                del self._held[next(iter(self._held))]
            places = self._places(draw)
            held = Counter(self.rows[places.start : places.stop].tolist())
            if draw == 0:
                held.update(self.before.tolist())
            self._held[draw] = held
        return self._held[draw]

    def _nearest(self, draw: int, partners: range) -> Iterator[int]:
        for distance in range(1, self.draws):
            for other in (draw + distance, draw - distance):
                if other in partners:
                    yield other

    def _exchange(self, draw: int, place: int, partners: range, seen: Counter[int]) -> bool:
        """Exchange a copy for a sample of another draw."""
        row, everywhere = int(self.rows[place]), True
        if row in self._everywhere:
            return False
        for other in self._nearest(draw, partners):
            if self._holds(other)[row]:
                continue
            everywhere = False
            for candidate in self._places(other)[seen[other] :]:
                if self._may_come(draw, other, candidate):
                    self._move([(place, draw), (candidate, other)])
                    return True
                seen[other] += 1
        if everywhere:
            self._everywhere.add(row)
        return False

    def _exchange_in_turn(self, draw: int, place: int, partners: range) -> bool:
        """Exchange along the shortest chain of draws at whose end this one gets what it lacks."""
        came: dict[int, tuple[int, int]] = {}  # how a draw is reached: the draw and place before
        left = list(self._nearest(draw, partners))
        queue = deque([(draw, place)])
        while queue:
            source, leaving = queue.popleft()
            row = int(self.rows[leaving])
            for other in [other for other in left if not self._holds(other)[row]]:
                left.remove(other)
                came[other] = (source, leaving)
                for candidate in self._places(other):
                    if self._may_come(draw, other, candidate):
                        chain = [(candidate, other)]
                        while chain[-1][1] != draw:
                            before, at = came[chain[-1][1]]
                            chain.append((at, before))
                        self._move(chain[::-1])
                        return True
                    queue.append((other, candidate))
        return False

    def _may_come(self, draw: int, other: int, candidate: int) -> bool:
        """Return whether a draw lacks what another gives, or that one gets rid of a copy by it."""
        row = int(self.rows[candidate])
        return not self._holds(draw)[row] or self._holds(other)[row] > 1

    def _move(self, chain: list[tuple[int, int]]) -> None:
        """Pass the sample of each place, with its draw, to the next one, the last to the first."""
        moved = [int(self.rows[place]) for place, _ in chain]
        for (place, draw), old, new in zip(chain, moved, [moved[-1], *moved[:-1]], strict=True):
            self._holds(draw).subtract([old])
            self._holds(draw).update([new])
            self.rows[place] = new
