"""A run's configuration as data: what it gives to a command is what it was, and never a program."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from siftclip.errors import InputError
from siftclip.trainer.settings.commands import ReproduceCommand, TrainCommand
from siftclip.trainer.settings.kept_config import KeptConfig, kept_config
from siftclip.trainer.settings.online import OnceSettings
from siftclip.trainer.settings.read_command import compose
from siftclip.trainer.settings.store import composing

POOL = "pool.root=/data/pool"
GROUPS = (
    *("pool", "features", "selector", "data", "model", "loss", "optim", "trainer", "online"),
    *("eval", "scale", "seed", "budget"),
)


@pytest.fixture(scope="module", autouse=True)
def hydra_tree() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with composing():
        yield
    GlobalHydra.instance().clear()


@functools.cache
def _text_of(*overrides: str) -> str:
    return compose(TrainCommand, "train", [POOL, *overrides]).composed.to_yaml()


def config_of(*overrides: str) -> dict[str, Any]:
    """What the config.yaml of a run holds."""
    config: dict[str, Any] = yaml.safe_load(_text_of(*overrides))
    return config


def again(kept: KeptConfig, *typed: str) -> ReproduceCommand:
    """What the command takes that repeats it."""
    words = [*typed, "reproduce.run=RUN"]
    kept.register()
    return compose(ReproduceCommand, "reproduce", [*kept.words(words), *words])


def reproduced(config: dict[str, Any], *typed: str) -> ReproduceCommand:
    return again(kept_config(config, owner="config.yaml"), *typed)


RUNS = [
    "",
    "selector=vas features=open_clip features.name=b32 features.model.name=ViT-B-32 "
    "selector.target=null "
    "+selector.covariance={_target_:siftclip.selectors.FeatureFile,path:c.npy,key:null}",
    "selector=negclip_normsim_target selector.stages.normsim.target.path=t seed=3",
    "selector=rank_sum selector.selectors.normsim.target.path=t.npz",
    "selector=clip_score_column features.name=b32 seed=7",
    "selector=plugin selector.plugin=clip_score +selector.parameters.features=l14 "
    "selector.fraction=0.5",
    "loss=siglip model=vit_b_32 scale=datacomp_small",
    "loss=distill loss.teacher.features.name=b32 features.name=l14",
    "loss=drrho loss.teacher.features.name=b32 optim.ema_decay=0.99",
    "loss=plugin loss.plugin=mine +loss.parameters.alpha=3",
    "online=every_step",
    "online=every_step selector@online.first_stage.selector=clip_score "
    "online.schedule.filter_ratio=[[0,0.5],[1,0.8]] online.features=b32",
    "online=every_step selector@online.selector=running_vas seed=4",
    "online=every_n_steps online.features=learner features.name=b32",
    "online=every_n_steps selector@online.selector=vas_clip features.name=b32 "
    "online.selector.stages.vas.target.path=t.npz",
    "online=every_epoch",
    "budget.seconds=60 trainer.precision=bf16-mixed trainer.micro_batch_size=8",
    "trainer.devices=[0,1] +trainer.options.benchmark=true optim.no_decay=[a,b]",
    "++model.architecture={embed_dim:3,vision_cfg:{a:1}} model.options.image_mean=[1,2,3]",
    "eval=datacomp eval.root=/data/tasks +eval.groups.own=[mnist] eval.during.tasks=[a]",
    "experiment=jest pool.max_caption_bytes=9 data.resize=torch",
    "output_dir=/elsewhere run_dir='/elsewhere/a=b' logger=csv reuse=false",
]
QUICK = (0, 1, 4, 5, 6, 11, 14)  # of all kinds one; each takes half a second to compose
MARKED = [
    pytest.param(words.split(), id=words, marks=[] if number in QUICK else pytest.mark.slow)
    for number, words in enumerate(RUNS)
]


@pytest.mark.parametrize("overrides", MARKED)
def test_a_run_is_composed_as_it_was(overrides: list[str]) -> None:
    """Every option, also those of selectors in the loop, whose record names other features."""
    before = compose(TrainCommand, "train", [POOL, *overrides])
    kept = kept_config(config_of(*overrides), owner="config.yaml")
    assert kept.refused == {}
    after = again(kept)
    for group in GROUPS:
        assert after.composed.values[group] == before.composed.values[group], group
    assert after.selector.parameters == before.selector.parameters
    assert after.selector.name == before.selector.name
    assert after.scale == before.scale
    assert after.budget == before.budget
    assert after.loss == before.loss
    assert after.trainer == before.trainer
    assert type(after.online) is type(before.online)
    if not isinstance(before.online, OnceSettings) and not isinstance(after.online, OnceSettings):
        assert after.online.selector.parameters == before.online.selector.parameters
    assert after.common.output_dir == "outputs"  # where it is written is up to who repeats it
    assert after.common.run_dir is None
    assert after.common.reuse


def test_what_is_typed_goes_before_what_the_run_has() -> None:
    config = config_of("selector=vas", "selector.target.path=t.npz", "optim.lr=1", "seed=3")
    settings = reproduced(
        config, "pool.root=/other", "optim.lr=2", "seed=4", "selector.threshold=0.5"
    )
    assert settings.pool.root == "/other"
    assert settings.optim.lr == 2
    assert settings.common.seed == 4
    assert settings.selector.parameters["threshold"] == 0.5
    other = reproduced(config, "selector=random", "loss=siglip", "features.name=b32")
    assert other.selector.name == "random"
    assert other.loss.name == "siglip"
    assert reproduced(config, "features.name=b32").selector.parameters["features"] == "b32"


def test_two_runs_in_one_process_are_not_mixed() -> None:
    first = kept_config(config_of("optim.lr=1"), owner="a")
    second = kept_config(config_of("optim.lr=2"), owner="b")
    assert [again(kept).optim.lr for kept in (first, second, first)] == [1, 2, 1]


# ---- other versions -----------------------------------------------------------------------------
def test_options_of_another_version() -> None:
    config = config_of("optim.lr=1")
    del config["optim"]["beta1"], config["data"]["resize"], config["pool"]["max_caption_bytes"]
    config["optim"]["nesterov"] = True
    config["model"]["options"]["force_magic"] = 3
    kept = kept_config(config, owner="config.yaml")
    assert kept.left_out == (
        "model.options.force_magic is unknown to this version: 3",
        "optim.nesterov is unknown to this version: True",
    )
    settings = again(kept)
    assert (settings.optim.lr, settings.optim.beta1, settings.data.resize) == (1, 0.9, "pillow")


@pytest.mark.parametrize("group", ["selector", "online", "scale", "model"])
def test_a_file_of_something_else(group: str) -> None:
    config = config_of()
    config[group] = 3
    with pytest.raises(
        InputError, match=f"c.yaml is not the configuration of a run: it has no {group}"
    ):
        kept_config(config, owner="c.yaml")


def test_losses_of_another_version() -> None:
    config = config_of()
    config["loss"]["name"] = "magic"
    with pytest.raises(
        InputError, match=r"c: loss\.name is magic, which this version does not know"
    ):
        kept_config(config, owner="c")


# ---- a run from elsewhere is no program ---------------------------------------------------------
PLANTED = "planted_in_a_run"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module whose import leaves a file: `planted_in_a_run.Class`."""
    told = tmp_path / "imported"
    code = f"import pathlib\npathlib.Path({str(told)!r}).touch()\nclass Class:\n    pass\n"
    (tmp_path / f"{PLANTED}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield told
    sys.modules.pop(PLANTED, None)


def put(config: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    *parents, last = place.split(".")
    node: Any = config
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value
    return config


def with_parts(*places: str) -> dict[str, Any]:
    """A run that has selectors in the loop, and classes of strangers in some places."""
    config = config_of(
        *("online=every_step", "selector@online.first_stage.selector=clip_score"),
        *("selector=rank_sum", "selector.selectors.normsim.target.path=t.npz"),
    )
    for place in places:
        put(config, place, f"{PLANTED}.Class")
    return config


TARGETS = [
    *("selector._target_", "selector.selectors.clip._target_", "online.selector._target_"),
    *("selector.selectors.normsim.target._target_", "online.first_stage.selector._target_"),
    *("selector.new._target_", "online.selector.learner._target_"),
]


@pytest.mark.parametrize("place", TARGETS)
def test_classes_of_strangers_are_asked_for_by_name(place: str, planted: Path) -> None:
    kept = kept_config(with_parts(place), owner="RUN/config.yaml")
    assert [*kept.refused] == [place]
    with pytest.raises(InputError) as caught:
        again(kept)
    message = str(caught.value)
    assert message.startswith(f"{place} is {PLANTED}.Class in RUN/config.yaml, which is no class")
    assert message.endswith(f"type it if you know it, {place}={PLANTED}.Class.")
    assert not planted.exists()
    # what the message advises is accepted, and is the word of the one who types it
    typed = again(kept, f"{place}=siftclip.selectors.ClipScore")
    assert "siftclip.selectors.ClipScore" in str(typed.composed.values)
    assert f"{PLANTED}" not in str(typed.composed.values)


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "builtins.eval", "subprocess.Popen", "siftclip.trainer.cli.main.main"),
        *("siftclip.selectors.run", "siftclip.selectors.check_selector", "siftclip.selectors"),
        *("siftclip.selectors.core.plugins.SELECTORS.build", "siftclip.errors.call_by_name"),
        *("siftclip.selectors.ClipScore.__init__", " siftclip.selectors.ClipScore", "ClipScore"),
        *(["os.system"], {"a": "os.system"}, 3, None, True),
    ],
    ids=str,
)
def test_no_other_name_is_a_selector(target: Any) -> None:
    config = put(config_of(), "selector._target_", target)
    kept = kept_config(config, owner="c")
    assert [*kept.refused] == ["selector._target_"]


