"""Checks of how a kind of task reads labels and scores made-up features."""

from __future__ import annotations

import copy
import io
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from siftclip.errors import InputError
from siftclip.eval.conformance.example import (
    KindExample,
    image_features,
    key_of,
    made_up_scores,
    named_check,
    text_features,
)
from siftclip.eval.encoding.task_scores import score_task
from siftclip.eval.evaluate import ScoredTask
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.reports.error_analysis import write_details, write_predictions
from siftclip.eval.results.result_checks import COUNT_PREFIX, require_share
from siftclip.eval.results.result_checks import check_metrics as require_metrics
from siftclip.eval.results.result_checks import check_outcomes as require_outcomes
from siftclip.eval.significance.resampling import point_value, replicates, task_interval
from siftclip.eval.tasks.kinds.registry import BUILT_IN, find_kind
from siftclip.eval.tasks.kinds.values import TaskSamples, TaskScores
from siftclip.eval.tasks.samples import IMAGE_SUFFIXES

TOLERANCE = 1e-5  # of metrics and what they are made of, which is float32
_LEAST_SAMPLES = 4
_RESAMPLES = 50


@named_check
def check_declaration(example: KindExample) -> None:
    """Check that names can be written in a task's files, and that there are enough samples."""
    kind = example.kind
    assert kind.name == kind.name.strip().lower() != "", "name must be in lower case, and not empty"
    known = BUILT_IN.get(kind.name)
    assert known is None or type(known) is kind, f"{kind.name!r} is the name of a built-in kind"
    suffix = kind.suffix
    assert suffix == suffix.lower().strip(".") != "", "suffix must be in lower case, without a dot"
    assert suffix not in IMAGE_SUFFIXES, "suffix must not be that of an image"
    assert not kind.one_class or kind.has_classes, "one_class needs has_classes"
    is_share = kind.chance is None or 0 <= kind.chance <= 1
    assert is_share, f"chance must be a share in [0, 1]. It is {kind.chance}"
    assert len(example.samples) >= _LEAST_SAMPLES, f"give at least {_LEAST_SAMPLES} samples"
    labelled = all(suffix in sample for sample in example.samples)
    assert labelled, f"each example sample must have its label, {suffix!r}"


@named_check
def check_reading(example: KindExample) -> None:
    """Check that all samples are read, with numbers, captions or marked images."""
    samples = example.read()
    keys = [key_of(number) for number in range(len(example.samples))]
    assert samples.keys.tolist() == keys, "all samples must be read"
    for marks, images in zip(samples.associations, np.diff(samples.first_image), strict=False):
        marked = marks.dtype == np.bool_ and marks.shape == (images,)
        assert marked, "associated must be bool, one for each image of the sample"


@named_check
def check_damaged_labels(example: KindExample) -> None:
    """Check that a damaged label is an InputError that names the sample, and never unpickled."""
    damaged = {
        "an empty label": b"",
        "a label of random bytes": b"\x80\xff\x00\xfe\x93",
        "a pickle in place of a label": pickle.dumps(_Unpickled(), protocol=4),
        "an array that holds a pickle": _npy(np.asarray([_Unpickled()], dtype=object)),
    }
    _unpickled.clear()
    for name, data in damaged.items():
        error = _error_of(example, data)
        assert not _unpickled, f"{name} was unpickled"
        got = f"Got {type(error).__name__}: {error}" if error else "It was taken"
        refused = isinstance(error, InputError)
        assert refused, f"{name} must be refused by a ValueError. {got}"
        assert key_of(1) in str(error), f"{name}: the error must name the sample. {got}"


def _error_of(example: KindExample, label: bytes) -> Exception | None:
    """Return what is raised when one sample has this label, if anything is."""
    try:
        example.read(labels={1: label})
    except Exception as error:  # of the kind
        return error
    return None


_unpickled: list[bool] = []


