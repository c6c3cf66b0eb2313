from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

import siftclip.eval.probes.logistic_fit as logistic_fit
from siftclip.errors import InputError
from siftclip.eval.probes.logistic_fit import (
    ABSENT_BIAS,
    LogisticProblem,
    Probe,
    fit_logistic,
    full_precision,
)


def make_samples(
    n: int, dim: int, classes: int, *, seed: int = 0, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in a cone with axes of unequal lengths, as CLIP's are; every class occurs."""
    generator = np.random.default_rng([seed, n, dim, classes])
    lengths = np.arange(1, dim + 1) ** -0.5
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, n - classes)])
    centres = generator.standard_normal((classes, dim)) * lengths
    features = centres[labels] + noise * generator.standard_normal((n, dim)) * lengths + 0.5
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32), labels.astype(np.int64)


def objective(
    weight: np.ndarray,
    bias: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    l2: float,
    weights: np.ndarray | None = None,
) -> float:
    weight = weight.astype(np.float64)
    logits = features.astype(np.float64) @ weight.T + bias.astype(np.float64)
    logits -= logits[np.arange(len(labels)), labels][:, None]
    losses = logsumexp(logits, axis=1)
    return float(np.average(losses, weights=weights) + l2 / 2 * np.square(weight).sum())


def sklearn_fit(
    features: np.ndarray, labels: np.ndarray, l2: float, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight [C, d] and bias [C] of the optimum, in float64; the labels must be 0 to C - 1."""
    total = len(labels) if weights is None else weights.sum()
    two = labels.max() == 1
    model = LogisticRegression(C=(2 if two else 1) / (l2 * total), tol=1e-10, max_iter=20000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no better step is found near the limit of float64
        model.fit(features.astype(np.float64), labels, sample_weight=weights)
    if two:  # one row of twice the length is two rows of opposite sign
        return (
            np.concatenate([-model.coef_, model.coef_]) / 2,
            np.concatenate([-model.intercept_, model.intercept_]) / 2,
        )
    return model.coef_, model.intercept_


def fit(features: np.ndarray, labels: np.ndarray, classes: int, **options: object) -> Probe:
    return fit_logistic(torch.from_numpy(features), torch.from_numpy(labels), classes, **options)  # type: ignore[arg-type]


def agree(
    probe: Probe,
    features: np.ndarray,
    labels: np.ndarray,
    l2: float,
    weights: np.ndarray | None = None,
) -> None:
    weight, bias = sklearn_fit(features, labels, l2, weights)
    reference = objective(weight, bias, features, labels, l2, weights)
    ours = objective(probe.weight.numpy(), probe.bias.numpy(), features, labels, l2, weights)
    assert probe.converged
    assert ours == pytest.approx(reference, rel=4e-6)
    assert probe.loss == pytest.approx(ours, rel=1e-5)
    logits = features @ weight.T + bias
    scores = probe.scores(torch.from_numpy(features)).numpy()
    clear = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0] > 1e-2 * np.abs(logits).max()
    assert clear.mean() > 0.5
    assert (scores.argmax(1) == logits.argmax(1))[clear].all()
    centred = logits - logits.mean(axis=1, keepdims=True)
    assert np.abs(scores - centred).max() <= 2e-2 * max(1.0, np.abs(centred).max())


@pytest.mark.parametrize("l2", [10.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(
    ("n", "dim", "classes"), [(300, 16, 2), (400, 24, 7), (500, 12, 30), (30, 48, 5)]
)
def test_finds_the_optimum_of_sklearn(n: int, dim: int, classes: int, l2: float) -> None:
    """Two classes, many, separable ones, and fewer samples than dimensions."""
    features, labels = make_samples(n, dim, classes)
    agree(fit(features, labels, classes, l2=l2), features, labels, l2)


def test_weights_of_samples_count_as_in_sklearn() -> None:
    features, labels = make_samples(300, 10, 4)
    weights = np.random.default_rng(0).random(300).astype(np.float32) * 5
    weights[::7] = 0
    probe = fit(features, labels, 4, l2=1e-3, weights=torch.from_numpy(weights))
    agree(probe, features, labels, 1e-3, weights)


def test_a_weight_of_two_is_a_sample_given_twice() -> None:
    features, labels = make_samples(60, 6, 3)
    twice = np.r_[0:60, 0:20]
    weights = torch.from_numpy(np.bincount(twice).astype(np.float32))
    weighted = fit(features, labels, 3, l2=1e-2, weights=weights, tolerance=1e-10)
    repeated = fit(features[twice], labels[twice], 3, l2=1e-2, tolerance=1e-10)
    assert weighted.loss == pytest.approx(repeated.loss, rel=1e-6)
    torch.testing.assert_close(weighted.weight, repeated.weight, rtol=1e-3, atol=1e-3)


def test_a_class_without_samples_is_never_won() -> None:
    """The others are fitted as if it did not exist, wherever it stands."""
    features, labels = make_samples(200, 8, 4)
    spread = np.asarray([0, 2, 3, 5])[labels]
    probe = fit(features, spread, 7, l2=1e-3)
    alone = fit(features, labels, 4, l2=1e-3)
    torch.testing.assert_close(probe.weight[[0, 2, 3, 5]], alone.weight)
    torch.testing.assert_close(probe.bias[[0, 2, 3, 5]], alone.bias)
    assert (probe.weight[[1, 4, 6]] == 0).all()
    assert (probe.bias[[1, 4, 6]] == ABSENT_BIAS).all()
    scores = probe.scores(torch.from_numpy(features))
    assert torch.isfinite(scores).all()
    assert torch.isfinite(scores.log_softmax(dim=1)).all()
    assert scores.topk(4, dim=1).indices.unique().tolist() == [0, 2, 3, 5]


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = make_samples(1000, 8, 3)
    whole = fit(features, labels, 3, l2=1e-4)
    monkeypatch.setitem(logistic_fit.BLOCK_LOGITS, "cpu", 1)  # 256 rows, and 232 at the end
    blocks = fit(features, labels, 3, l2=1e-4)
    assert blocks.loss == pytest.approx(whole.loss, rel=1e-6)
    torch.testing.assert_close(blocks.weight, whole.weight, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_autograd(weighted: bool) -> None:
    features, labels = make_samples(50, 6, 4)
    x = torch.from_numpy(features).double()
    y = torch.from_numpy(labels)
    share = torch.linspace(0.1, 9, 50) ** 2
    problem = LogisticProblem(torch.from_numpy(features), y, 4, share if weighted else None)
    share = share / share.mean() if weighted else torch.ones(50)
    theta = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta *= 3
    loss, gradient, curvature = problem._evaluate(theta, 0.1)
    theta.requires_grad_()
    logits = (x - problem.mean) @ theta[:, :-1].T + theta[:, -1]
    losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    expected = (share * losses).mean() + 0.05 * theta[:, :-1].square().sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, theta.grad, rtol=1e-5, atol=1e-6)
    shares = logits.detach().softmax(dim=1)
    torch.testing.assert_close(
        curvature, (share[:, None] * shares * (1 - shares)).mean(dim=0), rtol=1e-5, atol=1e-6
    )


def test_losses_next_to_zero_keep_their_digits() -> None:
    """With margins of about 20 a softmax in float32 would round all losses to 0."""
    features = np.asarray([[1, 0], [0, 1]] * 20, dtype=np.float32)
    labels = np.asarray([0, 1] * 20)
    problem = LogisticProblem(torch.from_numpy(features), torch.from_numpy(labels), 2)
    theta = torch.tensor([[10.0, -10, 0], [-10, 10, 0]], dtype=torch.float64)
    loss, gradient, _ = problem._evaluate(theta, 1e-30)
    assert loss == pytest.approx(np.log1p(np.exp(-20)), rel=1e-5)
    assert gradient[0, 0] == pytest.approx(-0.5 * np.exp(-20), rel=1e-5)


def test_deterministic_and_free_of_global_state() -> None:
    features, labels = make_samples(200, 8, 5)
    before = torch.get_float32_matmul_precision()
    state = torch.get_rng_state()
    first = fit(features, labels, 5, l2=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = fit(features, labels, 5, l2=1e-4)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_float32_matmul_precision() == before
    assert not first.weight.requires_grad


def test_precision_is_full_inside_and_restored() -> None:
    """Set in the old way of torch, for all backends, and in the new one, for one of them."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    start = [backend.fp32_precision for backend in backends]
    try:
        for overall in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(overall)
            before = [backend.fp32_precision for backend in backends]
            with full_precision(torch.device("cpu")):
                assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == overall
            assert [backend.fp32_precision for backend in backends] == before
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with full_precision(torch.device("cpu")):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(backends, start, strict=True):
            backend.fp32_precision = precision


def test_a_start_saves_iterations_and_does_not_change_the_optimum() -> None:
    features, labels = make_samples(500, 24, 6)
    cold = fit(features, labels, 6, l2=1e-4)
    warm = fit(features, labels, 6, l2=1e-4, start=fit(features, labels, 6, l2=1.2e-4))
    again = fit(features, labels, 6, l2=1e-4, start=cold, tolerance=1e-6)
    assert warm.loss == pytest.approx(cold.loss, rel=1e-6)
    assert warm.iterations < cold.iterations
    assert again.iterations == 0


def test_a_limit_of_iterations_is_told() -> None:
    features, labels = make_samples(500, 24, 6)
    probe = fit(features, labels, 6, l2=1e-6, max_iterations=3)
    assert not probe.converged
    assert probe.iterations == 3


def test_rounding_alone_is_convergence() -> None:
    """A tolerance that float32 cannot reach ends the fit all the same, close to the optimum."""
    features, labels = make_samples(300, 16, 4)
    probe = fit(features, labels, 4, l2=1e-3, tolerance=1e-30)
    assert probe.converged
    assert probe.iterations < 200
    agree(probe, features, labels, 1e-3)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 6), st.integers(0, 30), st.integers(1, 12), st.integers(0, 99))
