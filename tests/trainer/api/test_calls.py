"""The functions' arguments: selections of arrays, selectors in the loop, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import CPU, QUICK, TRAINING, VIT_TINY

import siftclip
from siftclip.errors import InputError
from siftclip.selectors import (
    JEST,
    Choice,
    Chunk,
    ClipScore,
    FeatureFile,
    ModelFeatures,
    NegCLIPLoss,
    NormSim,
    Requirements,
    ScoreSelector,
    Selector,
    Source,
    Then,
    Uniform,
    VasD,
)
from siftclip.trainer import LossInputs, SoftmaxLoss
from siftclip.trainer.api.nodes import node_of_selector, selector_name
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.settings.given import given_group
from siftclip.trainer.settings.loss import LossSettings, SigLipLoss
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.online import EveryNStepsSettings, EveryStepSettings, OnlineSettings
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.stages.train import train_stage


@pytest.fixture(scope="module")
def pool(demo_data: DemoData) -> siftclip.Pool:
    return siftclip.Pool(demo_data.pool, cache_dir=demo_data.root / "cache", progress=False)


@pytest.fixture(scope="module")
def features(pool: siftclip.Pool, demo_data: DemoData) -> siftclip.Features:
    named = {"name": "noise", "model": None, "root": str(demo_data.root / "features")}
    settings = given_group(siftclip.trainer.FeaturesSettings, "features", named)
    return siftclip.Features(pool=pool, settings=settings, folder=demo_data.root / "features")


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


PAIRS = tuple(unit(np.random.default_rng(seed).standard_normal((50, 8))) for seed in (0, 1))


class FirstTwice(Selector):
    """Keeps the first sample twice, and the second once."""

    def select(self, source: Source) -> Choice:
        kept = np.zeros(len(source), dtype=np.int64)
        kept[:2] = 2, 1
        return Choice(multiplicities=kept)


# ---- arrays ------------------------------------------------------------------------------------
def test_a_selection_of_arrays(tmp_path: Path) -> None:
    selection = siftclip.select(features=PAIRS, selector=ClipScore(fraction=0.3))
    cosines = (PAIRS[0] * PAIRS[1]).sum(1)
    assert set(selection.rows) == set(np.argsort(-cosines)[:15])
    assert selection.scores is not None
    np.testing.assert_allclose(selection.scores, cosines[selection.rows], atol=1e-6)
    assert selection.ids[0] == f"{selection.rows[0]:032x}"
    assert selection.frame["score"].min() >= np.sort(cosines)[-15] - 1e-6
    subset = np.load(selection.to_datacomp(tmp_path / "subset.npy"))
    assert subset["f1"].tolist() == selection.rows.tolist()
    assert repr(selection) == "SelectedSamples(clip_score: 15 samples)"


def test_sets_copies_and_files_of_arrays(tmp_path: Path) -> None:
    assert len(siftclip.select(features=PAIRS[0], selector=VasD(fraction=0.5, steps=3))) == 25
    twice = siftclip.select(features=PAIRS, selector=FirstTwice())
    assert twice.rows.tolist() == [0, 0, 1]
    assert twice.multiplicities.tolist() == [2, 1]
    assert repr(twice) == "SelectedSamples(firsttwice: 3 samples, 2 distinct)"
    np.save(tmp_path / "target.npy", PAIRS[1])
    target = FeatureFile(path=str(tmp_path / "target.npy"))
    kept = siftclip.select(features=PAIRS[0], selector=NormSim(target=target, p=2, fraction=0.2))
    expected = ((PAIRS[0] @ PAIRS[1].T) ** 2).sum(1)
    assert set(kept.rows) == set(np.argsort(-expected)[:10])


def test_uids_of_arrays_are_those_that_are_given() -> None:
    uids = np.random.default_rng(3).integers(0, 2**62, (50, 2)).astype(np.uint64)
    selection = siftclip.select(
        features=tuple(map(torch.from_numpy, PAIRS)), selector=ClipScore(fraction=0.3), uids=uids
    )
    by_id = {f"{int(high):016x}{int(low):016x}": row for row, (high, low) in enumerate(uids)}
    assert {by_id[name] for name in selection.ids} == set(selection.rows.tolist())


# ---- pools -------------------------------------------------------------------------------------
def test_features_of_a_pool_as_arrays(features: siftclip.Features, demo_data: DemoData) -> None:
    images, texts = features.arrays()
    with np.load(demo_data.root / "features" / "part.npz") as stored:
        assert np.array_equal(images, stored["noise_img"])
        assert np.array_equal(texts, stored["noise_txt"])
    assert repr(features).startswith("Features('noise' of 240 samples, in ")


def test_a_pool_and_its_arrays_give_the_same(
    pool: siftclip.Pool, features: siftclip.Features, tmp_path: Path
) -> None:
    outputs: dict[str, Any] = {"output_dir": tmp_path, "progress": False}
    of_pool = siftclip.select(pool, features, ClipScore(fraction=0.25), **outputs)
    of_arrays = siftclip.select(
        features=features.arrays(), selector=ClipScore(fraction=0.25), uids=pool.uids
    )
    assert np.array_equal(of_pool.ids, of_arrays.ids)
    assert np.array_equal(of_pool.rows, of_arrays.rows)
    scores = siftclip.score(pool, features, ClipScore(fraction=0.25), **outputs)
    assert np.array_equal(scores, ClipScore(fraction=1.0).scores(*features.arrays()))
    again = siftclip.select(pool, features, ClipScore(fraction=0.25), **outputs)
    assert again.folder == of_pool.folder
    assert np.array_equal(again.scores, of_pool.scores)
    assert len(siftclip.select(features=features, selector=Uniform(fraction=0.5), **outputs)) == 120


class CaptionLength(ScoreSelector):
    """A selector of a notebook: no module has it."""

    @property
    def requires(self) -> Requirements:
        return Requirements(captions=True)

    def score(self, chunk: Chunk) -> torch.Tensor:
        return torch.tensor([float(len(caption)) for caption in chunk.captions or []])


def test_a_class_of_the_script_trains(pool: siftclip.Pool, tmp_path: Path) -> None:
    selection = siftclip.select(
        pool, None, CaptionLength(fraction=0.5), output_dir=tmp_path, progress=False
    )
    run = siftclip.train(selection, VIT_TINY, trainer=CPU, **TRAINING)
    assert run.path.name.startswith("captionlength-s0-")
    config = (run.path / "config.yaml").read_text()
    assert f"_target_: {__name__}.CaptionLength" in config
    assert run.summary is not None
    assert run.summary["selected_samples"] == 120


class HalvedLoss(SoftmaxLoss):
    """Half of CLIP's loss."""

    def terms(self, inputs: LossInputs) -> dict[str, torch.Tensor]:
        return {name: term / 2 for name, term in super().terms(inputs).items()}


