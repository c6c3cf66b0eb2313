"""Which arguments of Lightning's Trainer pass through, and why the others do not.

What passes changes how a run computes, not what: it is no part of a run's identity.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from siftclip.trainer.settings.fields.rules import Fault, joined, near

_OPTION = "has an option: "
_BUDGET = "The budget says how long a run is: use "
_ORDER = "The order of samples is a function of seed and step, and a run resumes by it"
_GRADIENTS = "Gradients are of whole batches, whose samples are each other's negatives: use "
_NO_LOOP = "would have no effect: evaluation is no loop of Lightning. Use "

_OF_THE_SAME_NAME = (
    *(
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "precision",
        "sync_batchnorm",
        "deterministic",
    ),
    *("callbacks", "plugins", "profiler", "log_every_n_steps"),
)
_OF_EVALUATION = (
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "inference_mode"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
)

# By names of arguments: why they are refused, and what to use instead.
REFUSED: Mapping[str, str] = {
    **{name: f"{_OPTION}trainer.{name}." for name in _OF_THE_SAME_NAME},
    **dict.fromkeys(_OF_EVALUATION, f"{_NO_LOOP}eval.during."),
    "logger": f"{_OPTION}trainer.loggers, beside those of the group logger.",
    "enable_progress_bar": f"{_OPTION}progress.",
    "default_root_dir": f"{_OPTION}run_dir, or output_dir for all runs.",
    "max_steps": f"{_BUDGET}scale.samples_seen.",
    "max_epochs": f"{_BUDGET}scale.samples_seen.",
    "min_steps": f"{_BUDGET}scale.samples_seen.",
    "min_epochs": f"{_BUDGET}scale.samples_seen.",
    "max_time": f"{_BUDGET}budget.seconds.",
    "fast_dev_run": f"{_BUDGET}a small scale.samples_seen; plan=true forecasts a run.",
    "limit_train_batches": f"{_BUDGET}scale.samples_seen.",
    "overfit_batches": f"{_ORDER}. Use a selector that keeps few samples.",
    "use_distributed_sampler": f"{_ORDER}, on any number of ranks. Leave it out.",
    "reload_dataloaders_every_n_epochs": f"{_ORDER}. Use online=every_epoch to select anew.",
    "accumulate_grad_batches": f"{_GRADIENTS}trainer.micro_batch_size.",
    "gradient_clip_val": f"{_GRADIENTS}optim.grad_clip_norm.",
    "gradient_clip_algorithm": f"{_GRADIENTS}optim.grad_clip_norm.",
    "enable_checkpointing": (
        "A run resumes from its checkpoints: use trainer.checkpoint_every_n_steps to write fewer."
    ),
    "barebones": "A run has loggers and checkpoints, which barebones forbids. Leave it out.",
    "enable_autolog_hparams": "would have no effect: a run's config.yaml has all options.",
    "model_registry": "would have no effect: checkpoints are in the run's directory. Leave it out.",
}


def option_faults(options: Mapping[str, object], parent: str) -> Iterator[Fault]:
    """Yield what is wrong with the names of arguments for Lightning's Trainer."""
    known = _arguments() if set(options) - REFUSED.keys() else ()  # its import takes seconds
    for name in options:
        option = joined(parent, name)
        if name in REFUSED:
            yield Fault(option, f"is refused. {_sentence(name)}")
        elif name not in known:
            passing = [argument for argument in known if argument not in REFUSED]
            close = near(name, known)
            way_out = f"Did you mean {joined(parent, close)}?" if close else ""
            way_out = way_out or f"What passes is {', '.join(passing)}."
            yield Fault(option, f"is no argument of lightning.Trainer. {way_out}")


def _sentence(name: str) -> str:
    reason = REFUSED[name]
    return reason if reason[0].isupper() else f"It {reason}"


def _arguments() -> tuple[str, ...]:
    from lightning import Trainer

    return tuple(inspect.signature(Trainer).parameters)
