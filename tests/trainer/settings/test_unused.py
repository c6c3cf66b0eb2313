"""Options that were given to a command which does not read them."""

from __future__ import annotations

import hydra
import pytest

from siftclip.trainer.settings.commands import COMMANDS
from siftclip.trainer.settings.store import composing, register
from siftclip.trainer.settings.unused import unused_options


def unused(command: str, *overrides: str) -> list[str]:
    register()
    with composing():
        config = hydra.compose(command.replace(" ", "_"), overrides=list(overrides))
        return [word for word, _ in unused_options(COMMANDS[command], overrides, config)]


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("train", "compare.name=x"),
        ("train", "demo.pool_samples=3"),
        ("select", "optim.lr=1e-3"),
        ("select", "scale.samples_seen=1"),
        ("index", "selector=jest"),
        ("index", "~selector.fraction"),
        ("index", "++selector.fraction=0.1"),
        ("embed", "model=vit_b_32"),
        ("embed", "model.name=ViT-B-32"),
        ("eval", "loss.name=clip"),
        ("eval diff", "optim.lr=1"),
    ],
)
def test_an_option_that_a_command_does_not_read_is_found(command: str, word: str) -> None:
    assert unused(command, "seed=1", word) == [word]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["selector=random", "selector.fraction=0.5", "model=vit_tiny", "+eval=fast"]),
        ("train", ["online=every_step", "selector@online.selector=jest"]),
        ("select", ["scale=datacomp_small", "experiment=digits", "loss=siglip"]),  # set others, too
        ("select", ["optim.lr=0.25", "selector.fraction=${optim.lr}"]),
        ("compare", ["compare.seeds=[1]", "optim.lr=1"]),
        ("demo", ["compare.seeds=[1]", "scale.samples_seen=1", "logger=csv"]),
        ("data bench", ["bench.steps=1"]),
    ],
)
def test_an_option_that_is_read_or_may_be_is_not(command: str, words: list[str]) -> None:
    words = [word.removeprefix("+") for word in words]
    assert unused(command, *words) == []