def test_a_loss_of_the_script_trains(pool: siftclip.Pool, tmp_path: Path) -> None:
    selection = siftclip.select(
        pool, None, Uniform(fraction=1.0), output_dir=tmp_path, progress=False
    )
    runs = [
        siftclip.train(selection, VIT_TINY, trainer=CPU, loss=loss, **TRAINING)
        for loss in (HalvedLoss(), SoftmaxLoss(), "clip")
    ]
    firsts = [run.records()[0]["train/contrastive_loss"] for run in runs]
    assert firsts[0] == pytest.approx(firsts[1] / 2)
    assert firsts[1] == firsts[2]
    assert len({run.path for run in runs}) == 3  # an object is known by its code


def test_selection_in_the_loop_is_that_of_the_command(
    pool: siftclip.Pool,
    features: siftclip.Features,
    base: list[str],
    compose: Callable[..., Any],
    tmp_path: Path,
) -> None:
    selection = siftclip.select(
        pool, features, Uniform(fraction=1.0), output_dir=tmp_path / "python", progress=False
    )
    jest = JEST(
        learner=ModelFeatures(name="learner"),
        reference=ModelFeatures(name="reference"),
        loss="softmax",
        chunks=2,
        fraction=0.5,
    )
    online = {"cadence": "every_step", "selector": jest}
    run = siftclip.train(selection, VIT_TINY, online=online, trainer=CPU, **TRAINING)
    words = ["online=every_step", "online.selector.chunks=2", "online.selector.fraction=0.5"]
    theirs = train_stage(
        compose("train", [*base, *words, "selector=random", "selector.fraction=1", "optim.lr=2e-3"])
    )
    losses = [[record.get("train/loss") for record in each.records()] for each in (run, theirs)]
    assert losses[0] == losses[1]
    identities = [json.dumps(each.identity(), sort_keys=True) for each in (run, theirs)]
    assert run.path.name.startswith("random+jest-s0-")
    assert identities[0] == identities[1]


