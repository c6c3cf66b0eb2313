"""What is typed behind a command: words, names with a slash, misspelt options, several ranks."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from siftclip.errors import InputError
from siftclip.first_rank import is_first_rank
from siftclip.trainer.cli.application import _named, application
from siftclip.trainer.cli.endings import FULL_ERROR
from siftclip.trainer.cli.explanations import composed
from siftclip.trainer.cli.flags import spelled_out
from siftclip.trainer.cli.typed_credentials import without_credentials
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.evaluation import EvalSettings
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.store import composing
from siftclip.trainer.settings.tools import CompareSettings

POSITIONAL = ["model.name", "model.pretrained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sections:
    """What the commands here take."""

    common: CommonSettings
    model: ModelSettings
    eval: EvalSettings
    compare: CompareSettings


Run = Callable[..., tuple[int, str, list[Sections]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*words)` of a command without a stage: exit status, stderr and the configurations."""

    def command(*words: str, name: str = "eval") -> tuple[int, str, list[Sections]]:
        configs: list[Sections] = []

        def stage(config: Sections) -> None:
            assert os.environ.get(FULL_ERROR) == before  # what children inherit
            configs.append(config)
            if config.common.seed == 7:
                raise InputError("seed is 7.")
            if config.common.seed == 8:
                raise KeyboardInterrupt

        before = os.environ.get(FULL_ERROR)
        monkeypatch.setattr(sys, "argv", ["siftclip", name, *words])
        status = 0
        try:
            positional = POSITIONAL if name == "eval" else ()
            application(name, Sections, positional=positional)(stage)()
        except SystemExit as end:
            status = int(end.code or 0)
        assert os.environ.get(FULL_ERROR) == before
        return status, capsys.readouterr().err, configs

    return command


# ---- mappings whose names are the user's --------------------------------------------------------
def test_own_names_need_no_plus(run: Run) -> None:
    words = [
        "eval=vtab",
        "eval.classnames.mnist=a.txt",
        "eval.classnames.vtab/dtd=b.txt",
        "+eval.classnames.imagenet-a=c.txt",
        "++eval.classnames={misc/x:d.txt}",
        "eval.templates={vtab/pets:e.txt}",
        "eval.templates.misc/x=",
        "eval.groups.own=[mnist,vtab/dtd]",
        "eval.groups.v1.0=[cars]",
        "~eval.groups.vtab",
        "eval.tasks=[mnist]",
        'compare.arms.half=["selector.fraction=0.5"]',
    ]
    status, errors, [config] = run("model", *words)
    assert (status, errors) == (0, "")
    assert config.eval.classnames == {
        "mnist": "a.txt",
        "vtab/dtd": "b.txt",
        "imagenet-a": "c.txt",
        "misc/x": "d.txt",
    }
    assert config.eval.templates == {"vtab/pets": "e.txt", "misc/x": ""}
    assert config.eval.groups == {"own": ("mnist", "vtab/dtd"), "v1.0": ("cars",)}
    assert config.compare.arms == {"half": ("selector.fraction=0.5",)}


def test_plain_names_can_be_swept(run: Run) -> None:
    status, _, configs = run("--multirun", "m", "eval.classnames.mnist=a,b", "progress=false")
    assert status == 0
    assert [config.eval.classnames["mnist"] for config in configs] == ["a", "b"]


