"""Old places of modules that have moved: they import for one release, with a warning.

`MOVED` is the one table of them. A module whose old name belongs to nothing now is the module at
its new place, under both names. Where a package has taken the old name of a module, as
`siftclip.trainer.optim`, the package answers for what the module held: see `answer_for_module`.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

# old module: new module
MOVED: dict[str, str] = {
    "siftclip.datamodules.batches": "siftclip.datamodules.streaming.batches",
    "siftclip.datamodules.clip_models": "siftclip.datamodules.models.load",
    "siftclip.datamodules.code_identity": "siftclip.datamodules.identity.code_identity",
    "siftclip.datamodules.columns": "siftclip.datamodules.selection.columns",
    "siftclip.datamodules.compaction": "siftclip.datamodules.selection.compaction",
    "siftclip.datamodules.connections": "siftclip.datamodules.storage.connections",
    "siftclip.datamodules.copies": "siftclip.datamodules.streaming.copies",
    "siftclip.datamodules.data_bench": "siftclip.trainer.bench.measure",
    "siftclip.datamodules.demo_pool": "siftclip.trainer.demo.pool",
    "siftclip.datamodules.demo_samples": "siftclip.trainer.demo.samples",
    "siftclip.datamodules.digit_scenes": "siftclip.trainer.demo.digit_scenes",
    "siftclip.datamodules.faults": "siftclip.datamodules.index.faults",
    "siftclip.datamodules.feature_files": "siftclip.datamodules.features.files",
    "siftclip.datamodules.feature_source": "siftclip.datamodules.features.provenance",
    "siftclip.datamodules.features": "siftclip.datamodules.features.store",
    "siftclip.datamodules.file_identity": "siftclip.file_identity",
    "siftclip.datamodules.files": "siftclip.files",
    "siftclip.datamodules.identities": "siftclip.datamodules.identity.identities",
    "siftclip.datamodules.image_sizes": "siftclip.datamodules.pool.image_sizes",
    "siftclip.datamodules.image_transform": "siftclip.datamodules.streaming.image_transform",
    "siftclip.datamodules.loader_process": "siftclip.datamodules.streaming.loader_process",
    "siftclip.datamodules.locks": "siftclip.locks",
    "siftclip.datamodules.metadata": "siftclip.datamodules.pool.metadata",
    "siftclip.datamodules.model_options": "siftclip.datamodules.models.options",
    "siftclip.datamodules.model_record": "siftclip.datamodules.models.record",
    "siftclip.datamodules.model_weights": "siftclip.datamodules.models.weights",
    "siftclip.datamodules.order": "siftclip.datamodules.streaming.order",
    "siftclip.datamodules.pool": "siftclip.datamodules.pool.pool",
    "siftclip.datamodules.pool_source": "siftclip.datamodules.selection.pool_source",
    "siftclip.datamodules.reader": "siftclip.datamodules.pool.reader",
    "siftclip.datamodules.remote_storage": "siftclip.datamodules.storage.remote",
    "siftclip.datamodules.row_features": "siftclip.datamodules.features.rows",
    "siftclip.datamodules.scoring": "siftclip.datamodules.selection.run",
    "siftclip.datamodules.selection": "siftclip.datamodules.selection.selection",
    "siftclip.datamodules.shard_cache": "siftclip.datamodules.storage.shard_cache",
    "siftclip.datamodules.step_plan": "siftclip.datamodules.streaming.step_plan",
    "siftclip.datamodules.storage": "siftclip.datamodules.storage.local",
    "siftclip.datamodules.streaming": "siftclip.datamodules.streaming.datamodule",
    "siftclip.datamodules.tar_index": "siftclip.datamodules.index.tar_index",
    "siftclip.datamodules.tar_walk": "siftclip.datamodules.index.tar_walk",
    "siftclip.datamodules.towers": "siftclip.trainer.models.towers",
    "siftclip.datamodules.uids": "siftclip.datamodules.index.uids",
    "siftclip.datamodules.weight_needs": "siftclip.datamodules.models.weight_needs",
    "siftclip.eval.aggregates": "siftclip.eval.results.aggregates",
    "siftclip.eval.agreement": "siftclip.agreement",
    "siftclip.eval.checksums": "siftclip.eval.download.checksums",
    "siftclip.eval.class_metrics": "siftclip.eval.metrics.class_metrics",
    "siftclip.eval.comparison": "siftclip.eval.reports.comparison",
    "siftclip.eval.convert_tasks": "siftclip.eval.download.convert_tasks",
    "siftclip.eval.download": "siftclip.eval.download.tasks",
    "siftclip.eval.encoding": "siftclip.eval.encoding.encoder",
    "siftclip.eval.error_analysis": "siftclip.eval.reports.error_analysis",
    "siftclip.eval.feature_cache": "siftclip.eval.encoding.feature_cache",
    "siftclip.eval.group_metrics": "siftclip.eval.metrics.group_metrics",
    "siftclip.eval.hub": "siftclip.eval.download.hub",
    "siftclip.eval.hub_errors": "siftclip.eval.download.hub_errors",
    "siftclip.eval.images": "siftclip.eval.tasks.images",
    "siftclip.eval.known_tasks": "siftclip.eval.tasks.known_tasks",
    "siftclip.eval.linear_probe": "siftclip.eval.probes.linear_probe",
    "siftclip.eval.logistic_fit": "siftclip.eval.probes.logistic_fit",
    "siftclip.eval.outcomes": "siftclip.eval.metrics.outcomes",
    "siftclip.eval.pair_metrics": "siftclip.eval.metrics.pair_metrics",
    "siftclip.eval.paired_tests": "siftclip.eval.significance.paired_tests",
    "siftclip.eval.preparation": "siftclip.eval.tasks.preparation",
    "siftclip.eval.probe_scores": "siftclip.eval.probes.probe_scores",
    "siftclip.eval.report": "siftclip.eval.reports.report",
    "siftclip.eval.resampling": "siftclip.eval.significance.resampling",
    "siftclip.eval.result_checks": "siftclip.eval.results.result_checks",
    "siftclip.eval.results": "siftclip.eval.results.files",
    "siftclip.eval.retrieval_metrics": "siftclip.eval.metrics.retrieval_metrics",
    "siftclip.eval.safe_tables": "siftclip.tables",
    "siftclip.eval.seed_comparison": "siftclip.eval.reports.seed_comparison",
    "siftclip.eval.seed_texts": "siftclip.eval.reports.seed_texts",
    "siftclip.eval.task_samples": "siftclip.eval.tasks.samples",
    "siftclip.eval.task_scores": "siftclip.eval.encoding.task_scores",
    "siftclip.eval.tasks": "siftclip.eval.tasks.task",
    "siftclip.eval.text_encoding": "siftclip.eval.encoding.texts",
    "siftclip.eval.weighted_metrics": "siftclip.eval.metrics.weighted_metrics",
    "siftclip.selectors.base": "siftclip.selectors.core.base",
    "siftclip.selectors.blocks": "siftclip.selectors.kernels.blocks",
    "siftclip.selectors.captions": "siftclip.selectors.methods.captions.caption_rules",
    "siftclip.selectors.checks": "siftclip.selectors.core.checks",
    "siftclip.selectors.clip_score": "siftclip.selectors.methods.clip_score",
    "siftclip.selectors.clipcov": "siftclip.selectors.methods.clipcov.clipcov",
    "siftclip.selectors.clipcov_greedy": "siftclip.selectors.methods.clipcov.greedy",
    "siftclip.selectors.clipcov_terms": "siftclip.selectors.methods.clipcov.terms",
    "siftclip.selectors.clusters": "siftclip.selectors.fitting.clusters",
    "siftclip.selectors.compose": "siftclip.selectors.core.compose",
    "siftclip.selectors.concepts": "siftclip.selectors.methods.concepts",
    "siftclip.selectors.covariance": "siftclip.selectors.fitting.covariance",
    "siftclip.selectors.datacomp_filters": "siftclip.selectors.methods.captions.datacomp_filters",
    "siftclip.selectors.density": "siftclip.selectors.methods.density",
    "siftclip.selectors.description": "siftclip.selectors.core.description",
    "siftclip.selectors.dynamics": "siftclip.selectors.methods.dynamics",
    "siftclip.selectors.elimination": "siftclip.selectors.methods.removal.elimination",
    "siftclip.selectors.errors": "siftclip.errors",
    "siftclip.selectors.external": "siftclip.selectors.methods.external",
    "siftclip.selectors.hardware": "siftclip.selectors.kernels.hardware",
    "siftclip.selectors.hashing": "siftclip.hashing",
    "siftclip.selectors.image_based": "siftclip.selectors.methods.image_based",
    "siftclip.selectors.infobatch": "siftclip.selectors.methods.infobatch",
    "siftclip.selectors.jest": "siftclip.selectors.methods.jest.jest",
    "siftclip.selectors.joint_sampling": "siftclip.selectors.methods.jest.joint_sampling",
    "siftclip.selectors.kmeans": "siftclip.selectors.fitting.kmeans",
    "siftclip.selectors.languages": "siftclip.selectors.methods.captions.languages",
    "siftclip.selectors.largest_product": "siftclip.selectors.kernels.largest_product",
    "siftclip.selectors.latent_classes": "siftclip.selectors.fitting.latent_classes",
    "siftclip.selectors.learnability": "siftclip.selectors.methods.jest.learnability",
    "siftclip.selectors.low_similarities": "siftclip.selectors.kernels.low_similarities",
    "siftclip.selectors.metaclip": "siftclip.selectors.methods.captions.metaclip",
    "siftclip.selectors.most_similar": "siftclip.selectors.kernels.most_similar",
    "siftclip.selectors.nearest": "siftclip.selectors.methods.nearest",
    "siftclip.selectors.negcliploss": "siftclip.selectors.methods.negcliploss.negcliploss",
    "siftclip.selectors.negcliploss_screening": "siftclip.selectors.methods.negcliploss.screening",
    "siftclip.selectors.neighbour_lists": "siftclip.selectors.kernels.neighbour_lists",
    "siftclip.selectors.noise": "siftclip.selectors.core.noise",
    "siftclip.selectors.normsim": "siftclip.selectors.methods.normsim",
    "siftclip.selectors.optimal_design": "siftclip.selectors.methods.removal.optimal_design",
    "siftclip.selectors.pair_log_sums": "siftclip.selectors.kernels.pair_log_sums",
    "siftclip.selectors.pair_losses": "siftclip.selectors.methods.jest.pair_losses",
    "siftclip.selectors.plugins": "siftclip.selectors.core.plugins",
    "siftclip.selectors.quota": "siftclip.selectors.methods.quota",
    "siftclip.selectors.ranks": "siftclip.ranks",
    "siftclip.selectors.rules": "siftclip.selectors.core.rules",
    "siftclip.selectors.running_covariance": "siftclip.selectors.methods.running_covariance",
    "siftclip.selectors.sampling": "siftclip.selectors.core.sampling",
    "siftclip.selectors.semdedup": "siftclip.selectors.methods.semdedup",
    "siftclip.selectors.source": "siftclip.selectors.core.source",
    "siftclip.selectors.stepwise": "siftclip.selectors.methods.removal.stepwise",
    "siftclip.selectors.sub_batch": "siftclip.selectors.core.sub_batch",
    "siftclip.selectors.uniform": "siftclip.selectors.methods.uniform",
    "siftclip.selectors.vas": "siftclip.selectors.methods.vas",
    "siftclip.selectors.vas_d": "siftclip.selectors.methods.removal.vas_d",
    "siftclip.trainer.agreement": "siftclip.trainer.runtime.rank_agreement",
    "siftclip.trainer.assembly": "siftclip.trainer.builders.assembly",
    "siftclip.trainer.budget": "siftclip.trainer.settings.budget",
    "siftclip.trainer.checkpointing": "siftclip.trainer.loop.checkpointing",
    "siftclip.trainer.cli.compare_command": "siftclip.trainer.cli.commands.compare_command",
    "siftclip.trainer.cli.data_bench_command": "siftclip.trainer.cli.commands.data_bench_command",
    "siftclip.trainer.cli.data_compact_command": "siftclip.trainer.cli.commands.data_compact_command",
    "siftclip.trainer.cli.demo_command": "siftclip.trainer.cli.commands.demo_command",
    "siftclip.trainer.cli.embed_command": "siftclip.trainer.cli.commands.embed_command",
    "siftclip.trainer.cli.eval_command": "siftclip.trainer.cli.commands.eval_command",
    "siftclip.trainer.cli.eval_diff_command": "siftclip.trainer.cli.commands.eval_diff_command",
    "siftclip.trainer.cli.eval_download_command": "siftclip.trainer.cli.commands.eval_download_command",
    "siftclip.trainer.cli.eval_watch_command": "siftclip.trainer.cli.commands.eval_watch_command",
    "siftclip.trainer.cli.export_command": "siftclip.trainer.cli.commands.export_command",
    "siftclip.trainer.cli.index_command": "siftclip.trainer.cli.commands.index_command",
    "siftclip.trainer.cli.score_command": "siftclip.trainer.cli.commands.score_command",
    "siftclip.trainer.cli.select_command": "siftclip.trainer.cli.commands.select_command",
    "siftclip.trainer.cli.target_command": "siftclip.trainer.cli.commands.target_command",
    "siftclip.trainer.cli.train_command": "siftclip.trainer.cli.commands.train_command",
    "siftclip.trainer.compilation": "siftclip.trainer.models.compilation",
    "siftclip.trainer.cores": "siftclip.trainer.runtime.cores",
    "siftclip.trainer.data_bench": "siftclip.trainer.bench.stage",
    "siftclip.trainer.demo": "siftclip.trainer.demo.stage",
    "siftclip.trainer.ema": "siftclip.trainer.optim.ema",
    "siftclip.trainer.embedding": "siftclip.trainer.stages.embed",
    "siftclip.trainer.environment": "siftclip.trainer.runtime.environment",
    "siftclip.trainer.eval_diff": "siftclip.trainer.stages.eval_diff",
    "siftclip.trainer.eval_download": "siftclip.trainer.stages.eval_download",
    "siftclip.trainer.eval_watch": "siftclip.trainer.stages.eval_watch",
    "siftclip.trainer.evaluate_during": "siftclip.trainer.stages.evaluate_during",
    "siftclip.trainer.evaluation": "siftclip.trainer.stages.evaluation",
    "siftclip.trainer.export": "siftclip.trainer.stages.export",
    "siftclip.trainer.launch": "siftclip.trainer.runtime.launch",
    "siftclip.trainer.layer_decay": "siftclip.trainer.optim.layer_decay",
    "siftclip.trainer.lightning_setup": "siftclip.trainer.runtime.lightning_setup",
    "siftclip.trainer.loggers": "siftclip.trainer.runtime.loggers",
    "siftclip.trainer.losses.objective": "siftclip.trainer.losses.base",
    "siftclip.trainer.meter": "siftclip.trainer.loop.meter",
    "siftclip.trainer.models": "siftclip.trainer.builders.models",
    "siftclip.trainer.module": "siftclip.trainer.loop.module",
    "siftclip.trainer.objective": "siftclip.trainer.builders.objective",
    "siftclip.trainer.online.live": "siftclip.trainer.online.scoring_models",
    "siftclip.trainer.online.online": "siftclip.trainer.online.controller",
    "siftclip.trainer.online.options": "siftclip.trainer.builders.online_options",
    "siftclip.trainer.online.planner": "siftclip.trainer.online.cost_profile",
    "siftclip.trainer.online.setup": "siftclip.trainer.builders.online_setup",
    "siftclip.trainer.optim": "siftclip.trainer.optim.optimizer",
    "siftclip.trainer.planning": "siftclip.trainer.stages.planning",
    "siftclip.trainer.pool_stages": "siftclip.trainer.stages.pool",
    "siftclip.trainer.progress": "siftclip.trainer.loop.progress",
    "siftclip.trainer.run_dir": "siftclip.trainer.runtime.run_dir",
    "siftclip.trainer.run_records": "siftclip.trainer.runtime.run_records",
    "siftclip.trainer.schedules": "siftclip.trainer.optim.schedules",
    "siftclip.trainer.seed_runs": "siftclip.trainer.runtime.seed_runs",
    "siftclip.trainer.selection_ranks": "siftclip.trainer.runtime.selection_ranks",
    "siftclip.trainer.selection_summary": "siftclip.trainer.stages.selection_summary",
    "siftclip.trainer.sharding": "siftclip.trainer.models.sharding",
    "siftclip.trainer.stages": "siftclip.trainer.builders.selection",
    "siftclip.trainer.step": "siftclip.trainer.optim.gradients",
    "siftclip.trainer.target_embedding": "siftclip.trainer.stages.target",
    "siftclip.trainer.training": "siftclip.trainer.stages.train",
    "siftclip.trainer.update": "siftclip.trainer.optim.update",
}


def old_name(module: str) -> str:
    """Return the name of a module before it moved; its own where it has not."""
    return next((old for old, new in MOVED.items() if new == module), module)


def answer_for_module(package: str) -> None:
    """Let a package that has taken the old name of a module answer for what that module held.

    Attributes are read with a warning, and set where they are now, so that patches of them work;
    what the package has itself comes first. It says `answer_for_module(__name__)`.
    """
    sys.modules[package].__class__ = _PackageForModule


class _PackageForModule(ModuleType):
    def _module(self) -> ModuleType:
        return importlib.import_module(MOVED[self.__name__])

    def _has_itself(self, name: str) -> bool:
        is_special = name.startswith("__") and name.endswith("__")  # asked of any module by tools
        return is_special or name in vars(self)

    def __getattr__(self, name: str) -> Any:
        if self._has_itself(name) or not hasattr(self._module(), name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _warn(f"{self.__name__}.{name}", f"{MOVED[self.__name__]}.{name}")
        return getattr(self._module(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._has_itself(name) or isinstance(value, ModuleType):  # importlib sets submodules
            super().__setattr__(name, value)
            return
        held = vars(self._module())
        if name in held:
            self._replaced().setdefault(name, held[name])
        setattr(self._module(), name, value)

    def __delattr__(self, name: str) -> None:
        if self._has_itself(name):
            super().__delattr__(name)
        elif name in self._replaced():  # so patches end, of what a package does not have itself
            setattr(self._module(), name, self._replaced()[name])
        else:
            delattr(self._module(), name)

    def _replaced(self) -> dict[str, Any]:
        """Return what the module held before something else was set."""
        replaced: dict[str, Any] = vars(self).setdefault("__replaced__", {})
        return replaced


class _OldNames:
    """Finds and loads modules by their old names. The last finder: what exists is not touched."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MOVED:
            return None
        # no subclass of importlib.abc.Loader, whose import costs more than all of this module
        return ModuleSpec(name, self, origin=MOVED[name])  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the old name an empty module while the new one is imported."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the new module into the place of the empty one, as importlib allows."""
        old = module.__name__
        sys.modules[old] = importlib.import_module(MOVED[old])
        _warn(old, MOVED[old])


_FINDER = _OldNames()


def install() -> None:
    """Let Python ask for old names when it finds no module."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def _warn(old: str, new: str) -> None:
    """Warn at the line that names the old place, be it an import or a call of importlib."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_machinery(frame):
        frame = frame.f_back
        level += not _is_skipped(frame)
    message = f"{old} is now {new}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def _is_machinery(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return module == __name__ or module.partition(".")[0] == "importlib"


def _is_skipped(frame: FrameType) -> bool:
    """Return whether `warnings` itself leaves a frame out of its count."""
    return str(frame.f_globals.get("__name__")).startswith("importlib._bootstrap")
