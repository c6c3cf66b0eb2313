"""All families of models that open_clip knows, tiny: built, counted, trained, written and read.

Each of open_clip's configurations is made small, and equal ones are tried once. What they take from
the Hugging Face hub (configurations, weights, tokenizers) is made here, in folders.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from omegaconf import DictConfig
from open_clip.hf_model import HFTextEncoder
from timm.models import model_entrypoint, register_model
from timm.models.vitamin import VitCfg, VitConvCfg
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from siftclip.datamodules.models.load import ClipModel, load_clip_model, save_model_folder
from siftclip.datamodules.streaming.batches import Batch
from siftclip.errors import InputError
from siftclip.eval.encoding.encoder import EncodeOptions, Encoder
from siftclip.eval.encoding.texts import check_tokens
from siftclip.eval.evaluation_mode import evaluation_mode
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.losses import CocaLoss, ContrastiveLoss, LossInputs, SigLipLoss, SoftmaxLoss
from siftclip.trainer.models.compilation import compile_towers
from siftclip.trainer.models.sharding import sharded_blocks
from siftclip.trainer.models.towers import LockConfig, enable_grad_checkpointing, lock_towers
from siftclip.trainer.online.flops import forward_flops, input_sizes, training_flops
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients
from siftclip.trainer.optim.layer_decay import layer_scales
from siftclip.trainer.optim.optimizer import make_optimizer
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.stages.train import train_stage

__all__: list[str] = []  # timm adds the names that are registered here

CAPTIONS = ["a photo of a cat", "two dogs", "the very small car", "of"]
OPTIM = OptimSettings(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.1, warmup_steps=0)

# ---- what is small in a tower of timm, by the module that defines it ----------------------------
STEM = VitCfg(
    embed_dim=(8, 16, 32),
    depths=(1, 1, 1),
    stem_width=8,
    conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
SMALL: dict[str, dict[str, Any]] = {
    "vision_transformer": VIT,
    "vision_transformer_relpos": VIT,
    "vision_transformer_hybrid": {"depth": 1, "num_heads": 2, "img_size": 32},  # its stem is fixed
    "eva": VIT,
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "swin_transformer": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    | {"img_size": 64, "window_size": 2},
    "vitamin": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "embed_cfg": STEM},
    "fastvit": {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)},
}
CHANGES: dict[str, dict[str, Any]] = {
    "vit_pe_core": {"attn_pool_num_heads": 2, "ref_feat_shape": (4, 4)},
    "fastvit_mci3": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 16, 32, 32, 32)},
    "fastvit_mci4": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 16, 32, 32, 32)},
}
SIZES = re.compile(
    r"_?(tiny|small|medium|base|x*large2?|giantopt|giant|gigantic|enormous|so400m|patch\d+|\d{3}$)"
)
BUILT: dict[str, tuple[str, int]] = {}


def small_tower(name: str) -> tuple[str, int]:
    """A tower of timm, registered under a name of its own, and the pixels a side of its images."""
    family = SIZES.sub("", name).strip("_")
    if family not in BUILT:
        entry = model_entrypoint(name)
        module = entry.__module__.rpartition(".")[2]
        small = {**SMALL[module], **CHANGES.get(family, {})}

        def build(pretrained: bool = False, **options: Any) -> nn.Module:
            tower: nn.Module = entry(pretrained=False, **{**small, **options})
            return tower

        build.__name__ = f"small_{family}"
        build.__module__ = __name__
        register_model(build)
        BUILT[family] = (build.__name__, small.get("img_size", 64))
    return BUILT[family]


# ---- what the hub holds -------------------------------------------------------------------------
WORDS = ["a", "photo", "of", "the", "cat", "dogs", "car", "two", "very", "small"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>"]
SPECIAL = {
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "m2m_100": ROBERTA,
    "bert": ["[CLS]", "[PAD]", "[SEP]", "[UNK]"],
    "mt5": [None, "<pad>", "</s>", "<unk>"],
}
KINDS = {
    "roberta-base": "roberta",
    "xlm-roberta": "xlm-roberta",
    "facebook/xlm-v": "xlm-roberta",
    "facebook/nllb": "m2m_100",
    "google/mt5": "mt5",
    "timm/": "mt5",  # the tokenizers of SigLIP
    "bert-base": "bert",
}


def write_hub_folder(kind: str, folder: Path) -> None:
    """Configuration, random weights and tokenizer of a small text model of Hugging Face."""
    start, pad, end, unknown = SPECIAL[kind]
    names = [name for name in (pad, start, end, unknown) if name is not None]
    names = ROBERTA if names[1] == "<s>" else names  # where padding is 1, and positions start at 2
    vocabulary = {word: number for number, word in enumerate([*names, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [name for name in (start, end) if name is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}" if start else f"$A {end}",
        special_tokens=[(name, vocabulary[name]) for name in around],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        pad_token=pad,
        sep_token=end,
        eos_token=end,
        cls_token=start,
        bos_token=start,
    ).save_pretrained(folder)
    general = {"vocab_size": len(vocabulary), "pad_token_id": vocabulary[str(pad)]}
    if kind == "mt5":
        small = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1}
        small |= {"num_heads": 2}
    elif kind == "m2m_100":
        small = {"d_model": 32, "max_position_embeddings": 1024}
        for part in ("encoder", "decoder"):
            small |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 64}
            small |= {f"{part}_layerdrop": 0}
    else:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        small |= {
            "intermediate_size": 64,
            "max_position_embeddings": 512 if kind == "bert" else 514,
        }
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(kind, **general, **small)).save_pretrained(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text model of each kind."""
    root = tmp_path_factory.mktemp("hub")
    with quiet():
        for kind in SPECIAL:
            write_hub_folder(kind, root / kind)
    return root