# ---- bare words and paths -----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["model tiny=1", "runs/b=2,c", "it's"])
def test_paths_are_taken_as_they_are(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    _, _, [config] = run(name, f"eval.root={name}")
    assert config.model.name == config.eval.root == name


def test_a_folder_does_not_hide_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("seed=0", "seeds=0"):
        (tmp_path / name).mkdir()
    words = ["seed=0", "seeds=0", "--config-dir", "a=b"]
    expected = ["seed=0", "model.name='seeds=0'", "--config-dir", "a=b"]
    assert _named("eval", words, POSITIONAL) == expected


# ---- faults of the options ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "eval.task=[a]",
            "eval.task is not an option. Did you mean eval.tasks? List all options: ",
        ),
        ("evl=datacomp", "evl is not an option. Did you mean eval?"),
        ("eval.probe={seed:1}", "eval.probe.seed is not an option. Did you mean eval.probe.seeds?"),
        ("eval.devices=2", "eval.devices is not an option. Did you mean trainer.devices?"),
        ("~eval.foo", "eval.foo is not an option."),
        ("selector.alpha=2", "Unknown options of selector need a plus: +selector.alpha=VALUE."),
        ("eval=datacmp", "eval=datacmp: there is no such configuration. There are datacomp, def"),
        ("eval.tasks=a,b", "A list is written eval.tasks=[a,b]; --multirun runs one job for each."),
        (
            "logger.owner=me",
            "logger.owner is not an option. List all options: siftclip eval --cfg job",
        ),
        ("pool.storage_options={a:SECRET=x}", "the value of pool.storage_options cannot be read, "),
        ("+seed=1", "Leave the + out: seed=1"),
        ("eval=3", "eval=3: eval takes the name of a configuration, one of datacomp, default"),
        ("model=null", "model=null: model takes the name of a configuration, one of"),
        ("~", "there is no name in front of a '=', or behind a '~'"),
        ("pool..root=x", "'pool..root' cannot be the name of an option."),
        ("--foo", "there is no option --foo. Did you mean --info?"),
        ("-x", "there is no option -x. Type options themselves"),
        ("--config-dir", "--config-dir needs a value behind it."),
        ("--cfg=nope", "--cfg must be one of job, hydra, all. Got 'nope'."),
        ("eval.groups=[1]", "eval.groups must be a mapping, {NAME: VALUE}. Got [1]."),
        ("compare.arms=[a]", 'compare.arms must be a mapping, such as {half: ["selector.fra'),
        ("compare.arms=[a=b,c=d]", 'compare.arms must be a mapping, such as {half: ["sele'),
        ("selector=a,b", "--multirun selector=a,b"),
        ("selector=[random, jest]", "--multirun selector=random,jest"),
        ("+selector@online.selector=[jest,hard]", "--multirun +selector@online.selector=jest,h"),
        ("model=ViT-B-32", "Did you mean model=vit_b_32?"),
        ("eval.root=no's", 'the value of eval.root cannot be read. Got "no\'s"'),
        ("--config-dir=nowhere", "nowhere' not found"),
        ("--experimental-rerun=run.pickle", "there is no option --experimental-rerun. Type"),
        ("--exp=run.pickle", "there is no option --exp. Type options themselves"),
        ("--shell-completion", "there is no option --shell-completion."),
        ("-sc", "there is no option -sc."),
        ("eval.root='a\0b'", "eval.root must not hold a zero byte. Got 'a\\x00b'."),
        ("output_dir=s3://me:hunter22@bucket/x", "output_dir must be a path on this machine, a"),
        ("--config-name=nope", "Cannot find primary config 'nope'."),
    ],
)
def test_a_wrong_option_is_one_message(word: str, message: str, run: Run) -> None:
    status, errors, configs = run("model", word)
    assert (status, configs) == (2, [])
    assert errors.startswith("siftclip eval: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not any(word in errors for word in ("HYDRA", "Traceback", "pkg://", "_type"))


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("pool.storage_options.anon=true", "++pool.storage_options.anon=true"),
        ("pool.storage_options={anon:true}", "++pool.storage_options={anon:true}"),
        ("+pool.storage_options.a.b.X-C=d", "+pool.storage_options.a.b.X-C=d"),
        ("eval.groups.a.b=[c]", "++eval.groups={a.b:[c]}"),
    ],
)
def test_names_of_open_mappings_are_the_users_own(word: str, read: str) -> None:
    assert _named("index", [word], ()) == [read]


