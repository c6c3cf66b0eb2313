"""The recipe of Data Filtering Networks (arXiv 2309.17425) from the stages of any other run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig

from siftclip.datamodules.index.uids import format_uid
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.demo.pool import write_demo_data
from siftclip.trainer.stages.embed import embed_stage
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
QUIET = [
    "logger=csv",
    "progress=false",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
]
# 75 steps are enough for the filter to tell what a scene shows, and chance is 36 % clean samples.
FILTER = [
    "model=rn_tiny",
    "scale=tiny",
    "scale.samples_seen=4800",
    "scale.global_batch_size=64",
    "optim.lr=3e-3",
    "optim.warmup_steps=10",
]


@pytest.mark.slow
def test_a_filter_network_keeps_clean_samples(compose: Compose, tmp_path: Path) -> None:
    few = {"classification_samples": 10, "count_samples": 10, "retrieval_samples": 10}
    data = write_demo_data(
        tmp_path / "data", pool_samples=600, teacher_samples=400, progress=False, **few
    )
    common = [*QUIET, f"output_dir={tmp_path / 'outputs'}"]
    clean_set = [f"pool.root={data.teacher}", "selector=random", "selector.fraction=1"]
    filter_network = tmp_path / "filter"
    train_stage(compose("train", [*common, *FILTER, *clean_set, f"run_dir={filter_network}"]))
    pool = [*common, f"pool.root={data.pool}", "features.name=dfn"]
    embed_stage(compose("embed", [*pool, f"features.model.name={filter_network}"]))

    kinds = pd.read_parquet(data.truth).set_index("uid")["kind"]

    def clean_share(selector: str) -> float:
        options = [*pool, "features=open_clip", f"selector={selector}", "selector.fraction=0.2"]
        selection = select_stage(compose("select", options)).selection
        assert len(selection) == 120
        return float((kinds.loc[[format_uid(uid) for uid in selection.uids]] == "clean").mean())

    assert clean_share("clip_score") > clean_share("random") + 0.25