def test_a_plan_and_a_recipe(pool: siftclip.Pool, tmp_path: Path) -> None:
    selection = siftclip.select(
        pool, None, Uniform(fraction=1.0), output_dir=tmp_path, progress=False
    )
    forecast = siftclip.plan(selection, VIT_TINY, trainer=CPU, **TRAINING)
    assert "FLOPs" in forecast.table()
    settings = siftclip.trainer.api.training.train_settings(
        selection.settings,
        None,
        None,
        samples_seen=None,
        global_batch_size=None,
        others={"scale": "datacomp_medium"},
    )
    assert settings.model.name == "ViT-B-32"
    assert settings.scale.samples_seen == 128_000_000
    assert settings.scale.global_batch_size == 4096


def test_a_model_in_memory_is_evaluated(
    demo_data: DemoData, model_folder: Path, tmp_path: Path
) -> None:
    clip = siftclip.datamodules.load_clip_model(str(model_folder))
    options: dict[str, Any] = {"trainer": CPU, "evaluation": {"resamples": 0}, **QUICK}
    in_memory = siftclip.evaluate(clip, demo_data.tasks, names=["digit"], **options)
    of_folder = siftclip.evaluate(
        model_folder, demo_data.tasks, names=["digit"], output_dir=tmp_path, **options
    )
    assert in_memory.results[0].metrics == of_folder.results[0].metrics
    with pytest.raises(InputError, match="none of the 4 tasks of eval=fast"):
        siftclip.evaluate(clip, demo_data.tasks, suite="fast", **options)


# ---- what is refused ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "train: samples_seen must be given, or budget, or scale"),
        ({"samples_seen": 96, "lr": 1e-3}, r'lr is not .* option of optim: optim=\{"lr": \.\.\.\}'),
        ({"samples_seen": 96, "batch_size": 8}, "Did you mean global_batch_size"),
        ({"scale": "tinny"}, r"scale must be one of .*Got 'tinny'\. Did you mean tiny"),
        ({"samples_seen": 96, "optims": {}}, "Did you mean optim"),
        ({"samples_seen": 96, "optim": {"lrr": 1}}, "optim.lrr is not an option. Did you mean"),
        ({"samples_seen": 96, "optim": "sgd"}, r"optim must be one of \['adamw'\]. Got 'sgd'"),
        ({"samples_seen": 0}, "scale.samples_seen must be an integer of at least 1"),
        (
            {"samples_seen": 96, "online": {"cadence": "every_step"}},
            "online.selector must be given",
        ),
        ({"samples_seen": 96, "online": "every_stop"}, "Did you mean every_step"),
        (
            {"samples_seen": 96, "online": {"cadence": "every_step", "selector": "jest"}},
            "online.selector must be a selector",
        ),
        ({"samples_seen": 96, "loss": "distill"}, "loss=distill needs one teacher"),
    ],
)
def test_wrong_arguments_of_train(
    arguments: dict[str, Any], message: str, pool: siftclip.Pool, tmp_path: Path
) -> None:
    selection = siftclip.select(
        pool, None, Uniform(fraction=1.0), output_dir=tmp_path, progress=False
    )
    with pytest.raises(InputError, match=message):
        siftclip.train(selection, VIT_TINY, **arguments)


def test_wrong_arguments_elsewhere(pool: siftclip.Pool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"arrays come as features="):
        siftclip.select(PAIRS, ClipScore(fraction=0.5))
    with pytest.raises(InputError, match=r"features must be given: ClipScore reads features"):
        siftclip.select(pool, None, ClipScore(fraction=0.5))
    with pytest.raises(InputError, match=r"features must be what siftclip\.embed returns.*/data/x"):
        siftclip.select(pool, "/data/x", ClipScore(fraction=0.5))
    for place in ("out/demo/teachr", "./teachr", tmp_path / "teachr"):
        with pytest.raises(InputError, match="model must be a folder that is there"):
            siftclip.embed(pool, place)
        with pytest.raises(InputError, match="model must be a folder that is there"):
            siftclip.evaluate(place, tmp_path)
    with pytest.raises(InputError, match="eval must be one of"):
        siftclip.evaluate("ViT-B-32", tmp_path, "openai", suite="fest")
    with pytest.raises(InputError, match=r"select: selector must be a Selector. Got str"):
        siftclip.select(pool, None, "clip_score")
    with pytest.raises(InputError, match=r"select: features must be what siftclip\.embed returns"):
        siftclip.select(pool, np.eye(3), ClipScore(fraction=0.5))
    with pytest.raises(InputError, match="select: captions has no place beside a pool"):
        siftclip.select(pool, None, ClipScore(fraction=0.5), captions=["a"])
    with pytest.raises(InputError, match="select: output_dir has no place without a pool"):
        siftclip.select(features=PAIRS, selector=ClipScore(fraction=0.5), output_dir=tmp_path)
    with pytest.raises(InputError, match="train: selection must be a PoolSelection"):
        siftclip.train("a folder", VIT_TINY, samples_seen=9)
    with pytest.raises(InputError, match="model must be a run, a folder"):
        siftclip.evaluate(3, tmp_path)
    with pytest.raises(InputError, match=r"compare: arms\.a must be a selector"):
        siftclip.compare(pool, None, {"a": 3}, VIT_TINY, tasks=tmp_path, samples_seen=9)
    with pytest.raises(InputError, match="Pool: max_bad_fraction must be in the range"):
        siftclip.Pool(tmp_path, max_bad_fraction=2)