@pytest.mark.parametrize(
    "target",
    [
        *("siftclip.selectors.ClipScore", "siftclip.selectors.methods.clip_score.ClipScore"),
        *("siftclip.selectors.clip_score.ClipScore", "siftclip.selectors.build_plugin"),
    ],
)
def test_our_own_are_known_by_all_of_their_names(target: str) -> None:
    """Also where a class lay when the run was made."""
    assert kept_config(put(config_of(), "selector._target_", target), owner="c").refused == {}


def test_members_in_a_list_are_asked_for_as_a_whole(planted: Path) -> None:
    members = [
        {"_target_": "siftclip.selectors.ClipScore", "fraction": 0.5},
        {"_target_": "siftclip.selectors.Then", "stages": [{"_target_": f"{PLANTED}.Class"}]},
    ]
    config = put(config_of(), "selector.selectors", members)
    kept = kept_config(config, owner="c")
    assert [*kept.refused] == ["selector.selectors"]
    assert f"{PLANTED}.Class" in kept.refused["selector.selectors"]
    assert not planted.exists()
    members.pop()
    assert kept_config(config, owner="c").refused == {}


@pytest.mark.parametrize("name", ["callbacks", "plugins"])
def test_extensions_are_asked_for(name: str, planted: Path) -> None:
    config = put(config_of(), f"trainer.{name}", [{"_target_": f"{PLANTED}.Class"}])
    kept = kept_config(config, owner="c")
    with pytest.raises(InputError, match=rf"trainer\.{name} names {PLANTED}\.Class in c\. .*=null"):
        again(kept)
    assert not getattr(again(kept, f"++trainer.{name}=null").trainer, name)
    typed = again(kept, f"++trainer.{name}=[{{_target_:lightning.pytorch.callbacks.Timer}}]")
    assert getattr(typed.trainer, name)[0]["_target_"] == "lightning.pytorch.callbacks.Timer"
    assert not planted.exists()


