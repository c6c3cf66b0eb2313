"""The contract of a kind of task, as checks that anybody can run on theirs.

    from siftclip.eval import check_task_kind
    def test_my_kind():
        check_task_kind(Counting, [{"json": b'{"count": %d}' % i} for i in range(8)])

`CHECKS` holds the checks one by one, for `pytest.mark.parametrize`. They write real task folders
into temporary directories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from siftclip.eval.conformance.evaluation_checks import (
    check_evaluation,
    check_probes,
    check_targets,
)
from siftclip.eval.conformance.example import Check, KindExample
from siftclip.eval.conformance.score_checks import (
    check_columns,
    check_damaged_labels,
    check_declaration,
    check_deterministic,
    check_few_samples,
    check_input_untouched,
    check_metrics,
    check_outcomes,
    check_reading,
    check_resampling,
    check_sample_order,
    check_tars,
)
from siftclip.eval.tasks.kinds.base import TaskKind

ExampleSamples = Sequence[Mapping[str, bytes]]

CHECKS: tuple[Check, ...] = (
    check_declaration,
    check_reading,
    check_damaged_labels,
    check_metrics,
    check_outcomes,
    check_resampling,
    check_sample_order,
    check_tars,
    check_deterministic,
    check_input_untouched,
    check_few_samples,
    check_columns,
    check_evaluation,
    check_probes,
    check_targets,
)


def check_task_kind(
    kind: type[TaskKind],
    samples: ExampleSamples | Callable[[], ExampleSamples],
    *,
    classnames: Sequence[str] = (),
    templates: Sequence[str] = ("a photo of a {c}.",),
) -> None:
    """Run every check on a kind of task. It need not be installed.

    Args:
        kind: the class.
        samples: at least 4 of a task of this kind, or what makes them: the bytes of a sample's
            members by their suffixes, as `{"json": b'{"count": 3}'}`. A sample without an image
            gets one; several are given with it, as `{"0.png": example_image(0), ...}`.
        classnames: of the task, if the kind has classes.
        templates: of its prompts.

    Raises:
        AssertionError: names the check that failed and what is wrong.

    Example:
        >>> from siftclip.eval import Classification, check_task_kind
        >>> samples = [{"cls": b"%d" % (number % 2)} for number in range(6)]
        >>> check_task_kind(Classification, samples, classnames=["cat", "dog"])  # silent: it holds
    """
    example = KindExample(
        kind=kind,
        samples=tuple(samples() if callable(samples) else samples),
        classnames=tuple(classnames),
        templates=tuple(templates),
    )
    for check in CHECKS:
        check(example)
