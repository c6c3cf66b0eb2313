"""A third party's loss, installed with an entry point: the one that docs/training.md shows."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig

from siftclip.datamodules.identity import code_identity
from siftclip.datamodules.index.uids import format_uid
from siftclip.errors import InputError
from siftclip.files import read_jsonl
from siftclip.trainer import check_loss
from siftclip.trainer.builders.losses import check_loss_options, known_options, loss_identity
from siftclip.trainer.builders.selection import pool_from
from siftclip.trainer.losses import LossInputs
from siftclip.trainer.losses.table import PLUGINS
from siftclip.trainer.online.losses_seen import LossesSeen
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.loss import ClipLoss, ObjectLoss, PluginLoss
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
Cli = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parents[3]
SECTION = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SECTION = SECTION.partition("## Your own loss\n")[2].partition("\n## ")[0]
EXAMPLE, TEST = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
(POINTS,) = re.findall(r"```toml\n(.*?)```", SECTION, flags=re.DOTALL)
# Other losses of the same distribution, each with a need of its own.
MORE = """
import numpy as np
import torch
from focal_loss import FocalLoss
from siftclip.trainer import ContrastiveLoss, SigLipLoss, mean_over_ranks, require_teacher


class NoSampleLosses(FocalLoss):
    gives_sample_losses = False


class Biased(FocalLoss):
    needs_logit_bias = True


class Captioned(FocalLoss):
    needs_captions = True


class NoWeights(ContrastiveLoss):
    takes_weights = False

    def terms(self, inputs):
        distances = (inputs.image_features - inputs.text_features).square().sum(1)
        return {"contrastive_loss": distances.mean() * inputs.logit_scale}


class Taught(ContrastiveLoss):
    '''The squared distance of a pair's similarity from the teacher's, and a mean for each row.'''

    teacher = "model_or_features"

    def __init__(self, selected_rows, scale):
        super().__init__()
        self.scale = scale
        self.fixed_logit_scale = 10.0
        self.register_buffer("rows", torch.from_numpy(selected_rows))

    @classmethod
    def for_run(cls, run, parameters):
        return cls(run.selected_rows, run.teacher_logit_scale, **parameters)

    def terms(self, inputs):
        assert bool(torch.isin(inputs.rows, self.rows).all())
        image, text = require_teacher(inputs, "Taught")
        wanted = self.scale * (image * text).sum(1)
        found = inputs.logit_scale * (inputs.image_features * inputs.text_features).sum(1)
        return {"taught_loss": mean_over_ranks(
            (found - wanted) ** 2, inputs.weights, world_size=inputs.world_size)}


class Reference(Taught):
    teacher = "features"

    @classmethod
    def for_run(cls, run, parameters):
        return cls(run.selected_rows, 1.0, **parameters)


class Careless(FocalLoss):
    def __init__(self, text):
        super().__init__(len(text) / 0)


class Forgetful(FocalLoss):
    @classmethod
    def for_run(cls, run, parameters):
        cls(**parameters)


class Trying(FocalLoss):
    '''Fails as the first step of a run would.'''

    def __init__(self, mode="value", dim=0, gamma: float = 1.0):
        super().__init__(gamma)
        self.mode = mode
        if dim:
            self.register_buffer("weights", torch.ones(dim))

    def terms(self, inputs):
        if hasattr(self, "weights"):
            inputs.image_features * self.weights
        torch.rand(3)
        return self.absent if self.mode == "absent" else super().terms(inputs)


class NoLoss:
    pass
