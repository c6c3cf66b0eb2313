"""How long a run is: by samples that are trained or loaded, by FLOPs, or by seconds."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf

from siftclip.selectors.errors import InputError, require_int, require_positive
from siftclip.trainer.stages import plain

# Of a run. The longest published ones have some 100,000; a plan of more than this is a slip of the
# pen, and would take gigabytes of memory.
MAX_STEPS = 10_000_000


class Limit(NamedTuple):
    """A budget that is not counted in trained samples."""

    unit: Literal["loaded_samples", "flops", "seconds"]
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long a run is. The unit is trained samples; the last batch is full."""

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


def budget_from(config: DictConfig) -> Budget:
    """The budget of the configuration, checked. A limit, see `limit_from`, takes its place.

    Raises:
        InputError: a number is out of range, or the run has more than `MAX_STEPS` steps.
    """
    budget = Budget(
        samples_seen=require_int("scale.samples_seen", config.scale.samples_seen, minimum=1),
        global_batch_size=require_int(
            "scale.global_batch_size", config.scale.global_batch_size, minimum=2
        ),
    )
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


def limit_from(config: DictConfig) -> Limit | None:
    """What `budget` of the configuration says; None where it leaves it to scale.samples_seen.

    Raises:
        InputError: it says several things, or a number is not above 0.
    """
    if not OmegaConf.is_dict(config.budget):
        raise InputError(
            "budget needs a unit: budget.seconds=N, budget.flops=N or budget.loaded_samples=N. "
            f"Got {config.budget!r}."
        )
    given = {unit: amount for unit, amount in plain(config.budget).items() if amount is not None}
    if len(given) > 1:
        raise InputError(f"Only one of budget.* can limit a run. Got {given}.")
    for unit, amount in given.items():
        return Limit(unit, require_positive(f"budget.{unit}", amount))
    return None
