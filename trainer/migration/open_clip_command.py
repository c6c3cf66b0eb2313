"""A command line of open_clip's training as ours, and what of it has no counterpart."""

from __future__ import annotations

import ast
import difflib
import posixpath
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from siftclip.errors import InputError
from siftclip.redaction import begins_as_url
from siftclip.trainer.migration.open_clip_flags import FLAGS, MANY, Flag
from siftclip.trainer.settings.optim import OptimSettings

Given = Mapping[str, Sequence[str]]  # flag -> its values

_MAIN = re.compile(r"(.*\.)?main|.*main\.py")
_PIPED = re.compile(r"pipe:.*?(s3://\S+|gs://\S+|https?://\S+).*")
_PRECISIONS = {
    "amp": "16-mixed",
    "amp_bf16": "bf16-mixed",
    "amp_bfloat16": "bf16-mixed",
    "bf16": "bf16-true",
    "pure_bf16": "bf16-true",
    "fp32": "tf32",
}
_SCHEDULES = {"cosine": "cosine", "const": "const", "const-cooldown": "cooldown"}


@dataclass(frozen=True, slots=True)
class Launch:
    """How open_clip was launched."""

    nodes: int = 1
    gpus: int = 1  # of each node
    known: bool = True  # the command says it


@dataclass(slots=True)
class Translation:
    """Our command, and notes about what of theirs it is not."""

    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    launch: Launch = field(default_factory=Launch)

    def __str__(self) -> str:
        """Write both for a terminal or a shell script: notes are comments."""
        start = ["siftclip train"]
        if self.launch.nodes > 1:
            start = [
                f"torchrun --nnodes {self.launch.nodes} --nproc_per_node {self.launch.gpus} "
                "-m siftclip.trainer.cli train"
            ]
        words = [shlex.quote(word) for word in self.words]
        return "\n".join([*(f"# {note}" for note in self.notes), " \\\n  ".join(start + words)])


def translated(words: Sequence[str]) -> Translation:
    """Translate a command line.

    Args:
        words: flags of open_clip's main branch of June 2026, with or without what launches it:
            `torchrun --nproc_per_node 4 -m open_clip_train.main --model ViT-B-32`.

    Raises:
        InputError: a flag is none of open_clip's, or its value is missing or none that it takes.
    """
    launch, flags = _split(words)
    given = _read(flags)
    result = Translation(launch=launch)
    steps = _budget(given, result)
    _data(given, result)
    _model(given, result)
    _loss(given, result)
    _optimiser(given, result, steps)
    _devices(given, result)
    _run(given, result)
    for name, values in given.items():
        flag = FLAGS[name]
        if flag.kind == "option":
            result.words.append(flag.ours.format(_value(",".join(values))))
        elif flag.kind in ("missing", "other"):
            result.notes.append(f"{name}: {flag.note}")
    return result


# ---- reading ------------------------------------------------------------------------------------
def _split(words: Sequence[str]) -> tuple[Launch, list[str]]:
    """Part what launches open_clip from its flags."""
    main = next((at for at, word in enumerate(words) if _MAIN.fullmatch(word)), None)
    if main is None:
        return Launch(known=False), list(words)
    launcher = " ".join(words[:main]).replace("=", " ").replace("-", "_")
    gpus = re.search(r"__nproc_per_node (\d+)", launcher)
    nodes = re.search(r"__nnodes (\d+)(?!\d*:)", launcher)
    alone = gpus is None and "torchrun" not in launcher and "srun" not in launcher
    return (
        Launch(
            nodes=1 if nodes is None else int(nodes[1]),
            gpus=1 if gpus is None else int(gpus[1]),
            known=alone or gpus is not None,
        ),
        list(words[main + 1 :]),
    )


