"""Every flag of open_clip's training command, of 3.3 and of its main branch of June 2026.

The one list behind `siftclip from-open-clip` and the table in docs/open_clip.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["option", "computed", "always", "missing", "other"]
MANY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A flag of open_clip, and what stands for it here."""

    name: str
    values: int  # how many words follow; MANY: all up to the next flag
    kind: Kind  # option: as it is; computed: with others; always: so here; missing; other: no CLIP
    ours: str = ""  # the option, with {} for the value
    note: str = ""  # what differs, or why there is none
    aliases: tuple[str, ...] = ()


def _option(name: str, ours: str, values: int = 1, note: str = "") -> Flag:
    return Flag(name=name, values=values, kind="option", ours=ours, note=note)


def _computed(name: str, ours: str, note: str = "", values: int = 1) -> Flag:
    return Flag(name=name, values=values, kind="computed", ours=ours, note=note)


def _always(name: str, note: str, values: int = 0) -> Flag:
    return Flag(name=name, values=values, kind="always", note=note)


def _missing(name: str, note: str, values: int = 1) -> Flag:
    return Flag(name=name, values=values, kind="missing", note=note)


def _other(name: str, note: str, values: int = 1) -> Flag:
    return Flag(name=name, values=values, kind="other", note=note)


_AUDIO = "audio, which is not trained on here"
_NAFLEX = "images of variable resolution are missing"
_BUCKETS = "ordering samples by the length of captions is missing"

