"""Artifacts of a run in Weights & Biases: what it was made from, and what it has made.

    pool-F, features-F  ->  selection-F  ->  run  ->  model-RUN, evaluation-RUN

F is a fingerprint, so that runs of one pool or one selection share an artifact. Of a pool and of
features an artifact has a small record alone, never a sample: it is there for what follows from it.
Files go out with an online run, or with `wandb sync`. Large ones are not copied for that: a
selection of hundreds of millions of samples has gigabytes, and so has a large model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siftclip.trainer.runtime.tracking.wandb_runs import WandbRun

_NO_NAME = re.compile(r"[^\w.-]", re.ASCII)
_MOST_CHARACTERS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """One artifact."""

    kind: str  # wandb's type of it
    identity: str  # by which it is told from others of its kind
    record: Mapping[str, Any]  # what it is, of plain values
    files: Sequence[Path] = ()
    copies: bool = False  # files that may be written again; else they are sent from where they are
    sources: Sequence[Lineage] = field(default=())  # what it was made from

    @property
    def name(self) -> str:
        """Its name in a project."""
        return _NO_NAME.sub("-", f"{self.kind}-{self.identity}")[:_MOST_CHARACTERS]


def log_lineage(logger: WandbRun, *, inputs: Sequence[Lineage], outputs: Sequence[Lineage]) -> None:
    """Log artifacts that a run was made from, with their own sources, and that it has made.

    Args:
        logger: of the run.
        inputs: what the run reads.
        outputs: what it has written.
    """
    logged = set(logger.earlier_artifacts)
    for each in [*_with_sources(inputs), *outputs]:
        with logger.staging():
            artifact = _artifact(each)
            version = (each.name, artifact.digest)
            if version not in logged:
                logged.add(version)
                logger.log_artifact(artifact, is_input=each not in outputs)


def _with_sources(artifacts: Sequence[Lineage]) -> list[Lineage]:
    """List artifacts behind what they were made from."""
    return [one for each in artifacts for one in [*_with_sources(each.sources), each]]


def _artifact(lineage: Lineage) -> Any:
    from wandb import Artifact

    sources = [source.name for source in lineage.sources]
    metadata = {**lineage.record, "sources": sources}
    artifact = Artifact(name=lineage.name, type=lineage.kind, metadata=metadata)
    with artifact.new_file("lineage.json") as file:
        json.dump(metadata, file, indent=2, default=str)
    policy = "mutable" if lineage.copies else "immutable"
    for path in lineage.files:
        artifact.add_file(str(path.absolute()), name=path.name, policy=policy, skip_cache=True)
    return artifact
