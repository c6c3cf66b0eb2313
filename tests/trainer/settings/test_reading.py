"""Every option refuses what it must, by its name, before anything else is done."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from siftclip.errors import InputError
from siftclip.trainer.settings.commands import (
    COMMANDS,
    CompactCommand,
    SelectSections,
    TrainCommand,
)
from siftclip.trainer.settings.composed import plain_tree
from siftclip.trainer.settings.describing.describe import Option, all_options
from siftclip.trainer.settings.fields.marks import Local
from siftclip.trainer.settings.fields.reader import Reader
from siftclip.trainer.settings.fields.rules import faults, mark_of, required
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.online import EveryStepSettings
from siftclip.trainer.settings.read_command import compose, groups, read_command
from siftclip.trainer.settings.selector import SelectorNode
from siftclip.trainer.settings.store import STORED, composing

# What makes a variant of a group complete
NEEDS = {
    "loss=distill": ["loss.teacher.features.name=l14"],
    "loss=drrho": ["loss.teacher.features.name=l14"],
    "loss=plugin": ["loss.plugin=mine"],
    "features=open_clip": ["features.name=mine", "features.model.name=ViT-B-32"],
}
COMMAND_OF = {
    "compact": ("data_compact", ["compact.output=x"]),
    "bench": ("data_bench", []),
    "diff": ("eval_diff", ["diff.a=x", "diff.b=y"]),
    "download": ("eval_download", ["download.folder=x"]),
    "watch": ("eval_watch", ["watch.run=x"]),
    "export": ("export", ["export.source=x", "export.path=y"]),
    "target": ("target", ["target.root=x", "features.name=mine"]),
    "report": ("report", ["report.runs=[a]"]),
    "show": ("show", []),
    "reproduce": ("reproduce", ["reproduce.run=a"]),
    "runs": ("runs_rm", ["runs_rm.run=a"]),
    "runs_list": ("runs_list", []),
    "runs_show": ("runs_show", ["runs_show.run=a"]),
    "runs_rm": ("runs_rm", ["runs_rm.run=a"]),
    "runs_gc": ("runs_gc", []),
    "subset_import": ("subset_import", ["subset_import.path=x"]),
    "subset_export": ("subset_export", ["subset_export.subset=a", "subset_export.path=x"]),
    "subset_show": ("subset_show", ["subset_show.name=a"]),
    "subset_verify": ("subset_verify", ["subset_verify.subset=a"]),
    "subset_combine": (
        "subset_combine",
        [f"subset_combine.{word}" for word in ("name=c", "operation=union", "a=a", "b=b")],
    ),
}
POOL = "pool.root=/data/pool"
WRONG: list[Any] = ["wrong", -1.5, True, ["a"], {"a": 1}, [[["a"]]], None, 3, float("nan"), ""]


@pytest.fixture(scope="module", autouse=True)
def hydra_tree() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with composing():
        yield
    GlobalHydra.instance().clear()


def tree_with(option: Option) -> dict[str, Any]:
    """A complete configuration that has an option."""
    choice = option.choices[-1:]
    command, extra = COMMAND_OF.get(option.group, ("train", []))
    own = [*choice, *NEEDS.get("".join(choice), []), *extra]
    return plain_tree(hydra.compose(command, overrides=[POOL, *own]))


def changed(tree: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with another value."""
    found = copy.deepcopy(tree)
    *parents, last = name.split(".")
    node = found
    for parent in parents:
        node = node[parent]
    node[last] = value
    return found


def faults_of(option: Option, tree: dict[str, Any]) -> list[str]:
    reader = Reader()
    if option.group:
        reader.read(groups()[option.group], tree[option.group], option.group)
    else:
        own = {name: tree[name] for name in tree if name in ("overlap", option.name)}
        reader.read(option.kind, {option.name: own[option.name]}, "")
    return [str(fault) for fault in reader.faults]


TYPED = [name for name, option in all_options().items() if not option.is_selector]


@pytest.mark.parametrize("name", TYPED)
def test_wrong_values_are_refused_by_name(name: str) -> None:
    option = all_options()[name]
    tree = {"overlap": True, **tree_with(option)}
    assert faults_of(option, tree) == []
    wrong = [value for value in WRONG if [*faults(option.hint, value, name)]]
    assert len(wrong) >= (1 if option.type == "mapping or null" else 2), option.type
    for value in wrong:
        found = faults_of(option, changed(tree, name, value))
        assert len(found) == 1, (value, found)
        assert found[0].startswith((f"{name} ", f"{name}[", f"{name}.")), found
        assert "Got" in found[0]


