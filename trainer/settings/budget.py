"""How long a run is: by samples that are trained or loaded, by FLOPs, or by seconds."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from siftclip.errors import InputError
from siftclip.trainer.settings.data import BudgetSettings, ScaleSettings, Unit

# Of a run. The longest published ones have some 100,000; a plan of more than this is a slip of the
# pen, and would take gigabytes of memory.
MAX_STEPS = 10_000_000


class Limit(NamedTuple):
    """A budget that is not counted in trained samples."""

    unit: Unit
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long a run is. The unit is trained samples; the last batch is full.

    Example:
        >>> from siftclip.trainer import Budget
        >>> budget = Budget(samples_seen=1000, global_batch_size=64)
        >>> budget.total_steps, budget.trained_samples
        (16, 1024)
    """

    samples_seen: int
    global_batch_size: int

    @property
    def total_steps(self) -> int:
        """Steps until at least `samples_seen` samples are trained."""
        return -(-self.samples_seen // self.global_batch_size)

    @property
    def trained_samples(self) -> int:
        """What the run really trains: `samples_seen` rounded up to full batches."""
        return self.total_steps * self.global_batch_size


def budget_from(scale: ScaleSettings) -> Budget:
    """Return the budget of the settings. A limit, see `limit_from`, takes its place.

    Raises:
        InputError: the run has more than `MAX_STEPS` steps.
    """
    budget = Budget(samples_seen=scale.samples_seen, global_batch_size=scale.global_batch_size)
    given = f"scale.samples_seen={budget.samples_seen}"
    require_steps(budget.total_steps, given, budget.global_batch_size)
    return budget


def require_steps(steps: float, given: str, global_batch_size: int) -> None:
    """Refuse a run of more than `MAX_STEPS` steps.

    Args:
        steps: of the run.
        given: the option that says so, with its value.
        global_batch_size: of a step.

    Raises:
        InputError: it has more.
    """
    if steps > MAX_STEPS:
        raise InputError(
            f"{given} would be {Decimal(steps):.4g} steps of {global_batch_size} samples, and a "
            f"run has at most {MAX_STEPS:,}. Lower it, or raise scale.global_batch_size."
        )


def limit_from(budget: BudgetSettings) -> Limit | None:
    """Return what `budget` of the settings says; None where it leaves it to scale.samples_seen."""
    return next((Limit(unit, amount) for unit, amount in budget.given.items()), None)
