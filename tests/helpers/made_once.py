"""What is costly and always the same, made once in a process and in those forked from it."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import pytest


def vocabulary_once(patch: pytest.MonkeyPatch) -> None:
    """Every model comes with CLIP's tokenizer, whose 49,408 tokens are put together once."""
    from open_clip.tokenizer import SimpleTokenizer

    build, built = SimpleTokenizer.__init__, dict[str, dict[str, Any]]()

    def build_once(self: Any, *arguments: Any, **options: Any) -> None:
        length = {name: options.pop(name) for name in ("context_length",) if name in options}
        key = repr((arguments, options))
        if key not in built:
            build(self, *arguments, **options)
            built[key] = {**self.__dict__, "cache": dict(self.cache)}
        self.__dict__.update(built[key], cache=dict(built[key]["cache"]), **length)

    patch.setattr(SimpleTokenizer, "__init__", build_once)


def compositions_once(patch: pytest.MonkeyPatch) -> None:
    """Hydra puts the files together once for each command and choice of groups, then copies.

    That is four fifths of a composition, which takes a tenth of a second. The values that a test
    sets are put in each time, by Hydra itself. Folders of configurations that a test writes are
    read each time, too. A command composes once, not twice: Hydra looks for `hydra.mode` first,
    which no configuration of ours sets.
    """
    from hydra._internal import config_loader_impl
    from hydra._internal.defaults_list import DefaultsList, Overrides
    from hydra._internal.hydra import Hydra

    listed: dict[Any, DefaultsList] = {}
    merged: dict[int, Any] = {}  # by the identity of a list of defaults, which `listed` keeps
    list_defaults = config_loader_impl.create_defaults_list
    merge_files = config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list

    def list_once(
        *, repo: Any, config_name: str, overrides_list: list[Any], **options: bool
    ) -> DefaultsList:
        places = _packaged(repo)
        if places is None:
            return list_defaults(
                repo=repo, config_name=config_name, overrides_list=overrides_list, **options
            )
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        groups = [override for override in overrides_list if override not in values]
        lines = [override.input_line for override in groups]
        key = (config_name, *places, *lines, *options.items())
        if key not in listed:
            found = list_defaults(
                repo=repo, config_name=config_name, overrides_list=groups, **options
            )
            listed[key] = found
            merged[id(found.defaults)] = None
        return replace(listed[key], config_overrides=values)

    def merge_once(self: Any, *, defaults: list[Any], repo: Any) -> Any:
        if id(defaults) not in merged:
            return merge_files(self, defaults=defaults, repo=repo)
        if merged[id(defaults)] is None:
            merged[id(defaults)] = merge_files(self, defaults=defaults, repo=repo)
        return copy.deepcopy(merged[id(defaults)])

    get_mode = Hydra.get_mode

    def mode_if_set(self: Any, config_name: str | None, overrides: list[str]) -> Any:
        is_set = any("hydra.mode" in override for override in overrides)
        return get_mode(self, config_name, overrides) if is_set else None

    _files_once(patch)
    patch.setattr(Hydra, "get_mode", mode_if_set)
    patch.setattr(config_loader_impl, "create_defaults_list", list_once)
    patch.setattr(
        config_loader_impl.ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once
    )


def _files_once(patch: pytest.MonkeyPatch) -> None:
    """Hydra reads each file of siftclip.configs once.

    And a composition has a list of places to search of its own, as it may change that, but no copy
    of all that is stored in them, which took half of what is left.
    """
    from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository

    read: dict[Any, Any] = {}
    read_file = ConfigRepository.load_config

    def read_once(self: Any, config_path: str) -> Any:
        places = _packaged(self)
        key = (config_path, *(places or ()))
        if key in read:
            return copy.deepcopy(read[key])
        found = read_file(self, config_path)
        if places is not None and found is not None and found.path.startswith("pkg://"):
            read[key] = copy.deepcopy(found)
        return found

    def share(self: Any, delegate: Any) -> None:
        self.delegate, self.cache = copy.copy(delegate), {}

    patch.setattr(ConfigRepository, "load_config", read_once)
    patch.setattr(CachingConfigRepository, "__init__", share)


def _packaged(repo: Any) -> list[tuple[str, str]] | None:
    """The places that Hydra searches; None if a folder is among them, whose files may change."""
    places = [(source.scheme(), source.path) for source in repo.get_sources()]
    return places if all(scheme in ("pkg", "structured") for scheme, _ in places) else None


def nothing_flushed(patch: pytest.MonkeyPatch) -> None:
    """No file is flushed to the disk: a tenth of a run, and seen where a machine loses its power.

    What a process has written is there for others, also where the process is killed.
    """
    patch.setattr(os, "fsync", lambda file: None)