def _read(words: Sequence[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    at = 0
    while at < len(words):
        typed, equals, value = words[at].partition("=")
        flag = _flag(typed)
        at += 1
        values = [value] if equals else []
        most = 1 if flag.values == 1 else len(words) if flag.values == MANY else 0
        while not equals and len(values) < most and at < len(words) and words[at][:2] != "--":
            values.append(words[at])
            at += 1
        if flag.values == 1 and not values:
            raise InputError(f"{flag.name} needs a value.")
        if flag.values == 0 and values:
            raise InputError(f"{flag.name} takes no value. Got {value!r}.")
        given[flag.name] = values
    return given


def _flag(typed: str) -> Flag:
    """Find a flag by its name, or as argparse does by the beginning of one."""
    found = {FLAGS[name].name for name in FLAGS if name.startswith(typed) and len(typed) > 2}
    if typed in FLAGS:
        return FLAGS[typed]
    if len(found) == 1:
        return FLAGS[found.pop()]
    if found:
        raise InputError(f"{typed} may be {' or '.join(sorted(found))}. Write it out.")
    close = difflib.get_close_matches(typed, FLAGS, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise InputError(f"{typed!r} is no flag of open_clip's training.{hint}")


def _last(given: Given, name: str, default: str) -> str:
    return given[name][-1] if given.get(name) else default


def _number(given: Given, name: str, default: str, kind: Callable[[str], float] = float) -> float:
    typed = _last(given, name, default)
    try:
        return kind(typed)
    except ValueError:
        raise InputError(f"{name} must be a number. Got {typed!r}.") from None


def _count(given: Given, name: str, default: str = "") -> int:
    count = int(_number(given, name, default, int))
    if count < 1:
        raise InputError(f"{name} must be at least 1. Got {count}.")
    return count


def _value(typed: str) -> str:
    """Write a value as Hydra reads it: text with other than plain characters in quotes."""
    if re.fullmatch(r"[\w./:@%+~,*?-]*", typed):
        return typed
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", typed)
    return f"'{escaped}'"


# ---- translating --------------------------------------------------------------------------------
def _budget(given: Given, result: Translation) -> int | None:
    """Translate length and batch; return the steps of the run, if they are known."""
    launch = result.launch
    devices = launch.nodes * launch.gpus
    batch, pieces = _count(given, "--batch-size", "64"), _count(given, "--accum-freq", "1")
    global_batch = batch * pieces * devices
    if not launch.known:
        result.notes.append(
            "the number of GPUs is not said and taken to be 1: scale.global_batch_size is of all "
            "devices"
        )
    epochs = _count(given, "--epochs", "32")
    total: int | None = None
    if "--train-num-samples" in given:
        total = epochs * _count(given, "--train-num-samples")
    else:
        result.notes.append(
            f"--train-num-samples is not given: N in scale.samples_seen=N is {epochs} times the "
            "samples of the pool"
        )
    result.words += [
        f"scale.samples_seen={'N' if total is None else total}",
        f"scale.global_batch_size={global_batch}",
    ]
    if pieces > 1:
        result.words.append(f"trainer.micro_batch_size={batch}")
    if launch.gpus > 1 and launch.nodes == 1:
        result.words.append(f"trainer.devices={launch.gpus}")
    return None if total is None else -(-total // global_batch)


def _data(given: Given, result: Translation) -> None:
    result.words[:0] = [
        f"pool.root={_value(_root(given, result))}",
        "selector=random",
        "selector.fraction=1",
    ]
    if _last(given, "--dataset-type", "webdataset") not in ("webdataset", "auto"):
        result.notes.append(f"--dataset-type: {FLAGS['--dataset-type'].note}")
    for name, read in (("--image-key", "jpg;png;jpeg;webp"), ("--text-key", "txt")):
        if set(_last(given, name, read).split(";")) - set(read.split(";")):
            result.notes.append(f"{name}: {FLAGS[name].note}")


def _root(given: Given, result: Translation) -> str:
    sources = _last(given, "--train-data", "").split("::")
    if len(sources) > 1:
        result.notes.append(
            f"--train-data: {len(sources)} sources are there, and a pool is one folder: put "
            "their tars into one"
        )
    piped = _PIPED.fullmatch(sources[0])
    source = sources[0] if piped is None else piped[1]
    if not source.endswith(".tar"):
        told = "is no list of tars" if source else "is not given"
        result.notes.append(f"--train-data {told}: pool.root is a folder of tars, or a prefix")
        return "FOLDER"
    return posixpath.dirname(source) or "."


def _model(given: Given, result: Translation) -> None:
    result.words += ["model=open_clip", f"model.name={_value(_last(given, '--model', 'RN50'))}"]
    pretrained, resumed = _last(given, "--pretrained", ""), _last(given, "--resume", "")
    if resumed and resumed != "latest":
        result.notes.append(
            "--resume: weights alone are read; moments of the optimiser and the place in the "
            "data begin anew"
        )
        pretrained = resumed
    if pretrained:
        result.words.append(f"model.pretrained={_value(pretrained)}")
    sizes = given.get("--force-image-size", [])
    if sizes:
        size = sizes[0] if len(sizes) == 1 else f"[{','.join(sizes)}]"
        result.words.append(f"model.options.force_image_size={size}")
    if given.get("--aug-cfg"):
        pairs = [_pair("--aug-cfg", word) for word in given["--aug-cfg"]]
        result.words.append(f"model.augmentation={{{', '.join(pairs)}}}")


def _pair(flag: str, word: str) -> str:
    """Write one of `--aug-cfg scale="(0.5, 1)" use_timm=True` as our command line has it."""
    key, equals, typed = word.partition("=")
    if not equals:
        raise InputError(f"{flag} must be KEY=VALUE. Got {word!r}.")
    try:
        value = ast.literal_eval(typed)
    except (ValueError, SyntaxError):
        value = typed
    if isinstance(value, tuple | list):
        return f"{key}: [{', '.join(map(str, value))}]"
    return f"{key}: {str(value).lower() if isinstance(value, bool) else value}"


def _loss(given: Given, result: Translation) -> None:
    name = _last(given, "--model", "RN50").lower()
    teacher = _last(given, "--distill-model", "")
    if "--siglip" in given:
        result.words.append("loss=siglip")
        if "--loss-dist-impl" in given:
            result.words.append(f"loss.dist_impl={_last(given, '--loss-dist-impl', '')}")
    elif teacher:
        result.words += [
            "loss=distill",
            f"loss.teacher.model.name={_value(teacher)}",
            f"loss.teacher.model.pretrained={_value(_last(given, '--distill-pretrained', 'null'))}",
        ]
    elif name.startswith("coca"):
        result.words.append("loss=coca")
        for flag, option in (
            ("--coca-caption-loss-weight", "caption_weight"),
            ("--coca-contrastive-loss-weight", "contrastive_weight"),
        ):
            if flag not in given:
                continue
            if _number(given, flag, "") <= 0:
                result.notes.append(
                    f"{flag}: it must be above 0 here; training on one of both losses is missing"
                )
            else:
                result.words.append(f"loss.{option}={_last(given, flag, '')}")


def _optimiser(given: Given, result: Translation, steps: int | None) -> None:
    _other_optimiser(given, result)
    is_vit = "vit" in _last(given, "--model", "RN50").lower()
    warmup = int(_number(given, "--warmup", "10000", int))
    if steps is not None and warmup > steps:
        result.notes.append(f"--warmup {warmup} is longer than the run of {steps} steps")
        warmup = steps
    schedule = _last(given, "--lr-scheduler", "cosine")
    if schedule not in _SCHEDULES:
        raise InputError(
            f"--lr-scheduler must be one of {', '.join(_SCHEDULES)}. Got {schedule!r}."
        )
    ours: dict[str, float | str] = {
        "lr": _number(given, "--lr", "5e-4"),
        "beta1": _number(given, "--beta1", "0.9"),
        "beta2": _number(given, "--beta2", "0.98" if is_vit else "0.999"),
        "eps": _number(given, "--eps", "1e-6" if is_vit else "1e-8"),
        "weight_decay": _number(given, "--wd", "0.2"),
        "warmup_steps": warmup,
        "schedule": _SCHEDULES[schedule],
        "decay_rule": "open_clip_4",
    }
    if "--skip-scheduler" in given:
        ours |= {"warmup_steps": 0, "schedule": "const"}
    elif schedule == "const-cooldown":
        ours |= {
            "cooldown_end_lr": _number(given, "--lr-cooldown-end", "0"),
            "cooldown_power": _number(given, "--lr-cooldown-power", "1"),
        }
        epochs = _count(given, "--epochs", "32")
        cooled = _number(given, "--epochs-cooldown", "0", int)
        result.words.append(
            "optim.cooldown_steps="
            + ("N" if steps is None else str(max(1, round(steps * cooled / epochs))))
        )
    defaults = OptimSettings()
    result.words += [
        f"optim.{name}={value}" for name, value in ours.items() if getattr(defaults, name) != value
    ]
    if given.get("--wd-exclude"):
        result.words.append(f"optim.no_decay=[{','.join(given['--wd-exclude'])}]")


def _other_optimiser(given: Given, result: Translation) -> None:
    """Translate what takes AdamW's place."""
    name = _last(given, "--opt", "adamw")
    if name == "adamw":
        for flag in ("--opt-kwargs", "--opt-fallback-list", "--momentum"):
            if given.get(flag):
                result.notes.append(f"{flag}: has no effect with adamw")
        return
    result.words.append(f"optim.timm.name={_value(name.removeprefix('timm/'))}")
    if "--momentum" in given:
        result.words.append(f"optim.timm.momentum={_number(given, '--momentum', '')}")
    for word in given.get("--opt-kwargs", ()):
        key, _, value = _pair("--opt-kwargs", word).partition(": ")
        result.words.append(f"optim.timm.{key}={value}")
    if given.get("--opt-fallback-list"):
        result.words.append(f"optim.timm.fallback=[{','.join(given['--opt-fallback-list'])}]")


def _devices(given: Given, result: Translation) -> None:
    precision = _last(given, "--precision", "amp_bf16")
    if precision in _PRECISIONS:
        result.words.append(f"trainer.precision={_PRECISIONS[precision]}")
    else:
        result.notes.append(f"--precision {precision}: {', '.join(_PRECISIONS)} are there")
    if _last(given, "--device", "cuda") != "cuda":
        result.words.append(f"trainer.accelerator={_last(given, '--device', '')}")
    if _last(given, "--fsdp-checkpoint", "full") != "full":
        result.notes.append(f"--fsdp-checkpoint: {FLAGS['--fsdp-checkpoint'].note}")


def _run(given: Given, result: Translation) -> None:
    logs, name = _last(given, "--logs", ""), _last(given, "--name", "")
    if name:
        result.words.append(f"run_dir={_value(posixpath.join(logs or 'logs', name))}")
    elif logs:
        result.words.append(f"output_dir={_value(logs)}")
    backends = {word.strip() for word in _last(given, "--report-to", "").split(",")}
    if not backends & {"wandb", "all"}:
        result.words.append("logger.wandb=false")
    if backends & {"tensorboard", "all"}:
        result.words.append("logger.tensorboard=true")
    if "trackio" in backends:
        result.notes.append(f"--report-to: {FLAGS['--report-to'].note}")
    for flag in ("--imagenet-val", "--imagenet-v2"):
        if flag in given:
            result.notes.append(
                f"{flag}: siftclip eval download gets tasks in clip-benchmark's layout; then "
                "eval.root=FOLDER evaluates at the end, and eval.during.every_n_steps=N on the way"
            )
    if begins_as_url(logs):
        result.notes.append("--logs: runs are written to folders of this machine")
