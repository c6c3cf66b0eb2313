"""Bad samples: counted by cause, reported with examples, and bounded. Nothing is lost silently."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from typing_extensions import TypedDict

from siftclip.errors import InputError, require_fraction
from siftclip.records import Count, Text
from siftclip.redaction import printable

EXAMPLES_PER_CAUSE = 3
WAY_OUT = "Repair or remove these samples, or allow more with max_bad_fraction."
_MAX_PLACE = 300  # characters: a tar's header may make a name of megabytes


class FaultState(TypedDict):
    """A log as plain values."""

    counts: dict[Text, Count]
    examples: dict[Text, list[Text]]


@dataclass(slots=True)
class FaultLog:
    """Counts of bad samples by cause, with the first few places of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, place: str, samples: int = 1) -> None:
        """Record `samples` bad samples of one cause; `place` names the file and the key."""
        self.counts[cause] += samples
        place = printable(place)  # names of members are those that strangers gave
        places = self.examples.setdefault(cause, [])
        if len(place) > _MAX_PLACE:
            place = f"{place[:_MAX_PLACE]}..."
        if len(places) < EXAMPLES_PER_CAUSE and place not in places:
            places.append(place)

    def merge(self, other: FaultLog) -> None:
        """Add what another log has counted."""
        for cause, count in other.counts.items():
            self.counts[cause] += count
            for place in other.examples.get(cause, []):
                self.add(cause, place, samples=0)

    @property
    def samples(self) -> int:
        """All bad samples."""
        return sum(self.counts.values())

    def summary(self) -> str:
        """Summarise in one line: causes with counts and examples."""
        return "; ".join(
            f"{count} {cause} (such as {', '.join(self.examples.get(cause, []))})"
            for cause, count in self.counts.most_common()
        )

    def state(self) -> FaultState:
        """Return plain values, for JSON."""
        return FaultState(counts=dict(self.counts), examples=self.examples)

    @classmethod
    def from_state(cls, state: FaultState) -> FaultLog:
        """Invert `state`."""
        return cls(counts=Counter(state["counts"]), examples=dict(state["examples"]))

    def check(
        self,
        *,
        owner: str,
        total: int,
        max_bad_fraction: float,
        way_out: str = WAY_OUT,
    ) -> None:
        """Raise if more than `max_bad_fraction` of `total` samples are bad.

        `max_bad_fraction` may be 0, which allows none. `way_out` ends the message.
        """
        if max_bad_fraction != 0:
            require_fraction("max_bad_fraction", max_bad_fraction)
        if self.samples > max_bad_fraction * total:
            raise InputError(
                f"{owner}: {self.samples} of {total} samples are bad, more than "
                f"max_bad_fraction={max_bad_fraction} allows: {self.summary()}. "
                f"{way_out}"
            )
