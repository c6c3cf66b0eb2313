"""The trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from siftclip.errors import InputError
from siftclip.trainer.settings.fields.marks import Example, Open, Rare, Words
from siftclip.trainer.settings.fields.section import Auto, Count, Positive, Section, Share
from siftclip.trainer.settings.trainer_options import option_faults

Precision: TypeAlias = Literal[
    "auto", "bf16-mixed", "16-mixed", "32-true", "tf32", "bf16-true", "64-true"
]
Strategy: TypeAlias = Literal["auto", "ddp", "fsdp"]
_Node: TypeAlias = Mapping[str, Any]
_NODES = Words("a list of nodes with a _target_ and its arguments")
_DEVICES = Words("auto, a number of devices on each node, or a list of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings(Section):
    """Devices, precision, memory and checkpoints."""

    PLACE: ClassVar[str] = "trainer"

    accelerator: Annotated[str, Example("cpu")] = "auto"
    """Lightning's name of the hardware: auto, gpu, cpu, ..."""

    devices: Annotated[int | str | tuple[int, ...], _DEVICES, Example("8")] = "auto"
    """Devices on each node: a number, or a list of them; auto: all, or what a launcher started."""

    num_nodes: Annotated[int | str, Words("auto or an integer of at least 1")] = "auto"
    """Nodes; auto: what torchrun or srun has started, else 1."""

    strategy: Strategy = "auto"
    """auto: one device unchanged, several with ddp; fsdp shards the weights."""

    fsdp_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which type fsdp averages gradients over ranks; bf16 halves the traffic, and is coarser."""

    timeout_minutes: Positive | None = None
    """How long a rank waits for the others in an exchange; null: torch's, 10 with NCCL, else 30."""

    precision: Precision = "auto"
    """auto: bf16-mixed where a GPU has it, else 32-true."""

    micro_batch_size: Count | Auto | None = None
    """Samples a device takes at a time, all negatives kept; null: all; auto: as many as fit."""

    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    compile: bool = False
    """Compile both towers with torch.compile."""

    channels_last: bool = False
    """Images in the layout that convolutions of a GPU prefer: for ResNets and ConvNeXt."""

    sync_batchnorm: bool = False
    """Batch norms over all devices."""

    deterministic: bool = False
    """Equal bits in every run on the same hardware; slower on a GPU, or an error of torch."""

    max_skipped_fraction: Share = 0.01
    """Stop if a larger share of the steps has infinite or NaN gradients, which are skipped."""

    log_every_n_steps: Count = 10
    """Steps between two records of the log."""

    checkpoint_every_n_steps: Count = 100
    """Steps between two checkpoints: a killed run loses at most this many."""

    checkpoint_every_minutes: Positive | None = None
    """Write one also when this long has passed since the last; null: by steps alone."""

    keep_checkpoints: Count = 2
    """How many of the last checkpoints are kept: if one is damaged, the one before serves."""

    keep_every_n_steps: Count | None = None
    """Also keep the checkpoints of every N steps for good."""

    background_checkpoints: bool = False
    """Train on while a checkpoint is written; takes memory of the CPU for one more."""

    sharded_checkpoints: bool = False
    """With fsdp every rank writes its part of a checkpoint, which is then a folder."""

    profile: bool = False
    """Write a trace of steps 11 to 20, by torch's profiler, into profile/ of the run's folder."""

    callbacks: Annotated[
        tuple[_Node, ...] | None,
        Rare(),
        _NODES,
        Example("[{_target_:lightning.pytorch.callbacks.DeviceStatsMonitor}]"),
    ] = None
    """Callbacks of Lightning, called after Siftclip's own and before checkpoints are written."""

    loggers: Annotated[
        tuple[_Node, ...] | None,
        Rare(),
        _NODES,
        Example("[{_target_:lightning.pytorch.loggers.CSVLogger,save_dir:logs}]"),
    ] = None
    """Loggers of Lightning, after Siftclip's own."""

    plugins: Annotated[
        tuple[_Node, ...] | None,
        Rare(),
        _NODES,
        Example("[{_target_:lightning.pytorch.plugins.environments.LightningEnvironment}]"),
    ] = None
    """Plugins of Lightning: an environment of a cluster, or a precision in place of precision."""

    profiler: Annotated[
        _Node | None,
        Rare(),
        Open(),
        Words("a node with a _target_ and its arguments"),
        Example("{_target_:lightning.pytorch.profilers.SimpleProfiler,dirpath:.,filename:times}"),
    ] = None
    """A profiler of Lightning."""

    options: Annotated[
        Mapping[str, Any] | None, Rare(), Open(), Example("{detect_anomaly:true}")
    ] = None
    """Other arguments of lightning.Trainer, but those that would break a promise of a run."""

    def check(self) -> None:
        self._check_extensions()
        kept, written = self.keep_every_n_steps, self.checkpoint_every_n_steps
        if kept is not None and kept % written:
            raise InputError(
                "trainer.keep_every_n_steps must be a multiple of "
                f"trainer.checkpoint_every_n_steps={written}, or no checkpoint is there to be "
                f"kept. Got {kept}."
            )
        if self.precision == "16-mixed" and self.strategy == "fsdp":
            raise InputError(
                "trainer.precision=16-mixed does not go with trainer.strategy=fsdp: scaling of "
                "sharded gradients is not supported. Use bf16-mixed, or trainer.strategy=ddp."
            )

        if self.fsdp_reduce_dtype != "fp32" and self.strategy != "fsdp":
            raise InputError(
                "trainer.fsdp_reduce_dtype is of sharded weights. Set trainer.strategy=fsdp, or "
                f"leave it at fp32. Got {self.fsdp_reduce_dtype!r}."
            )

        if self.sharded_checkpoints and self.strategy != "fsdp":
            raise InputError(
                "trainer.sharded_checkpoints=true needs sharded weights. Set "
                "trainer.strategy=fsdp, or leave it at false: checkpoints are then one file. A run "
                "continues from either kind, with any strategy."
            )
        if self.sharded_checkpoints and self.background_checkpoints:
            raise InputError(
                "trainer.sharded_checkpoints and trainer.background_checkpoints exclude each "
                "other: ranks write their parts together. Set one of them to false."
            )

    def _check_extensions(self) -> None:
        lists = {name: getattr(self, name) or () for name in ("callbacks", "loggers", "plugins")}
        for name, nodes in {**lists, "profiler": [self.profiler] if self.profiler else []}.items():
            for node in nodes:
                if not isinstance(node.get("_target_"), str):
                    raise InputError(
                        f"trainer.{name} needs a _target_, the name of a class with its module, "
                        f"and arguments. Got {dict(node)!r}."
                    )
        faults = [str(fault) for fault in option_faults(self.options or {}, "trainer.options")]
        if faults:
            raise InputError("\n  ".join(faults))