@pytest.mark.parametrize("name", [name for name in TYPED if "." in name])
def test_a_misspelt_name_is_told_with_the_right_one(name: str) -> None:
    option = all_options()[name]
    tree = tree_with(option)
    parent, _, last = name.rpartition(".")
    node = tree
    for part in parent.split("."):
        node = node[part]
    misspelt = f"{last[:-1]}{last[-1]}q"
    found = faults_of(option, changed(tree, f"{parent}.{misspelt}", 1))
    assert [fault for fault in found if fault.startswith(f"{parent}.{misspelt} is not an option.")]
    assert f"Did you mean {parent}." in found[0]


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: f"{stored.group}-{stored.name}")
def test_defaults_are_what_the_group_itself_accepts(stored: Any) -> None:
    """No default is refused, and what has none is told as missing."""
    if stored.kind in (EveryStepSettings,) or required(stored.kind) & {"reference", "selector"}:
        return  # need a selector: in the trees above
    reader = Reader()
    values = {name: value for name, value in stored.own_values().items() if value != "???"}
    reader.read(stored.kind, values, stored.group or "")
    missing = {str(fault).split()[0].rpartition(".")[2] for fault in reader.faults}
    assert missing <= {*required(stored.kind), "loss=distill", "loss=drrho"}


SETS = [
    *([f"online={cadence}"] for cadence in ("once", "every_step", "every_n_steps", "every_epoch")),
    *([f"loss={loss}", *NEEDS.get(f"loss={loss}", [])] for loss in ("siglip", "coca", "drrho")),
    ["optim.lr=1", "model.options.force_image_size=[64,32]", "optim.no_decay=[a]"],
    ["online=every_step", "online.schedule.filter_ratio=[[0,0.5],[1,0.8]]", "trainer.devices=[0]"],
    ["eval=datacomp", "+online.scorer.options.init_logit_scale=1", "online=every_step"],
    ["scale=datacomp_small", "experiment=aced", "+loss.teacher.model.weights=raw"],
]


@pytest.mark.parametrize("overrides", SETS, ids=" ".join)
def test_records_are_what_the_configuration_has(overrides: list[str]) -> None:
    """Stored identities hold these: equal values, integers where integers were given."""
    config = hydra.compose("train", overrides=[POOL, *overrides])
    settings = read_command(TrainCommand, config)
    whole = OmegaConf.to_container(config, resolve=True)
    assert isinstance(whole, dict)
    assert repr(dict(settings.composed.values)) == repr(whole)
    assert settings.composed.to_yaml() == OmegaConf.to_yaml(config, resolve=True)
    for name in groups():
        if hasattr(settings, name) and name != "features":
            assert repr(to_plain(getattr(settings, name))) == repr(whole[name]), name


def test_selectors_of_the_loop_read_the_learner() -> None:
    settings = compose(
        TrainCommand,
        "train",
        [POOL, "features.name=l14", "online=every_n_steps", "online.features=b32"],
    )
    node: Any = settings.online
    assert isinstance(node.selector, SelectorNode)
    assert node.selector.parameters["features"] == "b32"
    assert to_plain(node.selector)["features"] == "l14"
    assert settings.selector.parameters["features"] == "l14"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=5"], "budget needs a unit: .* Got 5"),
        (["budget.flops=1", "budget.seconds=2"], r"Only one of budget\.\*"),
        (["online.cadence=often"], r"online\.cadence must be one of \['once', .*Got 'often'"),
        (["online.cadence=every_step"], "options of its own: write online=every_step"),
        (["online=every_step", "online.selector=jest"], r"write selector@online\.selector=NAME"),
        (["loss.name=coca"], "options of its own: write loss=coca"),
        (["selector=external"], r"The selector needs selector\.path="),
        (
            ["selector=vas_clip", "selector.stages.vas.fraction=2"],
            r"selector\.stages\.vas\.fraction must be a number in the range \(0, 1\].*Got 2\.",
        ),
        (
            ["selector.features=${nope}"],
            r"selector\.features refers to what is not there: \${nope}",
        ),
        (["features=open_clip"], r"features\.name must be given"),
        (["+logger.groups=x"], r"logger\.groups is not an option\. Did you mean logger\.group\?"),
        (["logger.project=a/b"], r"logger\.project must be a name of 1 to 128 char.*Got 'a/b'"),
        (
            ["model.name=https://me:hunter22@h/w"],
            r"model\.name must be a name, .* no URL.*https://\*",
        ),
        (["model.pretrained_text=s3://b/w.pt"], r"model\.pretrained_text must be a name"),
        (["pool.storage_options=hunter22"], r"pool\.storage_options must be a mapping.*'\*\*\*'"),
        (["run_dir=http://h/x"], r"run_dir must be a path on this machine, and no URL, or n"),
        ([f"features.name={'n' * 201}"], r"features\.name must be a name, .* at most 200 bytes"),
        ([f"output_dir={'n' * 256}"], r"output_dir has a name of 256 bytes\. Names of f.* 255"),
        ([f"pool.root='{'ä' * 128}'"], r"pool\.root has a name of 256 bytes"),
        ([f"selector.name={'n' * 201}"], r"selector\.name must be a name .* at most 200 bytes"),
        (["+scael=1"], r"scael is not an option\. Did you mean scale\?"),
        (["+zzz=1"], r"zzz is not an option\. The configuration has pool, features, data"),
        (["progress='true'"], r"progress must be true or false\. Got 'true'"),
        (["output_dir=2026"], r"output_dir must be a path.*quote it, as in 'output_dir=\"2026\"'"),
        (["optim.lr='1e-3'"], r"optim\.lr must be a finite number above 0\. Got '1e-3'"),
        (["eval.groups.g=3"], r"eval\.groups\.g must be a name"),
        (["scale.samples_seen=99999999999"], r"samples_seen=99999999999 would be .* steps of 256"),
        (["online=every_step", "online.weights=ema"], r"needs an average .* optim\.ema_decay"),
    ],
)
def test_faults_of_a_command(overrides: list[str], message: str) -> None:
    overrides = [f"+{word}" if word.startswith("eval.groups") else word for word in overrides]
    with pytest.raises(InputError, match=message):
        compose(TrainCommand, "train", [POOL, *overrides])


