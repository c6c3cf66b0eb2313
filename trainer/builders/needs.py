"""What selectors read, and what of that training alone has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from siftclip.datamodules.features.store import MissingArrayError
from siftclip.errors import InputError
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.description import nested
from siftclip.selectors.core.source import TRAINING_LOSS, ExternalColumn, FeatureFile

LEARNER, REFERENCE, SCORER = "learner", "reference", "scorer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a selector and the members of a composition read."""

    features: frozenset[str]
    files: tuple[FeatureFile, ...]
    columns: frozenset[ExternalColumn]
    learns: bool  # it, or a member, has a state that training changes

    @classmethod
    def of(cls, selector: Selector) -> Needs:
        """Return the needs of a selector."""
        members = list(nested(selector, Selector))  # type: ignore[type-abstract]  # mypy 4717
        requires = [member.requires for member in members]
        columns = [column for need in requires for column in (need.column, need.lists)]
        return cls(
            features=frozenset(key for need in requires for key in need.features),
            files=tuple(file for need in requires for file in need.files),
            columns=frozenset(column for column in columns if column is not None),
            learns=any(learns(member) for member in members),
        )

    def of_model(self, name: str) -> tuple[str, ...]:
        """Return the arrays of a model that are needed."""
        return tuple(sorted(self.features & {f"{name}_img", f"{name}_txt"}))

    @property
    def training_loss(self) -> bool:
        return TRAINING_LOSS in self.columns


def learns(selector: Selector) -> bool:
    """Return whether a selector has a state that training changes."""
    return type(selector).state_dict is not Selector.state_dict


def require_no_training_loss(selector: Selector, name: str) -> None:
    """Refuse a selector before training that reads the losses of training.

    Args:
        selector: of the option `selector`.
        name: what the configuration calls it.

    Raises:
        InputError: it does.
    """
    if Needs.of(selector).training_loss:
        raise InputError(
            _in_the_loop(selector, name, "the losses of samples", cadence="every_epoch")
        )


@contextmanager
def told_where_it_works(selector: Selector, name: str) -> Iterator[None]:
    """Say of a selector that it is one for the loop where it lacks what only training has.

    Args:
        selector: of the option `selector`.
        name: what the configuration calls it.
    """
    try:
        yield
    except MissingArrayError as error:
        if error.key.rpartition("_")[0] not in (LEARNER, REFERENCE, SCORER):
            raise
        draws = type(selector).draw is not Selector.draw
        cadence = "every_step" if draws else "every_epoch"
        raise InputError(_in_the_loop(selector, name, error.key, cadence=cadence)) from error


def _in_the_loop(selector: Selector, name: str, what: str, *, cadence: str) -> str:
    return (
        f"selector={name}: {type(selector).__name__} selects while a model trains. It reads "
        f"{what}, which a pool has not. Use it with siftclip train: online={cadence} "
        f"selector@online.selector={name}"
    )