# ---- the families -------------------------------------------------------------------------------
def small(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of open_clip's with small towers; names on the hub begin with HUB/."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 32
    if "timm_model_name" in vision:
        if vision["timm_model_name"] == "vit_base_mci_224":
            config["embed_dim"] = 768  # what its stem makes, and no projection follows
        vision["timm_model_name"], vision["image_size"] = small_tower(vision["timm_model_name"])
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}
    else:
        vision |= {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    if vision.get("attentional_pool"):
        vision |= {"attn_pooler_heads": 2, "attn_pooler_queries": 4}
    make_text_small(text)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": 32, "heads": 2, "layers": 2}
    for part in (vision, text):
        part.pop("mlp_ratio", None)  # a number of a size alone
    return config


def make_text_small(text: dict[str, Any]) -> None:
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if key in text:
            kind = next(kind for name, kind in KINDS.items() if text[key].startswith(name))
            text[key] = f"HUB/{kind}"
    if "hf_model_name" not in text:
        text |= {"width": 32, "heads": 2, "layers": 2}
        if "hf_tokenizer_name" in text:
            text["vocab_size"] = len(ROBERTA) + len(WORDS)


def families() -> dict[str, str]:
    """Small configurations, as JSON, by the first name that has them."""
    found: dict[str, str] = {}
    for name in open_clip.list_models():
        text = json.dumps(small(open_clip.get_model_config(name)), sort_keys=True)
        found.setdefault(text, name)
    bert = json.loads(next(text for text, name in found.items() if name == "roberta-ViT-B-32"))
    bert["text_cfg"] |= dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), "HUB/bert")
    for pooler in ("cls_pooler", "cls_last_hidden_state_pooler"):
        bert["text_cfg"]["hf_pooler_type"] = pooler
        found[json.dumps(bert)] = f"bert with {pooler}"
    return {name: text for text, name in found.items()}


FAMILIES = families()
HUGGING_FACE = [name for name, text in FAMILIES.items() if "hf_model_name" in text]
# Torch's counter fails with the pooling of the others without gradients.
COUNTABLE = [*(name for name in HUGGING_FACE if "siglip" not in name), "MobileCLIP2-S0"]


@pytest.fixture
def build(hub: Path) -> Callable[[str], ClipModel]:
    """`build(name)`: a model of the family, always with the same random weights."""

    def build_one(name: str) -> ClipModel:
        torch.manual_seed(0)
        with quiet():
            architecture = json.loads(FAMILIES[name].replace("HUB/", f"{hub}/"))
            clip = load_clip_model("small", architecture=architecture)
        clip.model.output_dict = True  # type: ignore[assignment]
        return clip

    return build_one


