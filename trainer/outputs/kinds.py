"""Which files Siftclip writes into the folder of outputs; all others are somebody else's."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from siftclip.locks import LOCK_NAME

KindName: TypeAlias = Literal[
    "runs", "selections", "scores", "features", "targets", "subsets", "reports", "results", "copies"
]

# Patterns of paths in an entry: * stands for anything but a slash, ** for anything
_SELECTION = ("selection.npy", "selection.json", "weights.npy", "scores.npy")
_DETAILS = ("*_predictions.parquet", "*_classes.csv", "*_confusion.csv")
_RESULTS = (
    *("eval_results.jsonl", "eval_results.csv", "eval_results_model.json"),
    "eval_results_outcomes/*.npz",
    *(f"eval_results_details/{name}" for name in _DETAILS),
)
_MODEL = (
    *("open_clip_config.json", "open_clip_model.safetensors"),
    # tokenizers of Hugging Face
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template*"),
)
_RUN = (
    *("summary.json", "config.yaml", "identity.json", "identity", "budget.json", "model.json"),
    *("versions.json", "sessions.jsonl", "metrics.jsonl", "metrics.csv", "chosen.npy", "wandb_id"),
    *("mlflow_id", "tensorboard/**", "profile/trace.json.gz", "profile/operators.txt"),
    *_SELECTION,
    *("checkpoints/step-*.ckpt/rest.ckpt", "checkpoints/step-*.ckpt/rank-*.ckpt"),
    *("checkpoints/step-*.ckpt", "selections/v*/*.npy", "selections/v*/*.json"),
    *("selections/v*/features/*.npz", "wandb/**"),
    *(f"model/{name}" for name in _MODEL),
    *_RESULTS,
    *(f"eval/*/{name}" for name in _RESULTS),
    *("eval_watch*/step-*.jsonl", "eval_watch*/step-*.csv", "eval_watch*/step-*_model.json"),
    *(f"eval_watch*/step-*_details/{name}" for name in _DETAILS),
    *("eval_watch*/step-*_outcomes/*.npz", "eval_watch*/wandb/**", "eval_watch*/wandb_id"),
    *("eval_watch*/metrics.jsonl", "eval_watch*/metrics.csv"),
)
# Links that wandb makes beside its files
_LINKS = re.compile(r"(.*/)?wandb/(latest-run|(.*/)?debug[^/]*\.log)")
_DAMAGED = re.compile(r"(?P<name>.+)\.damaged(-\d+)?")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}-\d+\.tmp")
_LOCK = re.compile(rf"(.*/)?({re.escape(LOCK_NAME)}|\.[^/]+\.lock)")
_REPLACED = re.compile(r".+\.replaced-\d{8}-\d{6}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of what commands leave behind: each entry is a folder."""

    name: KindName
    patterns: tuple[str, ...]  # of its files
    first: tuple[str, ...] = ()  # deleted first: without these it counts as none
    last: tuple[str, ...] = ()  # deleted last: by these it is known

    def has(self, path: str) -> bool:
        """Return whether Siftclip writes a file of this path in an entry, or leaves it behind."""
        return any(pattern.fullmatch(path) for pattern in _compiled(self.patterns)) or bool(
            _LOCK.fullmatch(path)
        )

    def may_be_link(self, path: str) -> bool:
        """Return whether a link of this path is one that a library of ours makes."""
        return self.has(path) and _LINKS.fullmatch(path) is not None


KINDS: Mapping[KindName, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="runs",
            patterns=_RUN,
            first=("summary.json",),
            last=("identity.json", "identity", "config.yaml"),
        ),
        Kind(name="selections", patterns=_SELECTION, first=("selection.json",)),
        Kind(name="scores", patterns=("identity.json", "*.npz"), last=("identity.json",)),
        Kind(name="features", patterns=("features.json", "*.npz"), last=("features.json",)),
        Kind(name="targets", patterns=("*.npz",)),
        Kind(
            name="subsets",
            patterns=(*_SELECTION, "tars.json"),
            first=("selection.json",),
        ),
        Kind(
            name="reports",
            patterns=(
                *("report*.*", "results*.*", "comparison*.*", "differences.*", "tables/*.*"),
                *("runs/*.json", "logs/*.log", "wandb/**", "wandb_id"),
            ),
        ),
        Kind(name="results", patterns=_RESULTS),
        Kind(
            name="copies",
            patterns=("shards/*.tar", "selection.npy", "weights.npy", "compact.json"),
            last=("compact.json",),
        ),
    )
}
# What the folders at the top hold
BY_FOLDER: Mapping[str, KindName] = {
    "train": "runs",
    "selections": "selections",
    "scores": "scores",
    "targets": "targets",
    "subsets": "subsets",
    "compare": "reports",
    "eval": "results",
}
NESTED = "reproduced"  # a folder of outputs inside another one, see `stages.reproduce`
_RUN_MARKS = {
    *("identity.json", "identity", "budget.json", "versions.json", "summary.json"),
    *("selection.json", "metrics.jsonl"),
}


def kind_of(place: str, names: Collection[str]) -> Kind | None:
    """Find the kind of a folder; None: it is none, though others may be below it.

    Args:
        place: its path in the folder of outputs.
        names: of what is in it.
    """
    parent = re.sub(rf"^(?:{NESTED}/)+", "", place).rpartition("/")[0]
    if parent in BY_FOLDER:
        return KINDS[BY_FOLDER[parent]]
    if "config.yaml" in names and (
        not _RUN_MARKS.isdisjoint(names) or {*names} <= {"config.yaml", LOCK_NAME}
    ):
        return KINDS["runs"]
    if "features.json" in names:
        return KINDS["features"]
    return KINDS["copies"] if "compact.json" in names else None


def plain_name(path: str) -> tuple[str, Literal["", "damaged", "temporary"]]:
    """Return the path that a file was to have, and why it has another one, if it has.

    A folder that was set aside stands for all that is in it.

    Example:
        >>> from siftclip.trainer.outputs.kinds import plain_name
        >>> plain_name("checkpoints/step-3.ckpt.damaged")
        ('checkpoints/step-3.ckpt', 'damaged')
        >>> plain_name("checkpoints/.step-3.ckpt.0a1b2c3d-7.tmp")
        ('checkpoints/step-3.ckpt', 'temporary')
        >>> plain_name("model.damaged/open_clip_config.json")
        ('model/open_clip_config.json', 'damaged')
    """
    parts = path.split("/")
    state: Literal["", "damaged", "temporary"] = ""
    for number, part in enumerate(parts):
        if match := _TEMPORARY.fullmatch(part):
            parts[number], state = match["name"], "temporary"
        elif match := _DAMAGED.fullmatch(part):
            parts[number], state = match["name"], state or "damaged"
    return "/".join(parts), state


def is_replaced(place: str) -> bool:
    """Return whether a run was set aside by one that began anew."""
    return _REPLACED.fullmatch(place.rpartition("/")[2]) is not None


@functools.cache
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(_expression(pattern)) for pattern in patterns)


def _expression(pattern: str) -> str:
    words = {"**": ".+", "*": "[^/]*"}
    parts = re.split(r"(\*\*|\*)", pattern)
    return "".join(words.get(part, re.escape(part)) for part in parts)
