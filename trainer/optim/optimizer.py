"""open_clip's recipe: AdamW, what is not decayed, layer decay, the clamp of the logit scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from siftclip.datamodules.models.typed import as_clip
from siftclip.errors import InputError
from siftclip.trainer.optim.layer_decay import layer_scales
from siftclip.trainer.optim.timm_optimizers import make_timm_optimizer, with_fallback
from siftclip.trainer.optim.update import local_parts
from siftclip.trainer.settings.optim import OptimSettings

MAX_LOGIT_SCALE = math.log(100)


def is_decayed(model: nn.Module, config: OptimSettings) -> dict[str, bool]:
    """Return which parameters weight decay applies to, by name.

    Not decayed are parameters with fewer than two dimensions and
        open_clip_3: names that contain `bn`, `ln`, `bias` or `logit_scale`. Position embeddings
            are decayed. This is the rule behind DataComp's numbers.
        open_clip_4: names that the model or one of its modules declares (`no_weight_decay`, with
            timm's and open_clip 4's variants), which spares position embeddings.
    and what `no_decay` names: shell patterns of full names, as open_clip 4's --wd-exclude.

    The first rule reads names, so give it the bare open_clip model: a prefix such as `mlnet.`
    would exempt everything.

    Source: open_clip 3.3 `open_clip_train/main.py`; open_clip 4 `open_clip_train/optim.py`.

    Raises:
        InputError: a pattern matches no parameter.
    """
    parameters = dict(model.named_parameters())
    for pattern in config.no_decay:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise InputError(
                f"optim.no_decay: no parameter of the model matches {pattern!r}. Patterns cover "
                f"the whole name; names are such as {list(parameters)[:3]}."
            )
    if config.decay_rule == "open_clip_3":
        declared: list[str] = [f"*{word}*" for word in ("bn", "ln", "bias", "logit_scale")]
    else:
        declared = list(_declared_patterns(model))
    spared = (*declared, *config.no_decay)
    return {
        name: parameter.ndim >= 2 and not any(fnmatchcase(name, pattern) for pattern in spared)
        for name, parameter in parameters.items()
    }


def _declared_patterns(model: nn.Module) -> Iterator[str]:
    # Every module is asked, since wrappers do not always hand on what their children declare.
    # Exact names come first; keywords are timm's older way, and mean the end of a name.
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for method, start in (
            ("no_weight_decay", ""),
            ("no_weight_decay_patterns", ""),
            ("no_weight_decay_keywords", "*"),
        ):
            declare = getattr(module, method, None)
            if callable(declare):
                yield from (f"{prefix}{start}{name}" for name in declare())


def parameter_groups(model: nn.Module, config: OptimSettings) -> list[dict[str, Any]]:
    """Group trainable parameters with equal learning rate and weight decay.

    Without layer decay these are open_clip's two, first the one without weight decay. With it,
    groups are ordered by learning rate, highest first, and within a rate as before. A schedule
    multiplies the `lr` of each group.

    Raises:
        InputError: see `is_decayed` and `layer_scales`; or no parameter is trainable.
    """
    decayed = is_decayed(model, config)
    scales = layer_scales(
        model,
        image_layer_decay=config.image_layer_decay,
        text_layer_decay=config.text_layer_decay,
    )
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((-scales[name], decayed[name]), []).append(parameter)
    if not groups:
        raise InputError("optim: no parameter of the model is trainable. Unlock a tower.")
    return [
        {
            "params": groups[key],
            "lr": config.lr * -key[0],
            "weight_decay": config.weight_decay if key[1] else 0.0,
        }
        for key in sorted(groups)
    ]


class _AdamW(torch.optim.AdamW):
    """AdamW whose kernel gets the rank's own part of what is sharded.

    So that sharded and whole weights can share a group, and that `found_inf` needs no rules of
    DTensor. The state stays sharded as the weights are.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = local_parts(tensors)
        return has_complex


def make_optimizer(
    model: nn.Module, config: OptimSettings, *, fused: bool
) -> torch.optim.Optimizer:
    """Build AdamW over `parameter_groups`, or the optimizer of timm that is asked for.

    Args:
        model: the bare open_clip model.
        config: the settings.
        fused: one kernel for all of a step. On a CPU it takes 3 ms where torch's default takes
            22 (4 million parameters, 2 cores). Lightning cannot clip gradients under fp16 with it.
            Those of timm have none.

    Raises:
        InputError: as `parameter_groups`, and `make_timm_optimizer`.
    """
    groups, betas = parameter_groups(model, config), (config.beta1, config.beta2)
    if config.timm is None:
        return _AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    return make_timm_optimizer(
        with_fallback(groups, model, config.timm),
        config.timm,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=betas,
        eps=config.eps,
    )


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep exp(logit_scale) in [1, 100], as open_clip does after every optimiser step."""
    with torch.no_grad():
        as_clip(model).logit_scale.clamp_(0, MAX_LOGIT_SCALE)