def test_loggers_are_left_out(planted: Path) -> None:
    config = put(config_of(), "trainer.loggers", [{"_target_": f"{PLANTED}.Class"}])
    put(config, "trainer.profiler", {"_target_": f"{PLANTED}.Class"})
    put(config, "logger", {"wandb": True, "mode": "online", "project": "theirs"})
    kept = kept_config(config, owner="c")
    assert kept.refused == {}
    assert [text.partition(" ")[0] for text in kept.left_out] == [
        "trainer.loggers",
        "trainer.profiler",
    ]
    settings = again(kept)
    assert not settings.trainer.loggers
    assert settings.logger.project == "siftclip"
    assert not planted.exists()


@pytest.mark.parametrize("place", ["model.architecture", "data.resize", "eval.groups.mine"])
def test_classes_have_no_place_elsewhere(place: str, planted: Path) -> None:
    config = put(config_of(), place, {"deep": {"_target_": f"{PLANTED}.Class"}})
    with pytest.raises(InputError, match=rf"has the class {PLANTED}\.Class"):
        kept_config(config, owner="c")
    unknown = put(config_of(), "optim.deep", {"_target_": f"{PLANTED}.Class"})
    kept = kept_config(unknown, owner="c")
    assert "optim.deep is unknown" in kept.left_out[0]
    assert PLANTED not in str(kept.groups)
    assert not planted.exists()


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a${seed}", "\\${x}", "${option:seed}"])
@pytest.mark.parametrize("place", ["model.name", "selector.features", "optim.no_decay", "seed"])
def test_references_are_refused(value: str, place: str) -> None:
    """They could read the environment, and show it where somebody sees it."""
    given: Any = [value] if place == "optim.no_decay" else value
    with pytest.raises(InputError, match="has a reference"):
        kept_config(put(config_of(), place, given), owner="c")
    with pytest.raises(InputError, match="has the name"):
        kept_config(put(config_of(), "model.architecture", {value: 1}), owner="c")


