"""Command lines of open_clip as ours: read as open_clip reads them, and read by our command."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train import params

from siftclip.errors import InputError
from siftclip.trainer.migration.open_clip_command import Translation, translated
from siftclip.trainer.migration.open_clip_flags import FLAGS, MANY
from siftclip.trainer.migration.open_clip_page import with_tables

PAGE = Path(__file__).parents[3] / "docs" / "open_clip.md"
TRAIN = ["--train-data", "/data/pool/{0..9}.tar", "--train-num-samples", "1000"]
# Of open_clip's README and documentation
LINES = {
    "cc12m": "torchrun --nproc_per_node 4 -m open_clip_train.main --train-num-samples 10968539 "
    "--train-data '/data/cc12m/cc12m-train-{0000..2175}.tar' --dataset-type webdataset "
    "--batch-size 320 --precision amp --workers 4 --imagenet-val /data/imagenet/validation/",
    "laion": "srun --cpu_bind=v --accel-bind=gn python -u src/open_clip_train/main.py "
    "--save-frequency 1 --report-to tensorboard --train-data='/data/LAION-400M/{00000..41455}.tar' "
    "--warmup 2000 --batch-size=256 --epochs=32 --workers=8 --model ViT-B-32 "
    "--name 'ViT-B-32-Vanilla' --seed 0 --local-loss --gather-with-grad",
    "coca": "python -m open_clip_train.main --dataset-type csv --train-data path/train2014.csv "
    "--warmup 1000 --batch-size 128 --lr 1e-5 --wd 0.1 --epochs 1 --workers 3 "
    "--model coca_ViT-L-14 --report-to wandb --coca-contrastive-loss-weight 0 "
    "--coca-caption-loss-weight 1 --log-every-n-steps 100",
    "roberta": "python -m open_clip_train.main --train-num-samples 3000000 --val-num-samples 10000 "
    "--train-data='pipe:aws s3 cp s3://s-mas/cc3m/{00000..00329}.tar -' --dataset-type webdataset "
    "--val-data='pipe:aws s3 cp s3://s-mas/cc3m/{00330..00331}.tar -' --batch-size 256 "
    "--warmup 2000 --epochs 10 --lr 5e-4 --precision amp --workers 6 --model roberta-ViT-B-32 "
    "--lock-text --lock-text-unlocked-layers 10 --name 10_unfrozen --report-to tensorboard",
    "siglip": "--siglip --loss-dist-impl reduce --model ViT-B-16-SigLIP --accum-freq 2 "
    "--lr-scheduler const-cooldown --epochs-cooldown 8 --lr-cooldown-end 1e-6 --grad-clip-norm 1 "
    "--wd-exclude 'visual.*' text.pos --image-mean 0.5 0.5 0.5 --force-image-size 224 224 "
    "--aug-cfg scale='(0.4, 1.0)' use_timm=True --fsdp --torchcompile " + shlex.join(TRAIN),
    "distill": "--model ViT-B-32 --distill-model ViT-L-14 --distill-pretrained openai --skip-sch "
    "--resume latest --precision fp32 --use-bn-sync --wandb-notes \"it's a 'first' try\" "
    + shlex.join(TRAIN),
    "muon": "--opt timm/nadamuon --opt-kwargs fallback_lr_scale=0.5 --opt-fallback-list 'text*' "
    + shlex.join(TRAIN),
    "pretrained": "--model ViT-B-32 --pretrained openai --lock-image --lock-image-unlocked 2 "
    "--force-patch-dropout 0.5 --force-quick-gelu --visual-layer-decay 0.8 --logs out --device cpu "
    "--max-image-pixels 1000 --log-metric-every-n-steps 5 " + shlex.join(TRAIN),
}


def options(result: Translation) -> dict[str, str]:
    return dict(word.split("=", 1) for word in result.words)


@pytest.mark.parametrize("name", LINES)
def test_our_command_reads_it(name: str, compose: Callable[..., Any]) -> None:
    words = translated(shlex.split(LINES[name])).words
    words = [f"+{word}" if word.startswith("optim.timm") else word for word in words]
    settings = compose("train", [word.replace("=N", "=123") for word in words])
    assert settings.scale.global_batch_size % 64 == 0


def test_length_batch_and_devices() -> None:
    found = options(translated(shlex.split(LINES["cc12m"])))
    assert found["scale.samples_seen"] == str(32 * 10968539)
    assert found["scale.global_batch_size"] == str(4 * 320)
    assert found["trainer.devices"] == "4"
    assert "trainer.micro_batch_size" not in found
    pieces = options(translated(["--batch-size", "32", "--accum-freq", "4", *TRAIN]))
    assert pieces["scale.global_batch_size"] == "128"
    assert pieces["trainer.micro_batch_size"] == "32"


def test_several_nodes_are_launched_as_before() -> None:
    line = "torchrun --nnodes=2 --nproc-per-node=8 -m open_clip_train.main --batch-size 16"
    result = translated([*line.split(), *TRAIN])
    assert options(result)["scale.global_batch_size"] == "256"
    assert "trainer.devices" not in options(result)
    assert "torchrun --nnodes 2 --nproc_per_node 8 -m siftclip.trainer.cli train" in str(result)


def test_where_the_tars_are() -> None:
    roots = {
        "/data/cc12m/{0000..2175}.tar": "/data/cc12m",
        "{0..3}.tar": ".",
        "s3://bucket/cc3m/{0..9}.tar": "s3://bucket/cc3m",
        "pipe:aws s3 cp s3://bucket/cc3m/{0..9}.tar -": "s3://bucket/cc3m",
        "/data/my pool/0.tar": "'/data/my pool'",
    }
    for source, root in roots.items():
        assert options(translated(["--train-data", source]))["pool.root"] == root
    several = translated(["--train-data", "/a/0.tar::/b/0.tar"])
    assert any("2 sources" in note for note in several.notes)
    table = translated(["--train-data", "train.csv"])
    assert options(table)["pool.root"] == "FOLDER"
    assert any("is no list of tars" in note for note in table.notes)


def test_schedules() -> None:
    cooled = options(translated(shlex.split(LINES["siglip"])))
    assert cooled["optim.schedule"] == "cooldown"
    assert cooled["optim.cooldown_steps"] == str(round(32 * 1000 / 128 * 8 / 32))
    assert cooled["optim.cooldown_end_lr"] == "1e-06"
    skipped = options(translated(shlex.split(LINES["distill"])))
    assert (skipped["optim.schedule"], skipped["optim.warmup_steps"]) == ("const", "0")
    short = translated([*TRAIN, "--warmup", "999999", "--epochs", "16"])
    assert options(short)["optim.warmup_steps"] == "250"  # 16 x 1,000 / 64
    assert any("longer than the run" in note for note in short.notes)


def test_optimizers_of_timm() -> None:
    words = ["--opt", "timm/nadamuon", "--opt-kwargs", "fallback_lr_scale=0.5", "nesterov=True"]
    words += ["--opt-fallback-list", "text.*", "visual.proj", "--momentum", "0.9"]
    found = options(translated([*TRAIN, *words]))
    assert {key: value for key, value in found.items() if key.startswith("optim.timm")} == {
        "optim.timm.name": "nadamuon",
        "optim.timm.momentum": "0.9",
        "optim.timm.fallback_lr_scale": "0.5",
        "optim.timm.nesterov": "true",
        "optim.timm.fallback": "[text.*,visual.proj]",
    }


def test_numbers_are_written_with_all_their_digits() -> None:
    found = options(translated([*TRAIN, "--lr", "0.000123456789"]))
    assert found["optim.lr"] == "0.000123456789"


def test_what_has_no_counterpart_is_said() -> None:
    words = ["--opt-kwargs", "eps=1", "--remote-sync", "s3://x", "--precision", "pure_fp16"]
    words += ["--report-to", "trackio,tensorboard", "--csv-separator", ",", "--use-naflex"]
    result = translated([*TRAIN, *words, "--local-loss", "--fsdp-checkpoint", "sharded"])
    told = {note.split(":")[0].split()[0] for note in result.notes}
    assert told >= {
        *("--opt-kwargs", "--remote-sync", "--precision", "--report-to", "--csv-separator"),
        *("--use-naflex", "--fsdp-checkpoint"),
    }
    assert "--local-loss" not in told
    assert str(result).startswith("# ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batchsize", "3"], r"no flag of open_clip's training\. Did you mean --batch-size\?"),
        (["--lr"], r"--lr needs a value"),
        (["--lr", "--wd", "0.1"], r"--lr needs a value"),
        (["--siglip=yes"], r"--siglip takes no value"),
        (["--lock", "x"], r"may be --lock-image.* or --lock-text"),
        (["--batch-size", "many"], r"--batch-size must be a number\. Got 'many'"),
        (["--batch-size", "0"], r"--batch-size must be at least 1\. Got 0"),
        (["--epochs", "0"], r"--epochs must be at least 1"),
        (["--lr-scheduler", "linear"], r"--lr-scheduler must be one of cosine"),
        (["--aug-cfg", "scale"], r"--aug-cfg must be KEY=VALUE"),
        (["model", "RN50"], r"'model' is no flag"),
    ],
)
def test_faults_are_told(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        translated(words)


# ---- against open_clip itself -------------------------------------------------------------------
@pytest.fixture(scope="module")
def theirs() -> dict[str, argparse.Action]:
    """The flags of the installed open_clip."""
    found: dict[str, argparse.Action] = {}

    def grab(parser: argparse.ArgumentParser, words: object = None) -> argparse.Namespace:
        found.update(parser._option_string_actions)
        raise LookupError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", grab)
        with pytest.raises(LookupError):
            params.parse_args([])
    return found


def test_every_flag_of_the_installed_open_clip_is_known(
    theirs: dict[str, argparse.Action],
) -> None:
    for name, action in theirs.items():
        if name in ("-h", "--help"):
            continue
        values = 0 if action.nargs == 0 else MANY if action.nargs in ("*", "+") else 1
        assert FLAGS[name].values == values, name


SHARED = ["batch-size", "epochs", "lr", "beta1", "beta2", "eps", "wd", "accum-freq", "model"]


@given(
    flags=st.dictionaries(
        st.sampled_from(SHARED[:-1]), st.integers(1, 9).map(str), max_size=len(SHARED)
    ),
    model=st.sampled_from([None, "ViT-B-32", "RN50", "coca_ViT-B-32", "convnext_base"]),
    as_one=st.booleans(),
)
def test_numbers_are_those_that_open_clip_reads(
    flags: dict[str, str], model: str | None, as_one: bool
) -> None:
    if model is not None:
        flags = {**flags, "model": model}
    pairs = [
        [f"--{name}={value}"] if as_one else [f"--{name}", value] for name, value in flags.items()
    ]
    words = [*(word for pair in pairs for word in pair), *TRAIN, "--warmup", "0"]
    read = params.parse_args(words)
    ours = options(translated(words))
    defaults = {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}
    for name, default in defaults.items():
        expected = getattr(read, "wd" if name == "weight_decay" else name)
        assert float(ours.get(f"optim.{name}", default)) == pytest.approx(expected)
    assert int(ours["scale.samples_seen"]) == read.epochs * 1000
    assert int(ours["scale.global_batch_size"]) == read.batch_size * read.accum_freq
    assert ours["model.name"] == read.model


# ---- the page and the command -------------------------------------------------------------------
def test_the_page_has_every_flag_and_a_command_that_is_ours() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "make docs writes it"
    typed, printed = page.split("```bash\nsiftclip from-open-clip ")[1].split("```text\n")
    words = shlex.split(typed.split("```")[0].replace("\\\n", ""))
    assert str(translated(words)) == printed.split("\n```")[0]


def test_the_command(cli: Callable[..., Any]) -> None:
    found = cli("from-open-clip", "--", *TRAIN, "--model", "ViT-B-32")
    assert found.returncode == 0, found.stderr
    assert "model.name=ViT-B-32" in found.stdout
    wrong = cli("from-open-clip", "--modl", "x")
    assert wrong.returncode == 2
    assert "Did you mean --model?" in wrong.stderr
    assert "usage: siftclip from-open-clip" in cli("from-open-clip").stdout