def test_numbers_among_storage_options_stay_numbers() -> None:
    words = [
        without_credentials(word)
        for word in ("++pool.storage_options.port=8080", "+pool.storage_options.a={b:0.5,c:true}")
    ]
    assert not any("8080" in word or "0.5" in word for word in words)
    with composing():
        config = hydra.compose("index", overrides=["pool.root=s3://b/p", *words])
        options = OmegaConf.to_container(config.pool.storage_options, resolve=True)
    assert options == {"port": 8080, "a": {"b": 0.5, "c": True}}


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"])
def test_what_launchers_set_is_a_number(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    status, errors, _ = run("model")
    assert status == 2
    assert f"the environment variable {name}, which torchrun, srun or Lightning sets" in errors


def test_an_option_without_a_name(run: Run) -> None:
    status, errors, _ = run("=", name="select")
    assert status == 2
    assert errors == (
        "siftclip select: error: there is no name in front of a '=', or behind a '~'; options are "
        "written NAME=VALUE.\n"
    )


def test_an_option_that_was_taken_away_is_told_so(run: Run) -> None:
    for words in (["selector.fraction=1", "~selector"], ["~eval.probe", "eval.probe.l2=1"]):
        status, errors, _ = run("model", *words)
        gone = next(word for word in words if word[0] == "~")
        assert status == 2
        assert f"is not an option once {gone} has taken {gone[1:]} away. Leave one of th" in errors


def test_an_option_that_a_command_does_not_read_is_a_warning(run: Run) -> None:
    status, errors, _ = run("model", "compare.name=x", "demo.pool_samples=3", "seed=1")
    assert status == 0
    text = "WARNING demo.pool_samples=3 changes nothing: siftclip eval does not read demo"
    assert errors.splitlines() == [text]


def test_a_suggested_quoting_works(run: Run) -> None:
    value = 'bad/task\'s "x" = n, [y'
    _, errors, _ = run("model", f"eval.root={value}")
    [quoted] = shlex.split(errors.partition("for the shell it is ")[2])
    assert OverridesParser.create().parse_override(quoted).value() == value


@pytest.mark.parametrize(
    ("typed", "arms"),
    [
        ("{a:selector=random}", {"a": ("selector=random",)}),
        (
            "{a:[selector=random,seed=1],b:selector=jest}",
            {"a": ("selector=random", "seed=1"), "b": ("selector=jest",)},
        ),
    ],
)
def test_arms_without_quotes_are_told_with_them(
    typed: str, arms: dict[str, tuple[str, ...]], run: Run
) -> None:
    _, errors, _ = run("model", f"compare.arms={typed}")
    [word] = shlex.split(errors.partition("in double quotes: ")[2])
    _, _, [config] = run("model", word)
    assert config.compare.arms == arms


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("selector=nope", "selector=nope: there is no such configuration. There are a_opti"),
        ("selector.beta=1", "Unknown options of selector need a plus: +selector.beta=VALUE."),
        ("foo", "'foo' has no '='; options are written NAME=VALUE."),
        ("optim.lrr=1", "optim.lrr is not an option. Did you mean optim.lr?"),
    ],
)
def test_faults_of_an_arm_are_told_as_those_of_the_command(word: str, message: str) -> None:
    with composing(), pytest.raises(InputError) as raised:
        composed(TrainCommand, "compare", ["pool.root=pool", word])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_several_configurations_are_run_one_after_the_other(run: Run) -> None:
    _, errors, _ = run("model", "eval=fast,vtab")
    words = errors.partition("To run one job for each: ")[2].split()
    status, _, configs = run("model", *words)
    assert (status, [config.eval.suite for config in configs]) == (0, ["fast", "vtab"])
    assert run("model", "experiment=[jest,digits]")[0] == 0  # these are differences, and add up


def test_hydras_options_may_stand_between_overrides(run: Run, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "mine.yaml").write_text("defaults: [default]\nsuite: mine\n")
    words = ["seed=3", f"--config-dir={tmp_path}", "eval=mine", "--config-dir", str(tmp_path)]
    _, _, [config] = run("model", *words, "progress=false")
    assert (config.common.seed, config.eval.suite) == (3, "mine")


