"""Code that lies beside a model is never run, and nobody is asked whether to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.datamodules.models.foreign_code import without_foreign_code
from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.errors import InputError

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "width": 32},
}
PLANTED = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedConfig
class Config(BertConfig): model_type = {kind!r}
class Model(BertModel): config_class = Config
class Tokenizer(BertTokenizer): pass
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the planted code would write; questions are errors."""

    def ask(text: str = "") -> str:
        (tmp_path / "asked").write_text(text)
        return "y"

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Callable[..., Path]:
    """`folder(kind, text_cfg)`: a model folder whose files name planted code."""

    def write(kind: str, **text: Any) -> Path:
        path = tmp_path / "model"
        path.mkdir()
        (path / "planted.py").write_text(PLANTED.format(marker=str(marker), kind=kind))
        auto_map = {
            "AutoConfig": "planted.Config",
            "AutoModel": "planted.Model",
            "AutoTokenizer": ["planted.Tokenizer", None],
        }
        model = {"model_type": kind, "auto_map": auto_map, "hidden_size": 32, "vocab_size": 5}
        (path / "config.json").write_text(json.dumps(model))
        tokens = {"auto_map": auto_map, "tokenizer_class": "Tokenizer"}
        (path / "tokenizer_config.json").write_text(json.dumps(tokens))
        (path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
        config = {**ARCHITECTURE, "text_cfg": {"context_length": 16, **text}}
        whole = {"model_cfg": config, "preprocess_cfg": {}}
        (path / "open_clip_config.json").write_text(json.dumps(whole))
        return path

    return write


@pytest.mark.parametrize("kind", ["planted", "bert"])
@pytest.mark.parametrize("asks", [{}, {"tokenizer_kwargs": {"trust_remote_code": True}}])
@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("part", ["hf_tokenizer_name", "hf_model_name"])
def test_planted_code_is_not_run(
    folder: Callable[..., Path],
    marker: Path,
    kind: str,
    asks: dict[str, Any],
    as_folder: bool,
    part: str,
) -> None:
    place = folder(kind)
    text = {**asks, "hf_tokenizer_name": str(place), "context_length": 16}
    text |= {"width": 32, "heads": 2, "layers": 1}
    if part == "hf_model_name":
        text |= {"hf_model_name": str(place), "hf_model_pretrained": False, "hf_proj_type": "mlp"}
    if as_folder:  # with weights
        plain = {name: text[name] for name in ("context_length", "width", "heads", "layers")}
        tiny = load_clip_model("tiny", architecture={**ARCHITECTURE, "text_cfg": plain})
        save_model_folder(tiny, place)
    whole = {"model_cfg": {**ARCHITECTURE, "text_cfg": text}, "preprocess_cfg": {}}
    (place / "open_clip_config.json").write_text(json.dumps(whole))
    message = ""
    try:
        if as_folder:
            load_clip_model(str(place), pretrained=None)
        else:
            load_clip_model("new", architecture={**ARCHITECTURE, "text_cfg": text})
    except InputError as error:
        message = str(error)
    assert not marker.exists()
    assert not (marker.parent / "asked").exists()
    if kind == "planted" or (asks and part == "hf_tokenizer_name"):
        assert "names Python code of its own (auto_map" in message
    assert "Please" not in message


def test_code_is_run_again_where_somebody_else_asks_for_it(
    folder: Callable[..., Path], marker: Path
) -> None:
    from transformers import AutoConfig

    place = folder("planted")
    with without_foreign_code(), pytest.raises(InputError, match="Siftclip never runs"):
        AutoConfig.from_pretrained(place, trust_remote_code=True)
    assert not marker.exists()
    AutoConfig.from_pretrained(place, trust_remote_code=True)
    assert marker.exists()
