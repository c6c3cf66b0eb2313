"""Comparisons of selectors, with seeds, at one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias, get_type_hints

from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import ParameterError
from siftclip.selectors.core.base import Selector
from siftclip.trainer.api.features import Features
from siftclip.trainer.api.sections import (
    CommonArguments,
    PathLike,
    require_known,
    require_pool,
    require_type,
)
from siftclip.trainer.api.selecting import select_settings
from siftclip.trainer.api.training import TrainArguments, train_settings
from siftclip.trainer.compare.arms import CompareOutcome, compare_stage
from siftclip.trainer.settings.commands import CompareCommand, TrainCommand
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.tools import CompareSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A selector, what makes one of the seed of a run, or a mapping with either as "selector" and
# arguments of `train` that this arm alone has.
Arm: TypeAlias = Selector | Callable[[int], Selector] | Mapping[str, Any]


def compare(
    pool: Pool | PathLike,
    features: Features | str | None,
    arms: Mapping[str, Arm],
    model: str | ModelSettings | Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    name: str = "compare",
    baseline: str | None = None,
    aa: bool = False,
    truth: PathLike | None = None,
    columns: Sequence[str] = (),
    samples_seen: int | None = None,
    global_batch_size: int | None = None,
    **others: Unpack[TrainArguments],
) -> CompareOutcome:
    """Train every arm with every seed at one budget, evaluate, and write a report.

    As `siftclip compare` does: what is finished is reused, whoever made it.

    Args:
        pool: that all arms select from.
        features: see `select`.
        arms: by name: a selector; a function of the seed that returns one, such as
            `lambda seed: Uniform(fraction=0.3, seed=seed)`; or a mapping with one of them as
            "selector" and with arguments of `train`.
        model: see `train`.
        pretrained: see `train`.
        seeds: one run for each arm and seed.
        name: of the folder of the report, in `output_dir`/compare.
        baseline: the arm that the others are compared with; None: the first one.
        aa: whether to train the baseline with as many other seeds, too.
        truth: parquet file with uid and kind: the report counts kinds among the selected.
        columns: of the printed table: averages or tasks; none: all.
        samples_seen: see `train`.
        global_batch_size: see `train`.
        **others: see `TrainArguments`; `tasks` must be given, `seed` comes from `seeds`.

    Raises:
        InputError: an arm is wrong, the arms differ in budget, or there is nothing to evaluate on;
            all of this before the first run.
    """
    require_known(compare, others, TrainArguments)
    require_type("compare", "arms", arms, Mapping, 'Such as {"half": ClipScore()}.')  # type: ignore[type-abstract]  # mypy 4717
    require_type("compare", "seeds", seeds, Sequence, "Such as (0, 1, 2).")  # type: ignore[type-abstract]  # mypy 4717
    if not arms:
        raise ParameterError("must name at least one arm", owner="compare", parameter="arms")
    opened = require_pool("compare", pool)
    common = {key: value for key, value in others.items() if key in get_type_hints(CommonArguments)}

    def settings_of(arm: str, seed: int) -> TrainCommand:
        selector, own = _selector_of(arm, arms[arm], seed)
        return train_settings(
            select_settings("compare", opened, features, selector, name=None, common=common)[1],
            model,
            pretrained,
            samples_seen=samples_seen,
            global_batch_size=global_batch_size,
            others={**others, "seed": seed, **own},
        )

    first = settings_of(next(iter(arms)), seeds[0] if seeds else 0)
    settings = CompareCommand(
        **{each.name: getattr(first, each.name) for each in fields(first)},
        compare=CompareSettings(
            name=name,
            seeds=tuple(seeds),
            arms=dict.fromkeys(arms, ()),
            baseline=baseline,
            aa=aa,
            truth=None if truth is None else str(truth),
            columns=tuple(columns),
        ),
    )
    return compare_stage(settings, settings_of)


def _selector_of(arm: str, given: Arm, seed: int) -> tuple[Selector, Mapping[str, Any]]:
    """Return the selector of an arm, and what it alone gives to `train`."""
    own: Mapping[str, Any] = {}
    if isinstance(given, Mapping):
        own = {key: value for key, value in given.items() if key != "selector"}
        given = given.get("selector")  # type: ignore[assignment]
    selector = given if isinstance(given, Selector) or not callable(given) else given(seed)
    if not isinstance(selector, Selector):
        raise ParameterError(
            "must be a selector, a function of the seed that returns one, or a mapping with one of "
            'them as "selector"',
            owner="compare",
            parameter=f"arms.{arm}",
            got=type(selector).__name__,
        )
    return selector, own
