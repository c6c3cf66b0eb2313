"""A selector's node, which stays open: what a selector takes is up to its class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from siftclip.errors import ParameterError, require_fraction
from siftclip.trainer.settings.fields.rules import Fault, Unset, joined
from siftclip.trainer.settings.fields.section import Recorded

if TYPE_CHECKING:
    from siftclip.selectors.core.base import Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectorNode(Recorded):
    """A selector: its name, and the `_target_` and parameters that build it."""

    place: str  # "selector", or "online.selector"
    name: str
    parameters: Mapping[str, Any]
    written: Mapping[str, Any]  # the node in the configuration, where `features.name` is the pool's
    built: Selector | None = None  # the selector itself, where it was made in Python

    @classmethod
    def of(
        cls, place: str, written: Mapping[str, Any], parameters: Mapping[str, Any] | None = None
    ) -> SelectorNode:
        """Build a node from plain values.

        Args:
            place: where it stands.
            written: the values, with the name.
            parameters: the same as the selector shall get them, where they differ.
        """
        rest = {**(written if parameters is None else parameters)}
        name = rest.pop("name", None)
        return cls(place=place, name=str(name), parameters=rest, written=written)

    def record(self) -> dict[str, Any]:
        return {**self.written}

    @property
    def fraction(self) -> Any:
        """How much the selector shall keep, if it says so itself."""
        return self.parameters.get("fraction")

    def with_parameters(self, **changes: Any) -> SelectorNode:
        """Return the node with other parameters; what is recorded stays."""
        return replace(self, parameters={**self.parameters, **changes})

    def faults(self, option: str) -> Iterator[Fault | str]:
        """Yield what the node lacks, and the shares that no selector of ours could keep.

        Other parameters are checked by their classes, when all that is needed is there.
        """
        unset = [*_unset(self.written, option)]
        missing = sorted(name for name, value in unset if value.reason is None)
        if missing:
            needs = " ".join(f"{name}=..." for name in missing)
            yield f"The selector needs {needs}; see configs/selector for what they are."
        for name, value in unset:
            if value.reason is not None:
                yield Fault(name, value.reason)
        for name, fraction in _fractions(self.written, option):
            try:
                require_fraction("fraction", fraction)
            except ParameterError as error:
                yield error.told_as(name)


def _unset(value: Any, option: str) -> Iterator[tuple[str, Unset]]:
    if isinstance(value, Unset):
        yield option, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _unset(inner, joined(option, str(name)))


def _fractions(value: Any, option: str) -> Iterator[tuple[str, Any]]:
    """Yield the fractions of our selectors; a rule may draw more often than there are samples."""
    if not isinstance(value, Mapping):
        return
    fraction = value.get("fraction")
    is_ours = str(value.get("_target_", "")).startswith("siftclip.selectors.")
    if is_ours and fraction is not None and not isinstance(fraction, Unset):
        yield joined(option, "fraction"), fraction
    for name, inner in value.items():
        if name != "rule":
            yield from _fractions(inner, joined(option, str(name)))
