"""Metrics and probes are the same on a GPU as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from siftclip.datamodules.models.load import ClipModel
from siftclip.eval.evaluate import EvalOptions, Precision, evaluate_tasks
from siftclip.eval.probes.logistic_fit import fit_logistic
from siftclip.eval.tasks.kinds.values import Task

pytestmark = pytest.mark.gpu


def metrics(
    clip: ClipModel, tasks: list[Task], device: torch.device, precision: Precision = "fp32"
) -> dict[str, dict[str, float | None]]:
    options = EvalOptions(progress=False, resamples=0, batch_size=5, precision=precision)
    evaluation = evaluate_tasks(clip, tasks, device=device, options=options)
    assert evaluation.failures == ()
    return {result.key: result.metrics for result in evaluation.results}


def test_all_kinds_of_tasks(clip: ClipModel, tasks: list[Task], device: torch.device) -> None:
    found, expected = metrics(clip, tasks, device), metrics(clip, tasks, torch.device("cpu"))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-6)


def test_half_precision_is_finite(clip: ClipModel, tasks: list[Task], device: torch.device) -> None:
    for values in metrics(clip, tasks, device, "bf16").values():
        assert all(value is None or np.isfinite(value) for value in values.values())


def test_the_model_is_given_back(clip: ClipModel, tasks: list[Task], device: torch.device) -> None:
    metrics(clip, tasks[:1], device)
    assert clip.model.training
    assert {parameter.device.type for parameter in clip.model.parameters()} == {"cpu"}


def test_a_probe_is_the_same(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    centres = torch.randn(5, 16, generator=generator)
    features = centres[labels] + torch.randn(200, 16, generator=generator)
    features = torch.nn.functional.normalize(features, dim=1)
    expected = fit_logistic(features, labels, 5, l2=1e-3)
    found = fit_logistic(features.to(device), labels.to(device), 5, l2=1e-3)
    scores = found.scores(features.to(device)).cpu()
    torch.testing.assert_close(scores, expected.scores(features), rtol=1e-3, atol=1e-3)
