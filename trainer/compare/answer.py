"""What a comparison has shown, in sentences: nothing is called better that the data do not show."""

from __future__ import annotations

from collections.abc import Sequence

from siftclip.eval.significance.arm_model import ArmModel
from siftclip.eval.significance.arm_tests import LEVEL, POWER, ArmDifference, seeds_needed
from siftclip.tables import listed
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.significance import ColumnTests

_LISTED = 4  # arms in a sentence


def column_title(column: str) -> str:
    """Return what a table calls a task or an average."""
    return column.removeprefix("average/")


def points(share: float, sign: str = "") -> str:
    """Format a share, or a difference of shares, in percent with one decimal."""
    text = f"{100 * share:{sign}.1f}"
    return text.replace("-0.0", "0.0") if text.strip("-+0.") == "" else text


def interval_points(interval: tuple[float, float]) -> str:
    """Format an interval of a difference, in percentage points."""
    return f"{points(interval[0], '+')} to {points(interval[1], '+')}"


def answer(comparison: ArmComparison, column: str) -> str:
    """Say which arm is best on a task or average, and how sure that is, see `answer_parts`."""
    return " ".join(filter(None, answer_parts(comparison, column)))


def answer_parts(comparison: ArmComparison, column: str) -> tuple[str, str]:
    """Say in short which arm is best on a task or average, and then what differs from the baseline.

    Args:
        comparison: of all arms.
        column: a task, or `average/NAME`.
    """
    tested, title = comparison.tests[column], column_title(column)
    if tested.tests is None:
        none = f"{comparison.baseline}, the baseline, has no value of {title}"
        return f"{none}: nothing is compared.", ""
    arms = [arm for arm in tested.arms if arm != comparison.again]
    if len(arms) < 2:
        only = f"Only {listed(arms)} has a value of {title}"
        return f"{only}: there is nothing to compare it with.", ""
    means = dict(zip(tested.arms, tested.tests.model.means.tolist(), strict=True))
    top = max(arms, key=lambda arm: means[arm])
    if not tested.tests.model.freedom:
        return (
            f"Not resolved: one seed of each arm cannot tell arms from seeds. {top} has the "
            f"highest value of {title}, {points(means[top])} %.",
            "",
        )
    better, worse = (
        [
            arm
            for arm in arms
            if tested.resolved(arm)
            and (means[arm] > means[tested.arms[tested.tests.baseline]]) == up
        ]
        for up in (True, False)
    )
    sentences: list[str] = []
    if tested.best != tested.baseline:
        sentences.append(_of_differences(tested, comparison.baseline, better, "better"))
    if worse or not better:
        sentences.append(_of_differences(tested, comparison.baseline, worse, "worse"))
    if not better and not worse:
        sentences.append(_of_the_least(tested))
    return _of_the_best(tested, title, means, top, arms), " ".join(filter(None, sentences))


def aa_sentence(comparison: ArmComparison, column: str) -> str:
    """Say what the two groups of the baseline's seeds show; "" if there is one group."""
    tested = comparison.tests[column]
    if comparison.again is None or comparison.again not in tested.arms or tested.tests is None:
        return ""
    difference = tested.tests.of(tested.arms.index(comparison.again))
    if difference is None or difference.interval is None:
        return ""
    found = tested.resolved(comparison.again)
    verdict = (
        "A difference was found where there is none: a false alarm, as one in twenty comparisons "
        "has."
        if found
        else "No difference was found, as it should be."
    )
    return (
        f"A/A: {comparison.again} is {comparison.baseline} with other seeds. It is "
        f"{points(difference.value, '+')} points from it (95 % interval "
        f"{interval_points(difference.interval)}). {verdict}"
    )


def model_note(comparison: ArmComparison, column: str) -> str:
    """Say how differences are tested, and what this comparison could have found."""
    tested = comparison.tests[column]
    if tested.tests is None or not tested.tests.model.freedom:
        return ""
    model = tested.tests.model
    images = (
        f" and over {model.image_units:,} test images, which are resampled for all runs at once"
        if model.image_units
        else "; what the results are made of is not kept, so that test images count as they are"
    )
    return (
        f"Values are percent, mean ± standard deviation between seeds. Differences to "
        f"{comparison.baseline} are over seeds, whose variance is pooled over the arms "
        f"({model.freedom} degrees of freedom){images} (crossed random effects). Intervals and p "
        f"values are corrected for the number of arms (Dunnett); resolved is what has p of at most "
        f"{LEVEL:g}. {_of_the_least(tested)}"
    )


def _of_the_best(
    tested: ColumnTests, title: str, means: dict[str, float], top: str, arms: Sequence[str]
) -> str:
    value = f"{points(means[top])} %"
    if tested.best is not None:
        return f"{tested.best} is the best on {title}, with {value}."
    if tested.tests is None:
        return ""
    may_be = [tested.arms[arm] for arm in tested.tests.may_be_best if tested.arms[arm] in arms]
    if len(may_be) <= 1:  # the best but for the baseline's other group
        return f"{top} is the best on {title}, with {value}."
    if len(may_be) == len(arms):
        which = "any of the arms may be"
    else:
        others = f" and {len(may_be) - _LISTED} more" if len(may_be) > _LISTED else ""
        which = f"{listed(may_be[:_LISTED])}{others} may be"
    return (
        f"Which arm is the best on {title} is not resolved: {which}. {top} has the highest mean, "
        f"{value}."
    )


def _of_differences(tested: ColumnTests, baseline: str, arms: Sequence[str], word: str) -> str:
    if tested.tests is None or not arms:
        return ""
    texts = []
    for arm in sorted(arms, key=lambda arm: -abs(_difference(tested, arm).value))[:_LISTED]:
        difference = _difference(tested, arm)
        interval = difference.interval or (difference.value, difference.value)
        texts.append(f"{arm} by {points(abs(difference.value))} ({interval_points(interval)})")
    more = f" and {len(arms) - _LISTED} more" if len(arms) > _LISTED else ""
    are = "is" if len(arms) == 1 else "are"
    return f"{'; '.join(texts)}{more} {are} {word} than {baseline}, in points with 95 % intervals."


def _of_the_least(tested: ColumnTests) -> str:
    """Say which difference would have been resolved, and how many seeds the largest one needs."""
    if tested.tests is None:
        return ""
    known = [d for d in tested.tests.differences if d.least is not None]
    if not known:
        return ""
    least = max(difference.least or 0.0 for difference in known)
    power = max(difference.least_with_power or 0.0 for difference in known)
    return (
        f"A difference to {tested.baseline} of {points(least)} points would have been resolved; a "
        f"true one of {points(power)} is found in {POWER:.0%} of such comparisons."
    )


def more_seeds(tested: ColumnTests, arm: str) -> str:
    """Say how many seeds of each arm would resolve the difference of an arm, if it is as observed.

    With a chance of 80 %. `-` for one that is resolved, or not tested.
    """
    if tested.tests is None or tested.resolved(arm) is not False:
        return "-"
    model: ArmModel = tested.tests.model
    needed = seeds_needed(model, tested.arms.index(arm), tested.tests.baseline)
    return "more than 1000" if needed is None else str(needed)


def _difference(tested: ColumnTests, arm: str) -> ArmDifference:
    found = None if tested.tests is None else tested.tests.of(tested.arms.index(arm))
    if found is None:
        raise RuntimeError(f"{arm} is compared")
    return found
