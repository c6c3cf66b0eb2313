"""The contract of a loss, as checks that anybody can run on theirs.

    from siftclip.trainer import check_loss

    def test_my_loss():
        check_loss(lambda: MyLoss(gamma=2.0))

`CHECKS` holds the checks one by one, for `pytest.mark.parametrize`. Samples have the rows 0 to 63,
which a loss that keeps something for each row is built with: `selected_rows=np.arange(64)`.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.models.autocast import autocast
from siftclip.errors import InputError, require_choice
from siftclip.trainer.losses import ContrastiveLoss, LossInputs
from siftclip.trainer.losses.base import TeacherKind
from siftclip.trainer.optim.loss_ranks import check_on_ranks
from siftclip.trainer.optim.loss_samples import (
    SAMPLES,
    STEPS,
    assert_close,
    biases_of,
    inputs_with_copies,
    parts_of,
    synthetic_batch,
    synthetic_inputs,
    train_step,
)

LossFactory = Callable[[], ContrastiveLoss]
_RESERVED = ("loss", "caption_loss")  # names of terms that training adds
_BOOLEANS = ("takes_weights", "gives_sample_losses", "needs_logit_bias", "needs_captions")
_DIFFERENTIABLE = ("image_features", "text_features", "logit_scale", "logit_bias")


def check_declarations(make: LossFactory) -> None:
    """Check what the class declares, and that the loss has buffers alone, no parameters."""
    loss = make()
    assert isinstance(loss, ContrastiveLoss), "it must be a siftclip.trainer.ContrastiveLoss"
    assert make() is not loss, "each call must build another loss"
    for name in _BOOLEANS:
        assert isinstance(getattr(loss, name), bool), f"{name} must be True or False"
    try:
        require_choice("teacher", loss.teacher, get_args(TeacherKind))
    except InputError as error:
        raise AssertionError(str(error)) from None
    parameters = [name for name, _ in loss.named_parameters()]
    assert not parameters, f"no optimiser would train {parameters}: register them as buffers"


def check_terms(make: LossFactory) -> None:
    """Check that terms are finite scalars by name, with and without a bias, also with copies."""
    for inputs in _kinds_of_inputs(make()):
        terms = make()(inputs)
        assert isinstance(terms, dict), f"terms must be a dict. Got a {type(terms).__name__}"
        assert terms, "there must be at least one term"
        for name, value in terms.items():
            assert name not in _RESERVED, f"{name} is the name of a term that training adds"
            assert isinstance(value, Tensor), f"{name} must be a tensor"
            assert value.shape == (), f"{name} must be a scalar. Got the shape {list(value.shape)}"
            assert value.dtype == torch.float64, f"{name} of float64 features is {value.dtype}"
            assert bool(value.isfinite()), f"{name} must be finite. Got {float(value.detach())}"
        assert terms.keys() == make()(inputs).keys(), "each step must have the same terms"


def check_sample_losses(make: LossFactory) -> None:
    """Check that `sample_losses` is there if the class declares it, and only then."""
    loss = make()
    loss(synthetic_inputs(loss))
    losses = loss.sample_losses
    if not loss.gives_sample_losses:
        message = "sample_losses is set: declare gives_sample_losses = True, so that it is used"
        assert losses is None, message
        return
    assert losses is not None, "gives_sample_losses is declared, and sample_losses is None"
    assert losses.shape == (SAMPLES,), f"sample_losses must be [{SAMPLES}]: {list(losses.shape)}"
    assert not losses.requires_grad, "sample_losses must have no gradient: set losses.detach()"
    assert bool(losses.isfinite().all()), "sample_losses must be finite"
    assert bool((losses != losses[0]).any()), "sample_losses are the same for all samples"


def check_sample_order(make: LossFactory) -> None:
    """Check that the order of the samples in a batch changes nothing."""
    order = torch.from_numpy(np.random.default_rng(3).permutation(SAMPLES))
    for inputs in _kinds_of_inputs(make()):
        first, second = make(), make()
        terms, shuffled = first(inputs), second(_in_order(inputs, order))
        for name, value in terms.items():
            assert_close(shuffled[name], value, f"{name} changes with the order of the samples")
        if first.sample_losses is not None and second.sample_losses is not None:
            moved = first.sample_losses[order]
            assert_close(second.sample_losses, moved, "sample_losses do not follow the samples")


def check_copies(make: LossFactory) -> None:
    """Check that a sample is compared with none of its copies, where a batch may hold some.

    The similarities between copies, and those alone, are changed: that must change nothing.
    """
    way_out = "leave them out: PairedTerms.of does, and Copies.of(inputs).mask says which they are"
    for bias in biases_of(make()):
        first, second = make(), make()
        terms = first(inputs_with_copies(first, -0.4, bias=bias))
        for name, value in second(inputs_with_copies(second, 0.4, bias=bias)).items():
            message = f"{name} compares a sample with copies of itself: {way_out}"
            assert_close(value, terms[name], message)
        distinct = synthetic_inputs(make(), bias=bias)
        terms = make()(distinct)
        for name, value in make()(replace(distinct, copies=True)).items():
            message = f"{name} changes with copies=True where no sample has a copy"
            assert_close(value, terms[name], message)


def check_gradients(make: LossFactory) -> None:
    """Check gradients: there, finite in training, and in eval mode those of the value.

    Against finite differences along random directions, in float64.
    """
    for inputs in _kinds_of_inputs(make()):
        for name, gradient in _gradients(make(), inputs).items():
            assert bool(gradient.isfinite().all()), f"the gradient of {name} is not finite"
        loss = make().eval()
        for seed, (name, gradient) in enumerate(_gradients(loss, inputs).items()):
            generator = torch.Generator().manual_seed(seed)
            direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            assert_close(
                (gradient * direction).sum(),
                _difference(loss, inputs, name, direction),
                f"the gradient of {name} is not that of the value, by finite differences",
                rtol=1e-4,
            )


def check_weights(make: LossFactory) -> None:
    """Check that weights make the loss a weighted mean, or are refused if it takes none."""
    loss = make()
    inputs = synthetic_inputs(loss)
    if not loss.takes_weights:
        try:
            loss(replace(inputs, weights=torch.ones(SAMPLES)))
        except InputError:
            return
        raise AssertionError("takes_weights is False, and weights are not refused")

    def total(weights: Tensor | None) -> Tensor:
        return _total(make(), replace(inputs, weights=weights)).detach()

    generator = torch.Generator().manual_seed(4)
    ones = torch.ones(SAMPLES, dtype=torch.float64)
    first, second = torch.rand(2, SAMPLES, generator=generator, dtype=torch.float64)
    plain = total(None)
    assert_close(total(ones), plain, "equal weights must change nothing")
    assert not torch.isclose(total(first), plain, rtol=1e-6), "weights have no effect"
    # A weighted mean times the sum of its weights is linear in them.
    assert_close(
        total(first) * first.sum() + total(second) * second.sum(),
        total(first + second) * (first + second).sum(),
        "with weights the loss must be the sum of weight times loss over samples, divided by the "
        "sum of the weights (mean_over_ranks does it)",
    )


def check_precision(make: LossFactory) -> None:
    """Check that bfloat16 features and autocast lead to float32 terms of those very features."""
    inputs = _map_features(synthetic_inputs(make()), lambda values: values.to(torch.bfloat16))
    expected = make()(_map_features(inputs, lambda values: values.float()))
    with autocast(torch.device("cpu"), torch.bfloat16):
        inside = make()(inputs)
    for where, terms in (("with", make()(inputs)), ("under autocast, with", inside)):
        for name, value in terms.items():
            assert value.dtype == torch.float32, f"{name} is {value.dtype} {where} bfloat16"
            message = f"{name} {where} bfloat16 features is not computed in float32"
            assert_close(value, expected[name], message, rtol=1e-5)


def check_no_global_randomness(make: LossFactory) -> None:
    """Check that two fresh losses agree, and that neither draws from a global random state."""
    before = _global_states()
    inputs = synthetic_inputs(make())
    first = make()(inputs)
    for name, state in _global_states().items():
        assert state == before[name], f"the global random state of {name} was used"
    for name, value in make()(inputs).items():
        assert torch.equal(value, first[name]), f"{name} differs between two fresh losses"


def check_inputs_untouched(make: LossFactory) -> None:
    """Check that the inputs are not modified."""
    loss = make()
    inputs = synthetic_inputs(loss, weighted=loss.takes_weights)
    original = copy.deepcopy(inputs)
    loss(inputs)
    for field in fields(LossInputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Tensor):
            same = torch.equal(value, getattr(original, field.name))
            assert same, f"{field.name} was modified"


def check_state(make: LossFactory) -> None:
    """Check that a fresh loss that loads the state of another continues as that one does.

    Through a file that is read without running code, as checkpoints are.
    """
    loss, restored = make(), make()
    for step in range(STEPS):
        loss(synthetic_inputs(loss, step))
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    try:
        restored.load_state_dict(torch.load(file, weights_only=True))
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise AssertionError(f"the state cannot be loaded again: {error}") from error
    inputs = synthetic_inputs(loss, STEPS)
    expected = loss(inputs)
    for name, value in restored(inputs).items():
        message = f"{name} differs after a restart: what it depends on must be in buffers"
        assert_close(value, expected[name], message)


def check_micro_batches(make: LossFactory) -> None:
    """Check that micro-batches give the terms and gradients of the whole batch."""
    for bias in biases_of(make()):
        whole, cut = make(), {parts: make() for parts in (2, 4)}
        for step in range(STEPS):
            weighted, copies = whole.takes_weights, step > 0
            batch = synthetic_batch(whole, step, weighted=weighted, copies=copies)
            expected = train_step(whole, [batch], bias=bias)
            for parts, loss in cut.items():
                answer = train_step(loss, parts_of(batch, parts), bias=bias)
                for name, value in expected.shared.items():
                    message = f"{name} differs in {parts} micro-batches, step {step}"
                    assert_close(answer.shared[name], value, message)


def check_ranks(make: LossFactory) -> None:
    """Check that the mean over 2 and over 4 ranks is what one process computes.

    In processes of their own, to which the loss goes by pickle: its class must be in a module that
    Python can import.
    """
    check_on_ranks(make())


CHECKS: tuple[Callable[[LossFactory], None], ...] = (
    check_declarations,
    check_terms,
    check_sample_losses,
    check_sample_order,
    check_copies,
    check_gradients,
    check_weights,
    check_precision,
    check_no_global_randomness,
    check_inputs_untouched,
    check_state,
    check_micro_batches,
    check_ranks,
)


def check_loss(make: LossFactory, *, without: Mapping[str, str] | None = None) -> None:
    """Run every check. `make` builds a fresh loss at each call.

    Args:
        make: such as `lambda: MyLoss(gamma=2.0)`.
        without: reasons by names of checks that do not apply, such as
            `{"check_gradients": "the importance of a negative is detached, as in the paper"}`.

    Raises:
        AssertionError: names the check that failed and what is wrong.
        InputError: `without` names no check, or gives no reason.
    """
    without = {} if without is None else without
    names = tuple(check.__name__ for check in CHECKS)
    for name, reason in without.items():
        require_choice("without", name, names, owner=check_loss)
        if not reason:
            raise InputError(f"check_loss: without needs a reason for {name}. Got {reason!r}.")
    for check in CHECKS:
        if check.__name__ in without:
            continue
        try:
            check(make)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
        except Exception as error:  # a loss may fail in any way
            name = type(error).__name__
            raise AssertionError(f"{check.__name__}: {name}: {error}") from error


# ---- inputs -------------------------------------------------------------------------------------
def _kinds_of_inputs(loss: ContrastiveLoss) -> Iterator[LossInputs]:
    """Yield inputs of models with and without a bias, with copies, and with weights."""
    for bias in biases_of(loss):
        yield synthetic_inputs(loss, bias=bias)
    inputs = synthetic_inputs(loss, weighted=loss.takes_weights)
    rows = inputs.rows
    yield replace(inputs, copies=True, rows=None if rows is None else rows // 8)


def _in_order(inputs: LossInputs, order: Tensor) -> LossInputs:
    """Put the samples of all tensors in an order, int64 [b]."""
    changes: dict[str, Any] = {
        field.name: value[order]
        for field in fields(LossInputs)
        for value in [getattr(inputs, field.name)]
        if isinstance(value, Tensor) and value.ndim > 0
    }
    return replace(inputs, **changes)


def _map_features(inputs: LossInputs, change: Callable[[Tensor], Tensor]) -> LossInputs:
    """Change the features; scale and bias become float32, as those of a model are."""
    names = ("image_features", "text_features", "teacher_image", "teacher_text")
    scalars = ("logit_scale", "logit_bias")
    changes: dict[str, Any] = {
        name: value.float() if name in scalars else change(value)
        for name in (*names, *scalars)
        for value in [getattr(inputs, name)]
        if value is not None
    }
    return replace(inputs, **changes)


# ---- answers ------------------------------------------------------------------------------------
def _total(loss: ContrastiveLoss, inputs: LossInputs) -> Tensor:
    return torch.stack(list(loss(inputs).values())).sum()


def _gradients(loss: ContrastiveLoss, inputs: LossInputs) -> dict[str, Tensor]:
    """Return the gradients of features, scale and bias.

    Raises:
        AssertionError: one of them has none, for which distributed training would wait.
    """
    leaves: dict[str, Any] = {
        name: getattr(inputs, name).clone().requires_grad_()
        for name in _DIFFERENTIABLE
        if getattr(inputs, name) is not None
    }
    total = _total(loss, replace(inputs, **leaves))
    assert total.requires_grad, "the terms have no gradient: they must depend on the features"
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients: dict[str, Tensor] = {}
    for name, gradient in zip(leaves, found, strict=True):
        assert gradient is not None, (
            f"{name} gets no gradient, for which distributed training would wait: add 0 * {name}"
        )
        gradients[name] = gradient
    return gradients


def _difference(
    loss: ContrastiveLoss, inputs: LossInputs, name: str, direction: Tensor, step: float = 1e-5
) -> Tensor:
    """Compute the slope of the loss along a direction by central differences, a scalar."""
    ends: list[dict[str, Any]] = [
        {name: getattr(inputs, name) + sign * step * direction} for sign in (1, -1)
    ]
    with torch.no_grad():
        above, below = (_total(loss, replace(inputs, **end)) for end in ends)
    return (above - below) / (2 * step)


def _global_states() -> dict[str, bytes]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "random": pickle.dumps(random.getstate()),
    }