@pytest.mark.parametrize("name", ["vit_b_32", "vit_tiny"])
def test_a_model_of_training_is_known_to_eval(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, [config] = run(name, "weights.pt")
    assert config.model.name == {"vit_b_32": "ViT-B-32"}.get(name, name)
    assert config.model.pretrained == "weights.pt"
    assert (config.model.architecture is None) == (name == "vit_b_32")
    (tmp_path / name).mkdir()  # a folder says more
    _, _, [config] = run(name)
    assert (config.model.name, config.model.architecture) == (name, None)


def test_words_without_a_meaning(run: Run) -> None:
    assert "'foo' has no '='" in run("foo", name="select")[1]
    assert "'a b' cannot be the name of an option" in run("a b=1", name="select")[1]


def test_a_wrong_value_of_a_sweep_is_found_before_its_first_job(run: Run) -> None:
    status, errors, configs = run("--multirun", "m", "eval=fast,datacmp")
    assert (status, configs) == (2, [])
    assert "eval=fast,datacmp: there is no such configuration" in errors


def test_hydras_own_message_if_it_was_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FULL_ERROR, "1")
    with pytest.raises(Exception, match=r"Could not override 'eval.task'"):
        run("model", "eval.task=1")


# ---- ranks --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_the_first_rank_is_known(environment: dict[str, str], first: bool) -> None:
    assert is_first_rank(environment) is first


@pytest.mark.parametrize(("word", "status"), [("seed=7", 2), ("seed=8", 130), ("sed=1", 2)])
def test_one_rank_speaks_for_all(
    word: str, status: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("model", word)[:2] == (status, "")
    if word == "seed=8":
        monkeypatch.setenv("RANK", "0")
        assert "siftclip eval: interrupted" in run("model", word)[1]


def test_a_rank_that_trains_says_what_it_alone_may_know(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("seed=7", name="train")[:2] == (2, "siftclip train: error: seed is 7.\n")


# ---- what Hydra prints --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("option", "text"), [("--cfg=job", "a/b:\n"), ("--help", "eval.classnames.TASK=FILE")]
)
def test_configuration_and_help_are_printed(
    option: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["siftclip", "eval", option, "x", "eval.groups.a/b=[c]"])
    with contextlib.suppress(SystemExit):
        application("eval", Sections, positional=POSITIONAL)(pytest.fail)()
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["selector=plugin", "selector.features=b32"],
         "A parameter of a plug-in is written selector.parameters.features=VALUE."),
        (["selector=plugin", "selector.fractoin=1"], "Did you mean selector.fraction?"),
        (["selector=nosuch"], "selector=nosuch: there is no such configuration."),
        (["selector=clip_score", "selector.plugin=b32"], "Unknown options of selector need a plus"),
    ],
)  # fmt: skip
def test_parameters_of_plugins_have_a_place(run: Run, words: list[str], message: str) -> None:
    assert message in run("model", *words)[1]


def test_a_configuration_that_is_a_plugin_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"siftclip.selectors": ["words"], "siftclip.losses": ["focal"]}
    place = "siftclip.trainer.cli.explanations.installed_names"
    monkeypatch.setattr(place, installed.__getitem__)
    for word, way_out in (
        ("selector=words", "Write selector=plugin selector.plugin=words"),
        ("loss=focal", "Write loss=plugin loss.plugin=focal"),
        (
            "+selector@online.selector=words",
            "Write selector@online.selector=plugin online.selector.plugin=words",
        ),
    ):
        assert (
            f"is an installed plug-in, and no configuration. {way_out}"
            in run(word, name="train")[1]
        )


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        (["a=1", "--part", "1/2", "b=2"], ["a=1", "compare.part=1/2", "b=2"]),
        (["--part=1/2"], ["compare.part=1/2"]),
        (["--part"], ["compare.part="]),
        (["--serve", "runs"], ["report.serve=true", "runs"]),
        (["--serve=no"], ["--serve=no"]),  # which is refused with the words of an unknown option
        (["--cfg", "job", "--parts"], ["--cfg", "job", "--parts"]),
    ],
)
def test_flags_stand_for_options(words: list[str], spelled: list[str]) -> None:
    flags = {"--part": "compare.part", "--serve": "report.serve=true"}
    assert spelled_out(words, flags) == spelled