def test_long_credentials_are_no_names_of_files() -> None:
    url, token = f"https://host/pool?sig={'s' * 300}", "t" * 300
    settings = compose(
        TrainCommand, "train", [f"pool.root='{url}'", f"+pool.storage_options.token={token}"]
    )
    assert settings.pool.root.reveal() == url
    assert settings.pool.storage_options.reveal() == {"token": token}


def test_no_folder_is_a_url() -> None:
    """Of one a folder would be made whose name has the password."""
    marked = [
        option for option in all_options().values() if mark_of(option.hint, Local) is not None
    ]
    assert len(marked) >= 14
    for option in marked:
        found = list(faults(option.hint, "https://u:hunter22@h/x", option.name))
        assert len(found) == 1
        assert str(found[0]).startswith(f"{option.name} must be a path on this machine, and no URL")


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        compose(CompactCommand, "data compact", ["optim.lr=fast", "pool.index_workers=0"])
    assert str(caught.value).splitlines() == [
        "4 options are wrong:",
        "  pool.root must name the folder of the pool, such as pool.root=/data/datacomp_small.",
        "  pool.index_workers must be an integer of at least 1. Got 0.",
        "  compact.output must name the folder of the copy, such as compact.output=/data/copy.",
        "  optim.lr must be a finite number above 0. Got 'fast'.",
    ]


def test_what_a_command_does_not_need_may_be_missing() -> None:
    overrides = [POOL, "loss=distill", "features=open_clip", "features.name=x"]
    settings = compose(SelectSections, "select", overrides)
    assert settings.features.model is not None
    assert settings.features.model.name is None
    with pytest.raises(InputError, match=r"loss\.weights\.column must be text"):
        compose(SelectSections, "select", [POOL, "loss.weights.column=3"])


def test_values_of_ones_own_serve_as_references() -> None:
    overrides = [POOL, "+mine=0.25", "selector.fraction=${mine}", "experiment=testbed_selectors"]
    assert compose(TrainCommand, "train", overrides).selector.fraction == 0.25


@pytest.mark.parametrize("command", ["train", "select", "eval", "export"])
def test_faults_are_told_before_anything_is_imported(command: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from siftclip.trainer.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    status = end.code\n"
        "heavy = {'torch', 'lightning', 'open_clip', 'numpy', 'pandas', 'wandb', 'pyarrow'}\n"
        "print(status, sorted(heavy & set(sys.modules)))"
    )
    words = [command, "optim.lr=fast", f"output_dir={tmp_path / 'out'}"]
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout.strip() == "2 []", result.stderr
    assert "optim.lr must be a finite number above 0. Got 'fast'." in result.stderr
    assert not list(tmp_path.iterdir())


def test_every_command_has_settings() -> None:
    from siftclip.trainer.cli.main import COMMANDS as TYPED_COMMANDS

    assert list(COMMANDS) == sorted(COMMANDS, key=list(COMMANDS).index)
    assert {*COMMANDS} == {*TYPED_COMMANDS}
