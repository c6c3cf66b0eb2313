"""`siftclip explain`, the help texts and the tables in docs say what the dataclasses say."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from siftclip.trainer.cli.commands.explain_command import main
from siftclip.trainer.settings.describing.describe import all_options, configurations
from siftclip.trainer.settings.describing.explain import explain, matching
from siftclip.trainer.settings.describing.help import choices_line, option_line
from siftclip.trainer.settings.describing.reference import reference
from siftclip.trainer.settings.fields.rules import faults

ROOT = Path(__file__).parents[3]


def test_docs_are_current() -> None:
    """`make docs` writes them."""
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize("name", list(all_options()))
def test_every_option_is_described(name: str) -> None:
    option = all_options()[name]
    assert len(option.meaning) >= 8
    assert option.meaning[-1] in ".:)/" or option.meaning.endswith("http://...")
    assert option.commands
    assert option.default
    assert option.allowed
    (word,) = shlex.split(option.example)
    parsed = OverridesParser.create().parse_override(word)
    assert parsed.key_or_group in (name, option.group, "selector"), word
    if parsed.key_or_group == name and not option.is_selector:
        value = parsed.value()
        value = str(value) if isinstance(value, str) else value
        assert not [*faults(option.hint, value, name)], word


def test_an_option_in_full() -> None:
    assert explain("online.start") == (
        "online.start\n"
        "  meaning  Share of training before which the stream is that of `selector`.\n"
        "  type     number\n"
        "  default  0.0\n"
        "  allowed  a finite number in the range [0, 1]\n"
        "  used by  train, compare, data bench, report, reproduce\n"
        "  with     online=every_n_steps, online=every_epoch\n"
        "  example  online.start=0.0"
    )


def test_parts_of_names() -> None:
    assert [option.name for option in matching("lr")] == ["optim.lr"]
    assert {option.name for option in matching("seed")} == {"seed"}
    assert all(option.name.startswith("optim.") for option in matching("optim"))
    assert len(matching("optim")) == 17
    assert [option.name for option in matching("prefetch")] == ["data.prefetch_batches"]
    listed = explain("loss")
    assert listed is not None
    assert listed.startswith("loss=NAME: clip, coca, distill, drrho, plugin, siglip\n")


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["siftclip", "explain", "optim.lr=3", "seed"])
    main()
    assert capsys.readouterr().out.count("  meaning  ") == 2
    monkeypatch.setattr(sys, "argv", ["siftclip", "explain"])
    main()
    assert "  optim\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["siftclip", "explain", "optim.lrr"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "Did you mean optim.lr" in capsys.readouterr().err


def test_lines_of_help() -> None:
    assert option_line("bench.steps") == "bench.steps=20                 steps of training"
    assert option_line("plan", True).startswith("plan=true  ")
    assert all(len(line) <= 100 for line in option_line("pool.root", "F").splitlines())
    assert re.fullmatch(
        r"loss=NAME +clip, coca, distill, drrho, plugin, siglip", choices_line("loss")
    )
    assert configurations("optim") == ["adamw"]


def test_parameters_of_selectors_are_explained_by_their_configurations() -> None:
    assert explain("selector.plugin") == (
        "selector.plugin\n"
        "  meaning  the name under which a distribution registered it\n"
        "  default  none: it must be given\n"
        "  with     selector=plugin"
    )
    in_loop = explain("online.selector.parameters")
    assert in_loop is not None
    assert in_loop.endswith("  with     selector@online.selector=plugin")
    fraction = explain("selector.fraction")
    assert fraction is not None
    assert "default  0.2\n  with     selector=cabs\n" in fraction
    assert max(map(len, fraction.splitlines())) <= 100
    assert explain("selector.nope") is None
    assert explain("online.nope") is None