class quiet(warnings.catch_warnings):
    """Libraries warn of random weights, and of what they will do otherwise one day."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *exception: object) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*exception)


def batch_of(clip: ClipModel, rows: slice = slice(None)) -> Batch:
    size = input_sizes(clip)["image_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(CAPTIONS), 3, height, width, generator=generator)
    tokens = clip.tokenizer(CAPTIONS)
    numbers = torch.arange(len(CAPTIONS))
    return Batch(
        images=images[rows], tokens=tokens[rows], rows=numbers[rows], valid=numbers[rows] >= 0
    )


class NoProducts(ContrastiveLoss):
    """A loss without a matrix product, for counting what the towers do."""

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        pairs = inputs.image_features * inputs.text_features
        return {"contrastive_loss": (inputs.logit_scale * pairs).sum()}


def gradients(
    model: nn.Module, *batches: Batch, loss: ContrastiveLoss | None = None
) -> dict[str, Tensor | None]:
    """Of one step; weights and statistics stay."""
    model.zero_grad()
    model.train()
    objective = Objective(loss=loss or SoftmaxLoss())
    terms = compute_gradients(model, objective, batches, StepContext(seeds=[3] * len(batches)))
    assert torch.isfinite(terms["loss"])
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(name: str) -> float:
    """None, but of a table of relative positions that is computed once a batch."""
    return 0.01 if "relpos" in name else 0


def convolution_backward(
    gradient: list[int], inputs: list[int], weight: list[int], *others: Any, **named: Any
) -> int:
    """By groups, which torch's own formula leaves out."""
    wanted: list[bool] = others[-1]
    return sum(wanted[:2]) * 2 * prod(gradient) * prod(weight[1:])


def step_flops(model: nn.Module, *batches: Batch) -> int:
    """FLOPs of one step, counted by torch."""
    backward = {torch.ops.aten.convolution_backward: convolution_backward}
    torch.backends.mha.set_fastpath_enabled(False)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=backward) as counter,
    ):
        gradients(model, *batches, loss=NoProducts())
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_counted_trained_written_and_read(
    name: str, build: Callable[[str], ClipModel], tmp_path: Path
) -> None:
    clip = build(name)
    model: Any = clip.model
    batch, sizes = batch_of(clip), input_sizes(clip)
    counted = training_flops(model, **sizes)
    exact = step_flops(model, batch) / len(CAPTIONS)
    assert counted == pytest.approx(exact, rel=relative_error(name))
    assert 2 * forward_flops(model, **sizes) < counted
    assert forward_flops(model) == forward_flops(model, **sizes)

    optimizer = make_optimizer(model, OPTIM, fused=True)
    loss = SigLipLoss() if model.logit_bias is not None else SoftmaxLoss()
    whole = gradients(model, batch, loss=loss)
    assert not [key for key, value in whole.items() if value is None and key != "logit_bias"]
    optimizer.step()
    save_model_folder(clip, tmp_path)
    with quiet():
        again = load_clip_model(str(tmp_path))
    assert torch.equal(again.tokenizer(CAPTIONS), batch.tokens)
    assert again.config["model_cfg"] == json.loads(json.dumps(clip.config["model_cfg"]))
    for encode, inputs in (("encode_image", batch.images), ("encode_text", batch.tokens)):
        with torch.no_grad():
            ours, theirs = (getattr(m.model.eval(), encode)(inputs) for m in (clip, again))
        assert torch.equal(ours, theirs)
    with evaluation_mode(again, torch.device("cpu")) as ready:
        encoder = Encoder(ready, EncodeOptions(device=torch.device("cpu"), progress=False))
        features = encoder.texts(CAPTIONS)
    torch.testing.assert_close(features, nn.functional.normalize(theirs, dim=-1))


