"""What a run is known by: every option is part of it, or docs/reuse.md says why it is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import without_model

from siftclip.trainer.builders.models import batch_norm_identity
from siftclip.trainer.builders.objective import LossData
from siftclip.trainer.builders.selection import PoolSelection, select_stage
from siftclip.trainer.settings.describing.describe import all_options
from siftclip.trainer.stages.train import run_identity, train_stage

Compose = Callable[..., Any]

ROOT = Path(__file__).resolve().parents[3]
SECTION = (ROOT / "docs" / "reuse.md").read_text(encoding="utf-8")
SECTION = SECTION.partition("### Options that make no other run\n")[2].partition("\n**Models")[0]
LEFT_OUT = [
    option
    for line in SECTION.splitlines()
    if line.startswith("| `")
    for option in re.findall(r"`([^`]+)`", line.split("|")[1])
]
LOSSES = ["clip", "siglip", "coca", "distill", "drrho", "plugin"]
CADENCES = ["once", "every_step", "every_n_steps", "every_epoch"]
OF_LOSSES = {
    "distill": ["loss.teacher.features.name=noise"],
    "drrho": ["loss.teacher.features.name=noise"],
    "plugin": ["loss.plugin=some"],
}
NODES = ["+trainer.callbacks=[{_target_: a.B}]", "+trainer.plugins=[{_target_: a.B}]"]
OTHER_OPTIMIZER = ["+optim.timm={name: lion}"]
REDUCED = ["trainer.strategy=fsdp", "trainer.fsdp_reduce_dtype=bf16"]
REFERENCE = ["online.reference.features.name=noise"]


def paths(node: Any, prefix: str = "") -> Iterator[str]:
    """All dotted names in an identity."""
    for name, value in node.items() if isinstance(node, Mapping) else ():
        yield f"{prefix}{name}"
        yield from paths(value, f"{prefix}{name}.")


@pytest.fixture
def selected(base: list[str], compose: Compose) -> PoolSelection:
    return select_stage(compose("select", [*base, "selector=random", "selector.fraction=0.5"]))


@pytest.fixture
def identity_of(base: list[str], compose: Compose, selected: PoolSelection) -> Callable[..., Any]:
    nothing = LossData(references=None, weights=None, identity={})
    return lambda *options: run_identity(compose("train", [*base, *options]), selected, nothing)


def names_in(identity: Mapping[str, Any]) -> set[str]:
    """The options whose values an identity holds."""
    kept = ("precision", "fsdp_reduce_dtype", "callbacks", "plugins")
    of_trainer = {f"trainer.{name}" for name in kept}
    names = set(paths(identity))
    return names | {name for name in of_trainer if name.partition(".")[2] in names}


def test_every_option_is_known_or_has_a_reason_why_not(identity_of: Callable[..., Any]) -> None:
    known = names_in(identity_of(*NODES, *OTHER_OPTIMIZER, *REDUCED))
    for loss in LOSSES:
        known |= names_in(identity_of(f"loss={loss}", *OF_LOSSES.get(loss, [])))
    for cadence in CADENCES:
        more = REFERENCE if cadence != "once" else []
        known |= names_in(identity_of(f"online={cadence}", *more))
    options = [name for name, option in all_options().items() if "train" in option.commands]
    covered: dict[str, list[str]] = {entry: [] for entry in LEFT_OUT}
    for name in options:
        reasons = [entry for entry in LEFT_OUT if fnmatchcase(name, entry)]
        for entry in reasons:
            covered[entry].append(name)
        in_it = any(path in known for path in _parents(name))
        assert len(reasons) == (0 if in_it else 1), (name, reasons)
    assert "timm" not in identity_of()["optim"]  # so that runs of before keep theirs
    assert not [entry for entry, names in covered.items() if not names], "no such option"


def _parents(name: str) -> Iterator[str]:
    """An option, and what holds it below its group: open mappings are compared as a whole."""
    yield name
    while name.count(".") > 1:
        name = name.rpartition(".")[0]
        yield name


def test_micro_batches_make_another_run_with_batch_norms_alone(
    base: list[str], compose: Compose
) -> None:
    def run(model: str, *options: str) -> Path:
        few = ["scale.samples_seen=32", "selector=random", "selector.fraction=0.5"]
        return train_stage(compose("train", [*base, *few, f"model={model}", *options])).path

    micro = ["trainer.micro_batch_size=4"]
    assert run("rn_tiny") != run("rn_tiny", *micro)
    assert run("rn_tiny", *micro) != run("rn_tiny", "trainer.micro_batch_size=8")
    assert run("rn_tiny") == run("rn_tiny", "trainer.micro_batch_size=16")  # the whole batch
    assert run("vit_tiny") == run("vit_tiny", *micro)


SCORER = ["online=every_step", "selector@online.selector=easy_reference", *REFERENCE]
RN_SCORER = [*SCORER, "model=vit_tiny", "online.scorer.name=RN50"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["model=rn_tiny"], None),
        (["model=vit_tiny", "trainer.devices=2", "trainer.micro_batch_size=4"], None),
        (["model=rn_tiny", "trainer.micro_batch_size=4"], {"micro_batch_size": 4}),
        (["model=rn_tiny", "trainer.devices=2"], {"ranks": 2, "sync_batchnorm": False}),
        (["model=rn_tiny", "trainer.devices=2", "trainer.micro_batch_size=8"],
         {"ranks": 2, "sync_batchnorm": False}),
        (["model=rn_tiny", "trainer.devices=2", "trainer.sync_batchnorm=true"], None),
        (["model=rn_tiny", "trainer.devices=2", "trainer.sync_batchnorm=true",
          "trainer.micro_batch_size=4"],
         {"micro_batch_size": 4, "ranks": 2, "sync_batchnorm": True}),
        (["model=rn_tiny", "trainer.sync_batchnorm=true"], None),
        (["model=open_clip", "model.name=RN50", "trainer.grad_checkpointing=true"],
         {"grad_checkpointing": True}),
        ([*RN_SCORER, "trainer.grad_checkpointing=true"], None),
        ([*RN_SCORER, "trainer.devices=2", "trainer.sync_batchnorm=true"],
         {"ranks": 2, "sync_batchnorm": True}),
    ],
)  # fmt: skip
def test_what_batch_norms_depend_on(
    base: list[str], compose: Compose, options: list[str], wanted: dict[str, Any] | None
) -> None:
    found = batch_norm_identity(compose("train", [*without_model(base), *options]))
    assert found == ({} if wanted is None else {"batch_norms": wanted})


# ---- where a run is kept -------------------------------------------------------------------------
def test_the_folder_of_a_run_names_its_loss(base: list[str], compose: Compose) -> None:
    options = [*base, "selector=random", "selector.fraction=0.5", "scale.samples_seen=16"]
    options += ["optim.warmup_steps=0"]
    assert train_stage(compose("train", options)).path.name.startswith("random-s0-")
    named = train_stage(compose("train", [*options, "loss=siglip"])).path
    assert named.name.startswith("random+siglip-s0-")
    earlier = named.rename(named.with_name(named.name.replace("+siglip", "")))
    again = train_stage(compose("train", [*options, "loss=siglip"])).path
    assert again == earlier  # where an earlier version has put it
