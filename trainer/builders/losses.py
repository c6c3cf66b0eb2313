"""The loss of the settings: its class, what the settings and a model must be for it, its object."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from siftclip.datamodules.identity.code_identity import code_identity
from siftclip.datamodules.identity.identities import named_files
from siftclip.errors import InputError, ParameterError, full_name_of
from siftclip.plugins import check_numbers
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.description import Behind, describe
from siftclip.trainer.losses import ContrastiveLoss, LossRun
from siftclip.trainer.losses.table import BUILT_IN, PLUGINS
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.loss import LossSettings, ObjectLoss, PluginLoss

_OURS = "siftclip"
# What a value of the wrong kind raises; others may be due to the sizes here, which no run has.
_OF_WRONG_VALUES = (TypeError, AttributeError, NameError, ArithmeticError)


def loss_class(loss: LossSettings) -> type[ContrastiveLoss]:
    """Return the class that settings name.

    Raises:
        InputError: it is a plug-in that is not installed, or no loss.
    """
    if isinstance(loss, ObjectLoss):
        if not isinstance(loss.loss, ContrastiveLoss):
            raise InputError(
                f"{loss.title} must be a siftclip.trainer.ContrastiveLoss. Got {loss.loss!r}."
            )
        return type(loss.loss)
    if not isinstance(loss, PluginLoss):
        return BUILT_IN[loss.name]
    with options_of(under("loss", "plugin")):
        return PLUGINS.load_class(loss.plugin)


def check_loss_options(loss: LossSettings) -> None:
    """Check the options of a third party's loss before any file is read.

    Those of the built-in losses are checked where they are read.

    Raises:
        InputError: it does not take its parameters, its teacher or the weights.
    """
    if not isinstance(loss, PluginLoss):
        return
    kind = loss_class(loss)
    loss.check_teacher(kind.teacher)
    if loss.sample_weights is not None and not kind.takes_weights:
        raise InputError(
            f"{loss.title} takes no weights of samples. Leave loss.weights.path out, or train with "
            f"{_those_that('takes_weights')}. Got {loss.weights.path!r}."
        )
    if not isinstance(loss, ObjectLoss):  # which may know the rows of its run alone
        _try_out(loss)


def _try_out(loss: PluginLoss) -> None:
    """Build a loss, and compute it once of a few random features, as the first step of a run will.

    Raises:
        InputError: its class does not take the parameters, or fails as with one of a wrong kind.
    """
    from siftclip.trainer.optim.loss_samples import ROWS, synthetic_inputs  # only where needed

    built = loss_from(loss, LossRun(selected_rows=np.arange(ROWS), teacher_logit_scale=1.0))
    weighted, bias = loss.sample_weights is not None, built.needs_logit_bias
    inputs = synthetic_inputs(built, weighted=weighted, bias=bias)
    image, text = inputs.image_features.float(), inputs.text_features.float()
    try:
        with torch.random.fork_rng(devices=[]):
            built(replace(inputs, image_features=image, text_features=text))
    except _OF_WRONG_VALUES as error:
        raise InputError(
            f"{loss.title}: {full_name_of(type(built))} fails with loss.parameters="
            f"{dict(loss.parameters)}: {type(error).__name__}: {error}."
        ) from error
    except Exception:
        return  # it may be the sizes: if it is not, the first step tells


def check_weighing(loss: LossSettings, selector: Selector, option: str) -> None:
    """Check that the loss can use the weights of a selector, if this one weighs samples.

    Args:
        loss: of the run.
        selector: of the option.
        option: such as "online.selector=infobatch", for the message.

    Raises:
        InputError: it cannot.
    """
    if selector.weighs and not loss_class(loss).takes_weights:
        raise InputError(
            f"{option} weighs the samples that it keeps, and {loss.title} cannot use "
            "weights: its pairs belong to two samples each. Without them the selection would be "
            f"biased. Use {_those_that('takes_weights')}, or a selector that does not weigh."
        )


def check_gives_sample_losses(loss: LossSettings, option: str) -> None:
    """Check that the loss says what each sample costs, for a selector that reads it.

    Raises:
        InputError: it does not.
    """
    if not loss_class(loss).gives_sample_losses:
        raise InputError(
            f"{option} needs the loss of each sample, which {loss.title} does not tell. "
            f"Use {_those_that('gives_sample_losses')}."
        )


def _those_that(declaration: str) -> str:
    """Name the built-in losses that declare something: "one of loss=clip,coca"."""
    return (
        f"one of loss={','.join(n for n, kind in BUILT_IN.items() if getattr(kind, declaration))}"
    )


def loss_from(loss: LossSettings, run: LossRun) -> ContrastiveLoss:
    """Build the loss of a run.

    Raises:
        InputError: its class does not take the parameters.
    """
    kind = loss_class(loss)
    if isinstance(loss, ObjectLoss):
        given: ContrastiveLoss = copy.deepcopy(loss.loss)
        return given
    try:
        check_numbers(kind, loss.arguments)
        built: Any = kind.for_run(run, loss.arguments)
    except ParameterError as error:
        subject = loss.title if error.parameter is None else loss.option_of(error.parameter)
        raise InputError(error.told_as(subject)) from error
    except InputError:
        raise
    except Exception as error:  # a class of somebody else may fail in any way
        raise InputError(
            f"{loss.title}: {full_name_of(kind)} cannot be built: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(built, ContrastiveLoss):
        raise InputError(
            f"{loss.title}: {kind.__name__}.for_run must return a loss. "
            f"Got a {type(built).__name__}."
        )
    return built


def check_model(built: ContrastiveLoss, model: nn.Module, title: str) -> None:
    """Check that a loss can train an open_clip model.

    Raises:
        InputError: it cannot; `title` names the loss.
    """
    try:
        built.check(model)
    except ParameterError as error:
        raise InputError(error.told_as(title)) from error


def known_options(loss: LossSettings) -> dict[str, Any]:
    """Return the options of a loss by which a run is known.

    A parameter of a plug-in that is given its own default makes no other run than one that is left
    out: the code of the class, which says the default, counts as well.
    """
    options: dict[str, Any] = to_plain(loss)
    if type(loss) is not PluginLoss or not loss.parameters:
        return options
    kind: Any = loss_class(loss)
    if kind.for_run.__func__ is not ContrastiveLoss.for_run.__func__:  # type: ignore[attr-defined]
        return options  # its parameters are not those of the constructor
    known = inspect.signature(kind).parameters
    options["parameters"] = {
        name: value
        for name, value in options["parameters"].items()
        if name not in known or not _same(value, known[name].default)
    }
    return options


def _same(value: Any, default: Any) -> bool:
    plain = type(value) is type(default) or {type(value), type(default)} == {int, float}
    return plain and bool(value == default)


def loss_identity(loss: LossSettings) -> dict[str, Any]:
    """Return what stands for the code of a third party's loss, and for files that it is given.

    The built-in losses have the version of siftclip: of them there is nothing.
    """
    kind = loss_class(loss)
    if _is_ours(kind.__module__):
        return {}
    behind = Behind()
    if isinstance(loss, ObjectLoss):
        loss.loss.description(behind)
    else:
        describe({"class": kind, "parameters": loss.arguments}, behind)
    code = code_identity(behind.code).items()
    return {
        "code": {name: digest for name, digest in code if not _is_ours(name)},
        "files": named_files(behind.texts),
    }


def _is_ours(name: str) -> bool:
    """Return whether a module is siftclip's."""
    return name.partition(".")[0] == _OURS