def test_nothing_beats_the_optimum(classes: int, more: int, dim: int, seed: int) -> None:
    """The objective is convex: no parameters near or far may be lower. Also d = 1 and n = C."""
    features, labels = make_samples(classes + more, dim, classes, seed=seed)
    probe = fit(features, labels, classes, l2=1e-2)
    weight, bias = probe.weight.numpy(), probe.bias.numpy()
    assert probe.converged
    best = objective(weight, bias, features, labels, 1e-2)
    generator = np.random.default_rng(seed)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        other = weight + size * generator.standard_normal(weight.shape)
        shifted = bias + size * generator.standard_normal(bias.shape)
        assert objective(other, shifted, features, labels, 1e-2) >= best * (1 - 1e-6)


def test_equal_features_leave_the_prior() -> None:
    features = np.full((10, 3), 3**-0.5, dtype=np.float32)
    labels = np.asarray([0] * 7 + [1] * 3)
    probe = fit(features, labels, 2, l2=1e-4)
    assert probe.converged
    shares = probe.scores(torch.from_numpy(features)).softmax(dim=1)
    assert shares[0].tolist() == pytest.approx([0.7, 0.3], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, "from 0 to 2.*Got 3"),
        ({"labels": torch.tensor([0, -1, 1])}, "from 0 to 2.*Got -1"),
        ({"labels": torch.tensor([1, 1, 1])}, "at least 2 classes.*Got 1"),
        ({"labels": torch.tensor([0, 1])}, r"int64 \[3\].*\[2\]"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, "int64"),
        ({"features": torch.zeros(0, 2)}, r"not empty.*\[0, 2\]"),
        ({"features": torch.zeros(3, 2, dtype=torch.float64)}, "float32"),
        ({"features": torch.tensor([[0.0, 1], [1, 0], [float("nan"), 0]])}, "Row 2 holds NaN"),
        ({"weights": torch.zeros(3)}, "weights must be 3"),
        ({"weights": torch.tensor([1.0, -1, 1])}, "weights must be 3"),
        ({"weights": torch.ones(2)}, "weights must be 3"),
        ({"l2": 0.0}, "linear_probe.l2 must be above 0"),
        ({"l2": float("nan")}, "linear_probe.l2 must be a finite"),
        ({"max_iterations": 0}, "max_iterations must be an integer of at least 1"),
        ({"tolerance": 0}, "tolerance must be above 0"),
    ],
)
def test_bad_input(change: dict, words: str) -> None:
    arguments = {
        "features": torch.eye(3)[:, :2].contiguous(),
        "labels": torch.tensor([0, 1, 2]),
        "classes": 3,
        "l2": 0.1,
    }
    with pytest.raises(InputError, match=words):
        fit_logistic(**{**arguments, **change})