def test_hydra_is_not_steered() -> None:
    config = config_of()
    config["hydra"] = {"run": {"dir": "/elsewhere"}, "launcher": {"_target_": "os.system"}}
    config["defaults"] = ["/hydra/launcher: submitit"]
    kept = kept_config(config, owner="c")
    assert "hydra" not in kept.groups
    assert again(kept).common.seed == 0
    for place in ("selector", "selector.deep"):
        with pytest.raises(InputError, match=rf"{place}\.defaults is no parameter of a selector"):
            kept_config(put(config_of(), f"{place}.defaults", ["random"]), owner="c")
    kept = kept_config(put(config_of(), "optim.defaults", ["x"]), owner="c")
    assert kept.left_out == ("optim.defaults is unknown to this version: ['x']",)


def test_places_to_write_to_are_not_taken_over() -> None:
    config = config_of("pool.cache_dir=/home/you", "eval.cache_dir=/home/you", "eval.root=t")
    config |= {"output_dir": "/home/you", "run_dir": "/home/you"}
    settings = reproduced(config)
    assert "/home/you" not in str(settings.composed.values)
    kept = kept_config(config, owner="c")
    assert len([text for text in kept.left_out if "/home/you" in text]) == 2


def test_servers_are_asked_for() -> None:
    config = config_of("pool.root=s3://bucket/pool", "+pool.storage_options.anon=true")
    kept = kept_config(config, owner="c")
    with pytest.raises(
        InputError, match=r"pool\.root is the URL s3://bucket/pool in c.* type it, "
    ):
        again(kept)
    assert again(kept, "pool.root=s3://bucket/pool").pool.root == "s3://bucket/pool"
    assert kept.left_out == ("pool.storage_options are not taken over: anon",)
    secret = config_of("pool.root=https://u:secret@h/p", "+pool.storage_options.key=secret")
    kept = kept_config(secret, owner="c")
    assert "secret" not in str(kept)
    assert kept.left_out == ("pool.storage_options are not taken over, and not kept: key",)


def test_features_of_a_pools_cache_are_found(tmp_path: Path) -> None:
    """They are read from there, and nothing is written there."""
    words = ["features=open_clip", "features.name=b32", "features.model.name=ViT-B-32"]
    config = config_of(*words, f"pool.cache_dir={tmp_path}")
    assert reproduced(config).features.root is None
    (tmp_path / "features" / "b32").mkdir(parents=True)
    settings = reproduced(config)
    assert settings.features.root == str(tmp_path / "features" / "b32")
    assert settings.pool.cache_dir is None


@pytest.mark.parametrize("seed", [None, "1", 1.5, True])
def test_a_seed_is_a_number(seed: Any) -> None:
    with pytest.raises(InputError, match="seed must be a whole number"):
        kept_config({**config_of(), "seed": seed}, owner="c")
