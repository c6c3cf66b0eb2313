"""An exception in a plug-in is told in one message: whose it is, what it says, and where."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from siftclip.errors import InputError
from siftclip.selectors.core.checks import synthetic_chunk
from siftclip.selectors.core.description import describe
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.trainer.cli.application import application
from siftclip.trainer.cli.endings import FULL_ERROR
from siftclip.trainer.cli.plugin_faults import TRACEBACK, fault_of_plugin
from siftclip.trainer.settings.commands import PoolSections
from siftclip.trainer.settings.common import CommonSettings

MODULE = """
import torch
from siftclip.selectors import Requirements, ScoreSelector


class Words(ScoreSelector):
    requires = Requirements(captions=True)

    def __init__(self, *, penalty: float = 0.5, double=False, **rule):
        super().__init__(**rule)
        self.penalty, self.double = penalty, double
        if penalty == 9:
            raise LookupError("nine is not in the table")

    def score(self, chunk):
        scores = torch.tensor([-self.penalty / len(c.split()) for c in chunk.captions])
        return scores.double() if self.double else scores

    @classmethod
    def broken(cls):
        return cls.absent


def helper():
    raise OSError("a " + "very " * 100 + "long text")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A plug-in's module, installed as pip would."""
    info = tmp_path / "words-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: words\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[siftclip.selectors]\nwords = words_of:Words\n")
    (tmp_path / "words_of.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("words_of")
    del sys.modules["words_of"]


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def select(selector: Any) -> Callable[[], object]:
    return lambda: selector.select(MemorySource(synthetic_chunk(selector.requires)))


def test_a_method_is_named_with_class_module_and_line(module: Any) -> None:
    error = raised(select(module.Words(penalty=None, fraction=0.5)))
    fault = fault_of_plugin(error, {})
    assert fault is not None
    assert fault.startswith(
        "words_of.Words.score failed, which is no part of Siftclip: TypeError: bad operand type "
        "for unary -: 'NoneType' (words_of.py, line "
    )
    assert fault.endswith(f"). {TRACEBACK}")


def test_class_methods_and_functions_are_named(module: Any) -> None:
    fault = fault_of_plugin(raised(module.Words.broken), {})
    assert fault is not None
    assert fault.startswith("words_of.Words.broken failed, ")
    fault = fault_of_plugin(raised(module.helper), {})
    assert fault is not None
    assert fault.startswith(
        "words_of.helper failed, which is no part of Siftclip: OSError: a very "
    )
    assert len(fault) < 500


def test_a_broken_contract_names_the_check(module: Any) -> None:
    error = raised(select(module.Words(double=True, fraction=0.5)))
    fault = fault_of_plugin(error, {})
    assert fault is not None
    assert fault.startswith("Words.score must return a float32 tensor")
    assert fault.endswith(" It is a fault of that class, which check_selector finds.")


@pytest.mark.parametrize("moved", [lambda x: x.to("meta"), lambda x: x.to_sparse()])
def test_an_answer_that_cannot_be_used_names_its_class(
    moved: Callable[[torch.Tensor], torch.Tensor], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Words, "score", lambda self, chunk: moved(torch.ones(len(chunk))))
    fault = fault_of_plugin(raised(select(module.Words(fraction=0.5))), {})
    assert fault is not None
    assert fault.startswith("what words_of.Words answers, or holds as a parameter, cannot be used:")
    assert TRACEBACK in fault


def test_a_parameter_that_nothing_stands_for_names_its_class(module: Any) -> None:
    selector = module.Words(fraction=0.5)
    selector.guard = threading.Lock()
    fault = fault_of_plugin(raised(lambda: describe(selector)), {})
    assert fault is not None
    assert fault.startswith("what words_of.Words answers, or holds as a parameter, cannot be used:")
    assert "a lock cannot be a parameter of a selector" in fault


@pytest.mark.parametrize(
    "ending", [SystemExit(0), SystemExit(7), BrokenPipeError(), GeneratorExit()]
)
def test_a_plugin_that_ends_the_process_is_told(
    ending: BaseException,
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stage(_: Any) -> None:
        module.Words(penalty=9, fraction=0.5)

    exec(compile("def init(self, **rule):\n    raise ending", "words_of.py", "exec"), vars(module))  # noqa: S102
    module.ending = ending
    monkeypatch.setattr(module.Words, "__init__", module.init)
    monkeypatch.setattr("sys.argv", ["siftclip", "index", "pool.root=x"])
    with pytest.raises(SystemExit) as stopped:
        application("index", PoolSections)(stage)()
    assert stopped.value.code == 2
    assert (
        f"failed, which is no part of Siftclip: {type(ending).__name__}" in capsys.readouterr().err
    )


def test_our_own_faults_stay(module: Any) -> None:
    assert fault_of_plugin(raised(lambda: int("a")), {}) is None
    assert fault_of_plugin(raised(lambda: CommonSettings(nothing=1)), {}) is None  # type: ignore[call-arg]


def test_a_target_is_a_plugin_without_an_entry_point(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = raised(module.helper)
    monkeypatch.setattr("siftclip.trainer.cli.plugin_faults.installed_points", list)
    assert fault_of_plugin(error, {"selector": {"_target_": "torch.nn.Linear"}}) is None
    assert fault_of_plugin(error, {"a": [{"_target_": "words_of.Words"}]}) is not None


# ---- by a command -------------------------------------------------------------------------------
def end_of(stage: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["siftclip", "index", "pool.root=nowhere"])
    with pytest.raises(SystemExit) as end:
        application("index", PoolSections)(stage)()
    return int(end.value.code or 0)


def test_a_command_tells_it_without_a_traceback(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(lambda _: module.helper(), monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("siftclip index: error: words_of.helper failed, ")

    def built(_: Any) -> None:
        from siftclip.selectors.core.plugins import build_plugin

        build_plugin("words", penalty=9, fraction=0.5)

    assert end_of(built, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "The plug-in 'words' (words_of:Words) could not be built" in line
    assert line.endswith(f"LookupError: nine is not in the table. {TRACEBACK}")


def test_the_traceback_is_shown_if_asked_for(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FULL_ERROR, "1")
    monkeypatch.setattr(sys, "argv", ["siftclip", "index", "pool.root=nowhere"])
    with pytest.raises(OSError, match="a very"):
        application("index", PoolSections)(lambda _: module.helper())()


def test_text_for_a_number_is_refused_before_anything_is_read(
    module: Any, base: list[str], compose: Callable[..., Any]
) -> None:
    from siftclip.trainer.builders.selection import select_stage

    options = [*base, "pool.root=nowhere", "selector=plugin", "selector.plugin=words"]
    settings = compose("select", [*options, "++selector.parameters.penalty=abc"])
    with pytest.raises(InputError, match=r"^selector\.parameters\.penalty must be a number\. Got"):
        select_stage(settings)