class _Unpickled:
    """Takes note of it when its pickle is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_note, ()


def _take_note() -> None:
    _unpickled.append(True)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@named_check
def check_metrics(example: KindExample) -> None:
    """Check that metrics are finite or NaN, shares in [0, 1], and the main one is among them."""
    scores = made_up_scores(example.read())
    values, _ = require_metrics(scores.metrics)
    main = example.kind.main_metric
    assert main in values, f"the main metric {main!r} must be one of {sorted(values)}"
    assert values[main] is not None, f"{main} must be defined for the example samples, not NaN"
    require_share(main, values[main])
    for name in scores.outcomes:
        is_count = name.startswith(COUNT_PREFIX)
        assert not is_count, f"{name} is no count: metrics named {COUNT_PREFIX}* are whole numbers"


@named_check
def check_outcomes(example: KindExample) -> None:
    """Check that the main metric has outcomes, and all outcomes a row per sample and its metric."""
    samples = example.read()
    scores = made_up_scores(samples)
    _main_outcomes(example, scores)
    for name, outcomes in scores.outcomes.items():
        require_outcomes(outcomes.statistic, outcomes.arrays, _units(samples))
        assert name in scores.metrics, f"{name} has outcomes, and is no metric"
        value = point_value(outcomes)
        assert abs(value - scores.metrics[name]) <= TOLERANCE, (
            f"the outcomes of {name} make {value}, and the metric is {scores.metrics[name]}"
        )


def _main_outcomes(example: KindExample, scores: TaskScores) -> Outcomes:
    main = example.kind.main_metric
    assert main in scores.outcomes, f"the main metric {main!r} must have outcomes"
    return scores.outcomes[main]


def _units(samples: TaskSamples) -> np.ndarray:
    return np.arange(len(samples), dtype=np.uint64)


@named_check
def check_resampling(example: KindExample) -> None:
    """Check that the main metric can be taken on resamples, and gets an interval."""
    samples = example.read()
    outcomes = _main_outcomes(example, made_up_scores(samples))
    drawn = replicates(outcomes, _units(samples), resamples=_RESAMPLES, seed=0)
    interval = task_interval(outcomes, _units(samples), drawn)
    assert interval is not None, "the main metric is not defined on most resamples"
    low, high = interval
    assert 0 <= low <= point_value(outcomes) <= high <= 1, f"the interval is [{low}, {high}]"


@named_check
def check_sample_order(example: KindExample) -> None:
    """Check that scores do not depend on the order of the samples."""
    order = np.random.default_rng(3).permutation(len(example.samples)).tolist()
    _assert_same(example.read(), example.read(order=order), "in another order")


@named_check
def check_tars(example: KindExample) -> None:
    """Check that scores do not depend on how the samples are cut into tars."""
    whole = example.read(tars=1)
    for tars in (3, len(example.samples)):
        _assert_same(whole, example.read(tars=tars), f"in {tars} tars")


def _assert_same(first: TaskSamples, second: TaskSamples, how: str) -> None:
    """Assert that samples with the same keys get the same scores."""
    scores, others = made_up_scores(first), made_up_scores(second)
    assert scores.metrics.keys() == others.metrics.keys(), f"other metrics {how}"
    for name, value in scores.metrics.items():
        assert _close(value, others.metrics[name]), f"{name} is another {how}"
    assert scores.outcomes.keys() == others.outcomes.keys(), f"other outcomes {how}"
    rows, other_rows = np.argsort(first.keys), np.argsort(second.keys)
    for name, outcomes in scores.outcomes.items():
        for key, array in outcomes.arrays.items():
            same = _close(array[rows], others.outcomes[name].arrays[key][other_rows])
            assert same, f"the outcomes of {name} are others {how}"


def _close(first: Any, second: Any) -> bool:
    return bool(np.allclose(first, second, rtol=0, atol=TOLERANCE, equal_nan=True))


@named_check
def check_deterministic(example: KindExample) -> None:
    """Check that reading and scoring give the same again, and use no global random state."""
    before = _random_states()
    samples = example.read()
    made_up_scores(samples)
    for name, state in _random_states().items():
        assert state == before[name], f"{name}'s global random state was used"
    _assert_same(samples, example.read(), "the second time")


def _random_states() -> dict[str, bytes]:
    states = {"Python": random.getstate(), "numpy": np.random.get_state()}
    dumped = {name: pickle.dumps(state) for name, state in states.items()}
    return {**dumped, "torch": torch.get_rng_state().numpy().tobytes()}


@named_check
def check_input_untouched(example: KindExample) -> None:
    """Check that scoring does not change the samples or the features."""
    samples = example.read()
    images = image_features(samples)
    kept, kept_images = copy.deepcopy(samples), images.clone()
    score_task(samples, images, text_features())
    assert torch.equal(images, kept_images), "the features of the images were changed"
    for name in ("keys", "labels", "first_image"):
        same = np.array_equal(getattr(samples, name), getattr(kept, name))
        assert same, f"the samples' {name} were changed"
    pairs = zip(samples.associations, kept.associations, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs), "the associations were changed"


@named_check
def check_few_samples(example: KindExample) -> None:
    """Check that one sample or two of a task can be scored, as `max_samples` has it."""
    samples = example.read()
    for count in (1, 2):
        require_metrics(made_up_scores(samples.take(np.arange(count))).metrics)


@named_check
def check_columns(example: KindExample) -> None:
    """Check that the columns of the predictions have a value per sample, and can be read back."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples, kind = example.read(), find_kind(example.kind.name)
    scores = made_up_scores(samples)
    columns, rows = kind.columns(samples, scores), kind.class_table(samples, scores)
    assert columns is not None, "columns must not be None for samples with labels"
    assert not {"key", "tar"} & columns.keys(), "key and tar are columns of every file"
    keys = {tuple(row) for row in rows or ()}
    assert len(keys) <= 1, "rows of the class table must have equal keys"
    with tempfile.TemporaryDirectory() as folder:
        scored = ScoredTask(samples=samples, scores=scores)
        path = write_predictions(Path(folder), scored)
        assert path is not None, "nothing was written"
        table = pq.read_table(path)
        write_details(Path(folder), scored)
    assert table.column("key").to_pylist() == samples.keys.tolist(), "the keys are others"
    for name, values in columns.items():
        written = values if isinstance(values, pa.Array) else pa.array(values)
        same = repr(table.column(name).to_pylist()) == repr(written.to_pylist())  # NaN is as NaN
        assert same, f"the column {name!r} is another when it is read back"