def without_what_no_switch_sees() -> list[str]:
    """The first family of each kind, but for activations, tokenizers and lengths."""
    found: dict[str, str] = {}
    for name, text in FAMILIES.items():
        config = json.loads(text)
        config.pop("quick_gelu", None)
        for key in ("act_kwargs", "tokenizer_kwargs", "context_length", "eos_id", "proj_type"):
            config["text_cfg"].pop(key, None)
        for key in ("hf_tokenizer_name", "vocab_size", "pool_type", "no_causal_mask"):
            config["text_cfg"].pop(key, None)
        found.setdefault(json.dumps(config), name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", without_what_no_switch_sees())
def test_what_can_be_switched_on_works_in_a_family_or_is_refused(
    name: str, build: Callable[[str], ClipModel]
) -> None:
    clip = build(name)
    batch = batch_of(clip)
    part = {"image": True, "image_unlocked_groups": 1, "text": True, "text_unlocked_layers": 1}
    refusals = []
    for lock in (LockConfig(), LockConfig(**part)):
        plain = copy.deepcopy(clip.model)
        try:
            lock_towers(plain, lock)
            thrifty = copy.deepcopy(plain)
            enable_grad_checkpointing(thrifty)
        except InputError as error:
            refusals.append(str(error))
            continue
        expected, found = gradients(plain, batch), gradients(thrifty, batch)
        torch.testing.assert_close(found, expected)
    for decay in ({"image_layer_decay": 0.5}, {"text_layer_decay": 0.5}):
        both = {"image_layer_decay": None, "text_layer_decay": None, **decay}
        try:
            assert min(layer_scales(clip.model, **both).values()) < 1
        except InputError as error:
            refusals.append(str(error))
    known = (
        r"^(LockConfig: \w+ .* open_clip|open_clip cannot lock the towers of CoCa models"
        r"|grad_checkpointing cannot be true: |optim\.text_layer_decay needs)"
    )
    assert all(re.match(known, refusal) for refusal in refusals), refusals
    thrifty = clip.model
    if not any("grad_checkpointing" in refusal for refusal in refusals):
        enable_grad_checkpointing(thrifty)
    counted = training_flops(thrifty, **input_sizes(clip))
    exact = step_flops(thrifty, batch) / len(CAPTIONS)
    assert counted == pytest.approx(exact, rel=relative_error(name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COUNTABLE)
def test_micro_batches_are_two_passes(name: str, build: Callable[[str], ClipModel]) -> None:
    clip = build(name)
    sizes = input_sizes(clip)
    first = forward_flops(clip.model, scoring=ScoringConfig(mode="train"), **sizes)
    parts = [batch_of(clip, rows) for rows in (slice(0, 2), slice(2, 4))]
    counted = training_flops(clip.model, **sizes) + first
    assert counted * len(CAPTIONS) == step_flops(clip.model, *parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "loss", "flops"),
    [
        ("mt5-base-ViT-B-32", "clip", 2e9),
        ("roberta-ViT-B-32", "clip", 2e9),
        ("coca_roberta-ViT-B-32", "coca", 3e10),
    ],
)
def test_a_run_with_a_text_tower_of_hugging_face(
    name: str,
    loss: str,
    flops: float,
    hub: Path,
    base: list[str],
    compose: Callable[..., DictConfig],
    demo_data: DemoData,
) -> None:
    options = ["selector=random", "selector.fraction=1", f"loss={loss}", f"budget.flops={flops}"]
    options += [f"eval.root={demo_data.tasks}", "eval.tasks=[digit]"]
    settings = compose("train", [*base, *options])
    architecture = json.loads(FAMILIES[name].replace("HUB/", f"{hub}/"))
    model = replace(settings.model, name=name, architecture=architecture)
    run = train_stage(replace(settings, model=model))
    summary = run.summary
    assert summary is not None
    assert 0 < summary["flops"] <= flops
    sample = summary["flops"] / summary["trained_samples"]
    with quiet():
        clip = load_clip_model(str(run.path))
    assert sample == training_flops(clip.model, context_length=77)
    assert run.results.is_file()


# ---- captions of a CoCa whose text tower has a vocabulary of its own ----------------------------
COCA_ROBERTA = "coca_roberta-ViT-B-32"


def test_a_decoder_writes_all_tokens_of_its_text_tower(
    build: Callable[[str], ClipModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert build(COCA_ROBERTA).model.text_decoder.text_projection.shape == (32, 49408)  # type: ignore[union-attr]
    original = HFTextEncoder.__init__

    def larger(self: HFTextEncoder, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        self.vocab_size = 50265  # as of roberta-base

    monkeypatch.setattr(HFTextEncoder, "__init__", larger)
    clip = build(COCA_ROBERTA)
    projection: Any = clip.model.text_decoder.text_projection  # type: ignore[union-attr]
    assert projection.shape == (32, 50265)
    assert float(projection.detach().std()) == pytest.approx(32**-0.5, rel=0.01)
    save_model_folder(clip, tmp_path)
    assert clip.config["model_cfg"]["text_cfg"]["vocab_size"] == 50265
    with quiet():
        again: Any = load_clip_model(str(tmp_path)).model
    assert torch.equal(again.text_decoder.text_projection, projection)


@pytest.mark.filterwarnings("ignore")
def test_padding_is_no_token_of_a_caption(build: Callable[[str], ClipModel]) -> None:
    clip = build(COCA_ROBERTA)
    model: Any = clip.model.eval()
    batch = batch_of(clip)
    with torch.no_grad():
        outputs = model(batch.images, batch.tokens)
        losses = nn.functional.cross_entropy(
            outputs["logits"].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
        )
    pad = clip.tokenizer.tokenizer.pad_token_id  # type: ignore[attr-defined]
    assert pad == 1
    written = (batch.tokens[:, 1:] != pad).flatten()
    assert 0 < int(written.sum()) < written.numel()
    objective = Objective(loss=CocaLoss(caption_weight=1.0))
    terms = compute_gradients(model, objective, [batch], StepContext())
    torch.testing.assert_close(terms["caption_loss"], losses[written].mean())


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_with_too_few_outputs_is_refused(
    hub: Path, base: list[str], compose: Callable[..., DictConfig]
) -> None:
    options = ["selector=random", "selector.fraction=1", "loss=coca"]
    settings = compose("train", [*base, *options])
    architecture = json.loads(FAMILIES[COCA_ROBERTA].replace("HUB/", f"{hub}/"))
    architecture["text_cfg"]["vocab_size"] = 9
    model = replace(settings.model, architecture=architecture)
    with pytest.raises(InputError, match=r"can write 9 tokens, and its tokenizer makes 14\."):
        train_stage(replace(settings, model=model))


# ---- what depends on modules of other packages --------------------------------------------------
def test_blocks_inside_of_blocks_are_sharded_once(build: Callable[[str], ClipModel]) -> None:
    model = build("mt5-base-ViT-B-32").model
    blocks = {id(block) for block in sharded_blocks(model)}
    assert len(blocks) == 4  # two of each tower
    for block in sharded_blocks(model):
        assert not blocks & {id(part) for part in block.modules() if part is not block}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "is_random"),
    [
        ("ViT-B-16", False),
        ("ViT-B-16-SigLIP", False),
        ("convnext_base", True),  # stochastic depth
        ("roberta-ViT-B-32", True),
        ("mt5-base-ViT-B-32", True),
        ("nllb-clip-base", True),
    ],
)
def test_what_is_random_is_not_compiled_with_micro_batches(
    name: str, is_random: bool, build: Callable[[str], ClipModel]
) -> None:
    model = build(name).model
    if is_random:
        with pytest.raises(InputError, match="would drop different parts"):
            compile_towers(model, micro_batches=True, backend="eager")
    else:
        compile_towers(model, micro_batches=True, backend="eager")


def test_tokens_of_another_model_are_refused(build: Callable[[str], ClipModel]) -> None:
    model = build("roberta-ViT-B-32").model
    check_tokens(model, torch.full((2, 77), 13))
    with pytest.raises(InputError, match="gives the token 14, and the model has 14"):
        check_tokens(model, torch.full((2, 77), 14))
    with pytest.raises(InputError, match="gives 515 tokens a text, and the model takes 514"):
        check_tokens(model, torch.full((2, 515), 13))
    relative = build("mt5-base-ViT-B-32").model
    check_tokens(relative, torch.full((2, 2000), 12))


@pytest.mark.parametrize(
    ("name", "lock", "message"),
    [
        ("nllb-clip-base", {"text_unlocked_layers": 1}, "must be 0: .* can only lock all of it"),
        ("bert with cls_pooler", {"text_unlocked_layers": 1}, "does not know the layers"),
        (
            "mt5-base-ViT-B-32",
            {"text_freeze_layer_norm": False},
            "must be true: .* finds no layer norms",
        ),
    ],
)
def test_locks_that_open_clip_cannot_set_say_so(
    name: str, lock: dict[str, Any], message: str, build: Callable[[str], ClipModel]
) -> None:
    with pytest.raises(InputError, match=message):
        lock_towers(build(name).model, LockConfig(text=True, **lock))