# ---- groups and nodes --------------------------------------------------------------------------
def test_the_frame_of_a_pool_says_where_its_samples_are(
    pool: siftclip.Pool, features: siftclip.Features, tmp_path: Path
) -> None:
    selector = ClipScore(fraction=0.3)
    selection = siftclip.select(pool, features, selector, output_dir=tmp_path)
    frame, scores = selection.frame, siftclip.score(pool, features, selector, output_dir=tmp_path)
    assert list(frame.columns) == ["uid", "multiplicity", "score", "row", "tar", "key"]
    assert np.array_equal(frame["score"], scores[frame["row"]])
    assert sorted(frame["row"]) == selection.rows.tolist()
    for row, tar, key in frame[["row", "tar", "key"]].itertuples(index=False):
        assert pool.place(row) == f"{tar}:{key}"


def test_arguments_of_a_wrong_kind_are_named(pool: siftclip.Pool, tmp_path: Path) -> None:
    images = np.eye(4, dtype=np.float32)
    clip_score = ClipScore(fraction=0.5)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    selected = siftclip.select(pool, None, Uniform(fraction=0.5), output_dir=tmp_path)
    calls: dict[str, Callable[[], Any]] = {
        "Pool: root must be a path": lambda: siftclip.Pool(3),
        "Pool: root must be a path in text, without a zero": lambda: siftclip.Pool("a\0b"),
        "Pool: root has a name of 300 bytes": lambda: siftclip.Pool("a" * 300),
        "must be images and texts, two arrays. Got 1": lambda: siftclip.select(
            features=(images,),
            selector=clip_score,
        ),
        "Got the arrays 1": lambda: siftclip.select(features={1: images}, selector=clip_score),
        "Got a nested tensor": lambda: clip_score.scores(nested, nested),
        "Got the class ClipScore": lambda: siftclip.select(pool, None, ClipScore),
        "run_dir must be a path": lambda: siftclip.train(
            selected, "vit_tiny", run_dir=3, **TRAINING
        ),
        "evaluate: tasks must be a path": lambda: siftclip.evaluate("ViT-B-32", None),
        "to_datacomp: path must be a path": lambda: selected.to_datacomp(3),
        "arms must be a Mapping. Got list": lambda: siftclip.compare(pool, None, [3]),
        "seeds must be a Sequence. Got int": lambda: siftclip.compare(
            pool,
            None,
            {"a": clip_score},
            seeds=3,
        ),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=re.escape(message)):
            call()


def test_numbers_of_numpy_are_numbers() -> None:
    settings = given_group(
        OptimSettings, "optim", {"lr": np.float32(0.5), "warmup_steps": np.int32(3)}
    )
    assert (settings.lr, settings.warmup_steps) == (0.5, 3)
    assert type(settings.warmup_steps) is int
    assert OptimSettings(warmup_steps=np.int64(4)).warmup_steps == 4
    assert Uniform(fraction=np.float32(0.5), seed=np.int64(3)).seed == 3


def test_groups_as_objects_mappings_and_names() -> None:
    assert given_group(OptimSettings, "optim") == OptimSettings()
    assert given_group(OptimSettings, "optim", {"lr": 1e-3}) == OptimSettings(lr=1e-3)
    mine = OptimSettings(lr=2.0)
    assert given_group(OptimSettings, "optim", mine) is mine
    assert given_group(LossSettings, "loss", "siglip") == SigLipLoss()
    node = node_of_selector(ClipScore(fraction=0.5), place="online.selector", features="learner")
    loop = given_group(
        OnlineSettings,
        "online",
        {"cadence": "every_n_steps", "every_n_steps": 7, "selector": node},
        follows={"features.name": "b32"},
    )
    assert isinstance(loop, EveryNStepsSettings)
    assert (loop.every_n_steps, loop.reference.features.name) == (7, "b32")