_DATA = (
    _computed("--train-data", "pool.root=FOLDER", "all tars of the folder or prefix"),
    _missing("--train-data-upsampling-factors", "pools of several sources are missing"),
    _computed("--train-num-samples", "scale.samples_seen", "times the epochs"),
    _missing("--val-data", "the loss of held-out pairs is missing; evaluation is by tasks"),
    _missing("--val-num-samples", "as --val-data"),
    _computed("--dataset-type", "", "webdataset is what pools are; csv and synthetic are missing"),
    _always(
        "--dataset-resampled",
        "each sample comes once in a pass, in an order by the seed: nothing is drawn twice",
    ),
    _missing("--csv-separator", "pools are tars"),
    _missing("--csv-img-key", "pools are tars"),
    _missing("--csv-caption-key", "pools are tars"),
    _computed("--image-key", "", "jpg, jpeg, png and webp are read; other names are missing"),
    _option(
        "--max-image-pixels",
        "data.max_image_pixels={}",
        note="larger images are counted as bad samples, and others take their place",
    ),
    _computed("--text-key", "", "captions are in .txt; other names are missing"),
    _missing("--json-text-key", "captions of json members are missing"),
    _missing("--json-text-key-probs", "several captions of a sample are missing", MANY),
    _option("--workers", "data.num_workers={}"),
    _missing("--length-bucketing", _BUCKETS, 0),
    _missing("--bucket-pool", _BUCKETS),
    _missing("--bucket-chunk", _BUCKETS),
    _missing("--bucket-prefetch-pools", _BUCKETS),
    _missing("--text-pad-multiple", _BUCKETS),
)
_BUDGET = (
    _computed("--batch-size", "scale.global_batch_size", "of one GPU there, of all devices here"),
    _computed("--epochs", "scale.samples_seen", "times the samples of an epoch"),
    _computed(
        "--accum-freq", "trainer.micro_batch_size", "all negatives kept; gradients are exact"
    ),
    _computed("--epochs-cooldown", "optim.cooldown_steps", "in steps"),
)
_OPTIMISER = (
    _computed("--opt", "optim.timm.name=NAME", "adamw, or timm/NAME; nadamw is timm's nadamw"),
    _computed("--opt-kwargs", "optim.timm.KEY=VALUE", values=MANY),
    _computed("--opt-fallback-list", "optim.timm.fallback=[PATTERN]", "Muon family", MANY),
    _computed("--momentum", "optim.timm.momentum"),
    _computed("--lr", "optim.lr"),
    _computed("--beta1", "optim.beta1"),
    _computed("--beta2", "optim.beta2", "0.98 for names with ViT, else 0.999, as there"),
    _computed("--eps", "optim.eps", "1e-6 for names with ViT, else 1e-8, as there"),
    _computed("--wd", "optim.weight_decay"),
    _computed("--warmup", "optim.warmup_steps", "part of the run: at most all of it"),
    _computed("--wd-exclude", "optim.no_decay=[PATTERN]", values=MANY),
    Flag(
        name="--image-layer-decay",
        values=1,
        kind="option",
        ours="optim.image_layer_decay={}",
        aliases=("--visual-layer-decay",),
    ),
    _option("--text-layer-decay", "optim.text_layer_decay={}"),
    _other("--audio-layer-decay", _AUDIO),
    _missing("--text-pooler-own-group", "the pooler is in the group of the head", 0),
    _computed("--skip-scheduler", "optim.schedule=const optim.warmup_steps=0", values=0),
    _computed("--lr-scheduler", "optim.schedule", "const-cooldown is cooldown"),
    _computed("--lr-cooldown-end", "optim.cooldown_end_lr"),
    _computed("--lr-cooldown-power", "optim.cooldown_power"),
    _option("--grad-clip-norm", "optim.grad_clip_norm={}"),
)
_MODEL = (
    _computed("--model", "model=open_clip model.name=NAME"),
    _computed("--pretrained", "model.pretrained=TAG|FILE"),
    _missing(
        "--pretrained-image",
        "weights of a package of image models; model.pretrained_image=FILE reads those of a file",
        0,
    ),
    _option("--lock-image", "model.lock.image=true", 0),
    _option("--lock-image-unlocked-groups", "model.lock.image_unlocked_groups={}"),
    _option("--lock-image-freeze-bn-stats", "model.lock.image_freeze_bn_stats=true", 0),
    _option("--lock-text", "model.lock.text=true", 0),
    _option("--lock-text-unlocked-layers", "model.lock.text_unlocked_layers={}"),
    _always(
        "--lock-text-freeze-layer-norm",
        "locked layer norms stay as they are; model.lock.text_freeze_layer_norm=false trains them",
    ),
    _option("--image-mean", "model.options.image_mean=[{}]", MANY),
    _option("--image-std", "model.options.image_std=[{}]", MANY),
    _option("--image-interpolation", "model.options.image_interpolation={}"),
    _option("--image-resize-mode", "model.options.image_resize_mode={}"),
    _computed("--aug-cfg", "model.augmentation={KEY: VALUE}", values=MANY),
    _option("--force-context-length", "model.options.force_context_length={}"),
    _computed("--force-image-size", "model.options.force_image_size=N|[H,W]", values=MANY),
    _option("--force-quick-gelu", "model.options.force_quick_gelu=true", 0),
    _option("--force-patch-dropout", "model.options.force_patch_dropout={}"),
    _option("--force-custom-text", "model.options.force_custom_text=true", 0),
    _missing("--cache-dir", "HF_HOME says where weights and tokenizers are kept"),
    _missing("--use-bnb-linear", "layers of bitsandbytes are missing"),
)
_LOSS = (
    _always("--local-loss", "gradients are those of the whole batch, at the cost of local ones"),
    _always("--gather-with-grad", "gradients are those of the whole batch"),
    _computed("--siglip", "loss=siglip", values=0),
    _computed("--loss-dist-impl", "loss.dist_impl", "bidir, shift, reduce or gather"),
    _computed("--coca-caption-loss-weight", "loss.caption_weight", "for CoCa models"),
    _computed("--coca-contrastive-loss-weight", "loss.contrastive_weight", "above 0"),
    _computed("--distill-model", "loss=distill loss.teacher.model.name=NAME"),
    _computed("--distill-pretrained", "loss.teacher.model.pretrained=TAG"),
)
_DEVICES = (
    _computed("--precision", "trainer.precision", "fp32 is tf32, which open_clip allows itself"),
    _option("--grad-checkpointing", "trainer.grad_checkpointing=true", 0),
    _option("--torchcompile", "trainer.compile=true", 0, "of the towers"),
    _always("--torchcompile-strategy", "the towers are compiled: two graphs", 1),
    _missing("--torchcompile-backend", "inductor compiles"),
    _missing("--torchcompile-mode", "torch's default mode"),
    _option("--use-bn-sync", "trainer.sync_batchnorm=true", 0),
    _always("--ddp-static-graph", "is not needed with the checkpointing that open_clip has"),
    _option("--fsdp", "trainer.strategy=fsdp", 0),
    _missing("--fsdp-no-reshard-after-forward", "weights are let go after each block", 0),
    _missing("--fsdp-offload-cpu", "weights stay on the devices", 0),
    _computed("--fsdp-checkpoint", "", "full; one file that any number of ranks reads"),
    _computed("--device", "trainer.accelerator", "cuda is auto"),
    _missing("--torchscript", "of 3.3 alone; torch has given it up", 0),
    _missing("--trace", "of 3.3 alone; torch has given it up", 0),
    _missing("--horovod", "of 3.3 alone; torchrun or srun launch", 0),
    _always("--dist-url", "torchrun or srun say it", 1),
    _always("--dist-backend", "NCCL on GPUs, gloo on CPUs", 1),
    _always("--no-set-device-rank", "the launcher says which device a rank has"),
    _option("--seed", "seed={}"),
)
_RUN = (
    _computed("--logs", "output_dir=FOLDER"),
    _computed("--name", "run_dir=FOLDER/NAME"),
    _missing("--log-local", "each run has one log", 0),
    _computed("--report-to", "logger.wandb, logger.tensorboard", "trackio is missing"),
    _option("--wandb-notes", "logger.notes={}"),
    _option("--wandb-project-name", "logger.project={}"),
    _missing("--log-every-n-steps", "the bar, or a line every 30 seconds, shows each step"),
    _option("--log-metric-every-n-steps", "trainer.log_every_n_steps={}"),
    _missing("--train-loss-ema-samples", "the log has means over trainer.log_every_n_steps steps"),
    _always(
        "--save-frequency",
        "trainer.checkpoint_every_n_steps (100), and trainer.keep_every_n_steps for good",
        1,
    ),
    _always("--save-most-recent", "a run continues from its last checkpoint"),
    _always("--delete-previous-checkpoint", "trainer.keep_checkpoints=2 are kept"),
    _computed("--resume", "the same command again", "a file: model.pretrained=FILE, weights alone"),
    _computed(
        "--imagenet-val", "eval.root=FOLDER eval.tasks=[imagenet1k]", "clip-benchmark's tars"
    ),
    _computed("--imagenet-v2", "eval.root=FOLDER eval.tasks=[imagenetv2]", "clip-benchmark's tars"),
    _always("--zeroshot-frequency", "at the end; eval.during.every_n_steps while training", 1),
    _missing("--val-frequency", "as --val-data"),
    _missing("--val-retrieval-chunk-size", "as --val-data"),
    _missing("--val-retrieval-precision", "as --val-data"),
    _missing("--debug", "HYDRA_FULL_ERROR=1 shows tracebacks", 0),
    _missing(
        "--copy-codebase", "versions.json of a run says the commit and whether it was changed", 0
    ),
    _missing("--remote-sync", "copies of runs elsewhere are missing"),
    _missing("--remote-sync-frequency", "as --remote-sync"),
    _missing("--remote-sync-protocol", "as --remote-sync"),
)
_OTHERS = (
    *(
        _missing(f"--{name}", _NAFLEX, values)
        for name, values in (
            *(("use-naflex", 0), ("force-naflex-vision", 0), ("naflex-num-train-image-tokens", 1)),
            *(("naflex-patch-sizes", MANY), ("naflex-patch-size-probs", MANY)),
            *(("naflex-seq-lens", MANY), ("naflex-seq-len-probs", MANY)),
            *(("naflex-max-tokens-per-batch", 1), ("naflex-max-text-tokens", 1)),
            *(("naflex-batch-divisor", 1), ("naflex-loss-scale", 1), ("naflex-pad-multiple", 1)),
        )
    ),
    *(
        _other(f"--{name}", _AUDIO, values)
        for name, values in (
            *(("audio-ext", 1), ("pretrained-audio", 1), ("audio-fill", 1), ("audio-trunc", 1)),
            *(("audio-fusion", 0), ("audio-int16-normalize", 0), ("audio-zeroshot-dataset", 1)),
            *(("audio-zeroshot-split", 1), ("audio-zeroshot-audio-key", 1)),
            *(("audio-zeroshot-target-key", 1), ("audio-zeroshot-class-key", 1)),
            *(("audio-zeroshot-template", 1), ("audio-zeroshot-workers", 1)),
            *(("audio-zeroshot-multiprocessing-context", 1), ("audio-multiprocessing-context", 1)),
        )
    ),
)

GROUPS: dict[str, tuple[Flag, ...]] = {
    "Data": _DATA,
    "Length and batch": _BUDGET,
    "Optimiser": _OPTIMISER,
    "Model": _MODEL,
    "Loss": _LOSS,
    "Devices and precision": _DEVICES,
    "Runs, logs and evaluation": _RUN,
    "Variable resolution and audio": _OTHERS,
}
FLAGS = {
    name: flag for group in GROUPS.values() for flag in group for name in (flag.name, *flag.aliases)
}