"""
NAMES = re.findall(r"^class (\w+)", MORE, flags=re.MULTILINE)
FOCAL = ["loss=plugin", "loss.plugin=focal"]


def install(folder: Path) -> Path:
    """Write the distribution as pip would."""
    info = folder / "focal-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: focal\nVersion: 1.0\n")
    points = re.sub(r'^(\w+) = "(.*)"$', r"\1 = \2", POINTS, flags=re.MULTILINE)
    points = points.replace('[project.entry-points."siftclip.losses"]', "[siftclip.losses]")
    more = "".join(f"{name.lower()} = more_losses:{name}\n" for name in NAMES)
    (info / "entry_points.txt").write_text(f"{points}{more}absent = more_losses:Absent\n")
    (folder / "focal_loss.py").write_text(EXAMPLE)
    (folder / "more_losses.py").write_text(MORE)
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the plug-ins are installed in."""
    folder = install(tmp_path / "site")
    monkeypatch.syspath_prepend(folder)
    for name in ("focal_loss", "more_losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    code_identity._distributions.cache_clear()
    return folder


def losses(run: RunDir) -> list[float]:
    return [
        record["train/loss"]
        for record in read_jsonl(run.path / "metrics.jsonl")
        if "train/loss" in record
    ]


# ---- the section of the docs --------------------------------------------------------------------
def test_the_example_is_short_and_passes_the_checks(site: Path) -> None:
    assert len(EXAMPLE.splitlines()) + len(TEST.splitlines()) + len(POINTS.splitlines()) < 40
    module = importlib.import_module("focal_loss")
    check_loss(lambda: module.FocalLoss(gamma=2.0), without={"check_ranks": "is in the next test"})


@pytest.mark.slow
def test_the_test_of_the_example_runs_as_it_stands(site: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(TEST, namespace)  # noqa: S102 - the text of our docs
    namespace["test_focal_loss"]()


def test_the_table_of_declarations_is_complete(site: Path) -> None:
    from siftclip.trainer import ContrastiveLoss

    declared = {
        name
        for name, hint in ContrastiveLoss.__annotations__.items()
        if "ClassVar" in str(hint) and name != "loaded_ns"
    }
    assert declared == set(re.findall(r"^\| `(\w+)` \|", SECTION, flags=re.MULTILINE))


def test_without_gamma_it_is_the_softmax_loss(site: Path) -> None:
    from siftclip.trainer.losses import SoftmaxLoss

    generator = torch.Generator().manual_seed(0)
    image, text = torch.nn.functional.normalize(
        torch.randn(2, 8, 4, generator=generator), dim=2
    ).unbind()
    inputs = LossInputs(image_features=image, text_features=text, logit_scale=torch.tensor(5.0))
    focal = PLUGINS.build("focal", {"gamma": 0})
    assert float(focal(inputs)["contrastive_loss"]) == pytest.approx(
        float(SoftmaxLoss()(inputs)["contrastive_loss"])
    )


# ---- training -----------------------------------------------------------------------------------
def test_micro_batches_train_what_the_whole_batch_does(
    site: Path, base: list[str], compose: Compose
) -> None:
    options = [*base, *FOCAL, "+loss.parameters.gamma=2", "optim.eps=1e-3"]
    plain = train_stage(compose("train", [*base, "optim.eps=1e-3"]))
    whole = train_stage(compose("train", options))
    cut = train_stage(
        compose("train", [*options, "trainer.micro_batch_size=4", f"run_dir={site / 'cut'}"])
    )
    assert len(losses(whole)) == 6
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(whole)[0] < losses(plain)[0]


@pytest.mark.slow
def test_the_command_trains_with_it_also_on_ranks(
    site: Path,
    base: list[str],
    compose: Compose,
    cli: Cli,
    child_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    child_environment["PYTHONPATH"] = str(site)
    options = [*base, *FOCAL, "optim.eps=1e-3", "online=every_epoch", "selector=random"]
    options += ["selector.fraction=0.2"]
    words = [*options, "loss.parameters.gamma=2", f"run_dir={tmp_path}/shared"]
    shared = cli("train", *words, ranks=2)
    assert shared.returncode == 0, shared.stderr[-3000:]
    own = ["+loss.parameters.gamma=2", "trainer.micro_batch_size=4", f"run_dir={tmp_path}/alone"]
    alone = train_stage(compose("train", [*options, *own]))
    found = [losses(run) for run in (alone, RunDir(path=tmp_path / "shared"))]
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_selection_in_the_loop_reads_its_losses(
    site: Path, base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    update = LossesSeen.update

    def spy(self: LossesSeen, rows: np.ndarray, values: np.ndarray) -> None:
        seen.append(values)
        update(self, rows, values)

    monkeypatch.setattr(LossesSeen, "update", spy)
    options = [*base, *FOCAL, "online=every_epoch", "selector=random", "selector.fraction=0.2"]
    run = train_stage(compose("train", [*options, "scale.samples_seen=128"]))
    assert (run.path / "selections" / "v0001").is_dir()
    assert [len(values) for values in seen] == [16] * 8
    means = [float(values.mean()) for values in seen]
    assert means[:3] == pytest.approx(losses(run)[:3], rel=1e-5)  # unweighted as yet


@pytest.mark.parametrize("plugin", ["taught", "reference"])
def test_a_teacher_and_the_rows_reach_it(
    plugin: str, site: Path, base: list[str], compose: Compose, demo_data: Any
) -> None:
    teacher = [
        "loss.teacher.features.name=noise",
        f"loss.teacher.features.root={demo_data.root / 'features'}",
        "loss.teacher.features.logit_scale=20",
    ]
    options = [*base, "loss=plugin", f"loss.plugin={plugin}", *teacher]
    run = train_stage(compose("train", [*options, "trainer.micro_batch_size=4"]))
    record = read_jsonl(run.path / "metrics.jsonl")[0]
    assert record["train/taught_loss"] == record["train/loss"]
    assert record["train/logit_scale"] == pytest.approx(10)


# ---- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss.plugin=local"], r"loss\.plugin must be one of \['absent', .*'focal'.*Got 'local'"),
        (["loss.plugin=absent"], r"plug-in 'absent' \(more_losses:Absent\) could not be built"),
        (["loss.plugin=noloss"], r"must be a subclass of siftclip\.trainer\.ContrastiveLoss"),
        (["loss.plugin=focal", "+loss.parameters.gama=2"],
         r"^loss\.parameters\.gama is not a parameter of FocalLoss\. Did you mean gamma\?"),
        (["loss.plugin=careless"], r"^loss\.parameters\.text must be given: Careless needs it"),
        (["loss.plugin=careless", "+loss.parameters.text=a"],
         r"^loss\.plugin=careless: more_losses\.Careless cannot be built: ZeroDivisionError"),
        (["loss.plugin=forgetful"], r"Forgetful\.for_run must return a loss\. Got a NoneType"),
        (["loss.plugin=focal", "loss.teacher.features.name=noise"],
         r"^loss\.plugin=focal has no use for a teacher\. Got \['features'\]"),
        (["loss.plugin=taught"], r"^loss\.plugin=taught needs one teacher: .* Got neither"),
        (["loss.plugin=reference", "loss.teacher.model.name=ViT-B-32"],
         r"^loss\.plugin=reference needs the cached features .*Got \['model'\]"),
        (["loss.plugin=noweights", "loss.weights.path=w.parquet"],
         r"^loss\.plugin=noweights takes no weights of samples.*one of loss=clip,coca,distill,dr"),
        (["loss.plugin=noweights", "online=every_epoch"],
         r"online\.selector=infobatch weighs the samples .* loss\.plugin=noweights cannot use"),
        (["loss.plugin=nosamplelosses", "online=every_epoch"],
         r"needs the loss of each sample, which loss\.plugin=nosamplelosses does not tell\. "
         r"Use one of loss=clip,coca,distill\."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_pool_is_opened(
    options: list[str], message: str, site: Path, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, "loss=plugin", *options, "pool.root=nowhere"]))


def test_a_plugin_without_a_name_is_told(site: Path, base: list[str], compose: Compose) -> None:
    with pytest.raises(InputError, match=r"loss\.plugin must be given: the name under which"):
        compose("train", [*base, "loss=plugin"])


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (
            "biased",
            r"^loss\.plugin=biased needs a model with a logit bias\. Set open_clip's init_l",
        ),
        ("captioned", r"^loss\.plugin=captioned does not go with this model, which has no text d"),
    ],
)
def test_what_the_model_lacks_is_told(
    plugin: str, message: str, site: Path, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, "loss=plugin", f"loss.plugin={plugin}"]))