def test_a_recipe_holds_where_nothing_else_is_given() -> None:
    from siftclip.trainer.api.training import _model, _optim, _Recipe
    from siftclip.trainer.settings.data import ScaleSettings

    recipe = _Recipe(
        scale=ScaleSettings(samples_seen=8, global_batch_size=4),
        optim=OptimSettings(lr=3e-3, warmup_steps=7),
        model=ModelSettings(name="ViT-B-16"),
    )
    assert _optim({"lr": 1e-3}, recipe) == OptimSettings(lr=1e-3, warmup_steps=7)
    assert _optim(OptimSettings(lr=2.0), recipe) == OptimSettings(lr=2.0)
    model = _model(None, "openai", loss_name="siglip", recipe=recipe)
    assert (model.name, model.pretrained) == ("ViT-B-16", "openai")
    assert model.options.init_logit_bias == -10


def test_weights_beside_all_settings_of_a_model_are_refused(pool: siftclip.Pool) -> None:
    from siftclip.trainer.api.training import _model

    message = "pretrained must not be given beside all settings of a model"
    with pytest.raises(InputError, match=message):
        _model(ModelSettings(name="ViT-B-32"), "openai", loss_name="clip", recipe=None)
    with pytest.raises(InputError, match=message):
        siftclip.embed(pool, siftclip.trainer.EmbeddingModel(name="ViT-B-32"), "openai")
    with pytest.raises(InputError, match=message):
        siftclip.evaluate(ModelSettings(name="ViT-B-32"), "tasks", "openai")


def test_names_of_the_command_line() -> None:
    from siftclip.trainer.api.training import _model, _online

    tiny = _model("vit_tiny", None, loss_name="clip", recipe=None)
    shipped = copy.deepcopy(VIT_TINY)
    shipped["architecture"]["text_cfg"]["width"] = 64
    assert tiny == given_group(ModelSettings, "model", shipped)
    assert _model("ViT-B-32", "openai", loss_name="clip", recipe=None).pretrained == "openai"
    online = _online("every_step", "b32")
    assert isinstance(online, EveryStepSettings)
    assert online.selector.name == "jest"
    assert online.reference.features.name == "b32"


def test_siglip_brings_its_initial_scale_and_bias() -> None:
    from siftclip.trainer.api.training import _model

    model = _model("ViT-B-32", None, loss_name="siglip", recipe=None)
    assert model.options.init_logit_bias == -10
    assert _model("ViT-B-32", None, loss_name="clip", recipe=None) == ModelSettings(name="ViT-B-32")


@pytest.mark.parametrize(
    ("selector", "name"),
    [
        (ClipScore(fraction=0.3), "clip_score"),
        (NegCLIPLoss(fraction=0.3), "negcliploss"),
        (Uniform(fraction=0.3), "random"),
        (VasD(fraction=0.3, steps=2), "vas_d"),
        (CaptionLength(fraction=0.3), "captionlength"),
    ],
)
def test_selectors_have_the_names_of_the_command_line(selector: Selector, name: str) -> None:
    assert selector_name(type(selector)) == name


def test_the_record_of_a_composition() -> None:
    selector = Then(
        stages={
            "clip": ClipScore(fraction=0.5),
            "target": NormSim(target=FeatureFile(path="t.npz", key="img"), p=2, fraction=0.2),
        }
    )
    node = node_of_selector(selector, place="selector", features="l14", name="mine")
    assert node.record() == {
        "name": "mine",
        "_target_": "siftclip.selectors.Then",
        "stages": {
            "clip": {
                "_target_": "siftclip.selectors.ClipScore",
                "features": "l14",
                "fraction": 0.5,
            },
            "target": {
                "_target_": "siftclip.selectors.NormSim",
                "features": "l14",
                "p": 2.0,
                "target": {
                    "_target_": "siftclip.selectors.FeatureFile",
                    "path": "t.npz",
                    "key": "img",
                },
                "fraction": 0.2,
            },
        },
    }


# ---- importing ---------------------------------------------------------------------------------
def test_importing_siftclip_loads_nothing(child_environment: dict[str, str]) -> None:
    code = (
        "import sys, siftclip; siftclip.__version__; dir(siftclip);"
        "heavy = {'torch', 'numpy', 'lightning', 'open_clip', 'hydra', 'pandas'} & {*sys.modules};"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=child_environment)