def test_weights_of_a_file_reach_it(
    site: Path, base: list[str], compose: Compose, tmp_path: Path
) -> None:
    pool = pool_from(compose("train", base).pool, progress=False)
    weights = pa.table(
        {"uid": [format_uid(uid) for uid in pool.uids], "weight": np.linspace(1, 2, len(pool))}
    )
    pq.write_table(weights, tmp_path / "weights.parquet")
    options = [*base, *FOCAL]
    plain = train_stage(compose("train", options))
    weighed = train_stage(
        compose("train", [*options, f"loss.weights.path={tmp_path / 'weights.parquet'}"])
    )
    assert losses(weighed) != losses(plain)


# ---- what a run is known by ---------------------------------------------------------------------
def test_a_run_is_known_by_code_and_parameters_of_its_loss(
    site: Path, base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*base, *FOCAL, "scale.samples_seen=16", "optim.warmup_steps=0"]
    first = train_stage(compose("train", options)).path
    assert train_stage(compose("train", options)).path == first
    other = train_stage(compose("train", [*options, "+loss.parameters.gamma=2"])).path
    assert other != first
    path = site / "focal_loss.py"
    path.write_text(path.read_text().replace(".mean(0)", ".sum(0)"))
    for name in ("focal_loss", "more_losses"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    caplog.set_level("INFO")
    assert train_stage(compose("train", options)).path not in (first, other)
    assert "not reused: the run of" in caplog.text
    assert caplog.text.count("what the loss reads (code)") == 1


def test_a_parameter_with_its_own_default_makes_no_other_run(site: Path) -> None:
    def known(plugin: str, **parameters: Any) -> dict[str, Any]:
        options = known_options(PluginLoss(plugin=plugin, parameters=parameters))
        found: dict[str, Any] = options["parameters"]
        return found

    assert known("focal", gamma=1.0) == known("focal", gamma=1) == known("focal") == {}
    assert known("focal", gamma=True) == {"gamma": True}
    assert known("focal", gamma=2.0) == {"gamma": 2.0}
    assert known("focal", other=1.0) == {"other": 1.0}
    assert known("taught", gamma=1.0) == {"gamma": 1.0}  # it is built in a way of its own
    assert known_options(ClipLoss()) == to_plain(ClipLoss())


def test_the_identity_of_a_loss_is_its_own_code_version_and_files(
    site: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.npy"
    np.save(table, np.zeros(3))
    settings = PluginLoss(plugin="nosamplelosses", parameters={"gamma": str(table)})
    identity = loss_identity(settings)
    assert set(identity["code"]) == {"focal", "focal_loss", "more_losses"}
    assert identity["code"]["focal"] == "1.0"
    assert set(identity["files"]) == {str(table)}
    np.save(table, np.ones(3))
    assert loss_identity(settings)["files"] != identity["files"]
    assert loss_identity(replace(settings, plugin="focal"))["code"].keys() == {
        "focal",
        "focal_loss",
    }


def test_a_loss_is_tried_out_before_anything_is_read(site: Path) -> None:
    def check(**parameters: Any) -> None:
        check_loss_options(PluginLoss(plugin="trying", parameters=parameters))

    before = torch.random.get_rng_state()
    check()
    check(dim=512)  # no fault: it may be the size of the run's model
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(InputError, match=r"^loss\.parameters\.gamma must be a number\. Got 'abc'"):
        check(gamma="abc")
    message = (
        r"^loss\.plugin=trying: more_losses\.Trying fails with loss\.parameters="
        r"{'mode': 'absent'}: AttributeError: .*absent"
    )
    with pytest.raises(InputError, match=message):
        check(mode="absent")
    with pytest.raises(InputError, match=r"focal_loss\.FocalLoss fails with .*: TypeError: "):
        check_loss_options(PluginLoss(plugin="focal", parameters={"gamma": "abc"}))


def test_settings_are_checked_from_python_too(site: Path) -> None:
    check_loss_options(PluginLoss(plugin="focal", parameters={"gamma": 2.0}))
    with pytest.raises(InputError, match=r"has no use for a teacher"):
        check_loss_options(
            PluginLoss(
                plugin="focal",
                teacher=replace(
                    PluginLoss(plugin="focal").teacher,
                    features=replace(PluginLoss(plugin="focal").teacher.features, name="l14"),
                ),
            )
        )


# ---- an object, from Python ----------------------------------------------------------------------
def test_an_object_trains_what_the_plugin_does(
    site: Path, base: list[str], compose: Compose, tmp_path: Path
) -> None:
    options = [*base, *FOCAL, "+loss.parameters.gamma=2"]
    plugin = train_stage(compose("train", options))
    made = importlib.import_module("focal_loss").FocalLoss(2)
    settings: Any = compose("train", base)
    run = train_stage(replace(settings, loss=ObjectLoss(loss=made)))
    assert losses(run) == losses(plugin)
    assert made.sample_losses is None  # a copy was trained
    assert train_stage(replace(settings, loss=ObjectLoss(loss=made))).path == run.path
    made.gamma = 3
    assert train_stage(replace(settings, loss=ObjectLoss(loss=made))).path != run.path


def test_an_object_is_checked_as_a_plugin_is(site: Path) -> None:
    module = importlib.import_module("more_losses")
    check_loss_options(ObjectLoss(loss=module.NoWeights()))
    taught = module.Taught(np.arange(3), 1.0)
    with pytest.raises(InputError, match=r"^loss=Taught needs one teacher: .* Got neither"):
        check_loss_options(ObjectLoss(loss=taught))
    with pytest.raises(InputError, match=r"^loss=str must be a siftclip.trainer.ContrastiveLoss"):
        check_loss_options(ObjectLoss(loss="focal"))
    identity = loss_identity(ObjectLoss(loss=module.NoSampleLosses("some text")))
    assert set(identity["code"]) == {"focal", "focal_loss", "more_losses"}


def test_the_record_of_an_object_has_all_that_tells_it_from_others(site: Path) -> None:
    from siftclip.trainer.losses import ReferenceGuidedLoss, SigLipLoss

    made = [
        SigLipLoss("gather"),
        SigLipLoss("shift"),
        ReferenceGuidedLoss(gamma=0.5, selected_rows=np.arange(3)),
        ReferenceGuidedLoss(gamma=0.5, selected_rows=np.arange(4)),
        ReferenceGuidedLoss(gamma=0.6, selected_rows=np.arange(4)),
    ]
    records = [json.dumps(to_plain(ObjectLoss(loss=loss))) for loss in made]
    assert len(set(records)) == len(made)
