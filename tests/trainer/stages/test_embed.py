"""Features written by `embed`: equal to the model's, resumable, and honest about bad samples."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.features.store import open_features
from siftclip.datamodules.index.tar_index import ShardIndex
from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.datamodules.pool.pool import open_pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.errors import InputError
from siftclip.files import read_json, read_npz, write_json
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.settings.commands import EvalCommand
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.stages import embed as embedding
from siftclip.trainer.stages.embed import embed_stage

Compose = Callable[..., DictConfig]


@pytest.fixture
def embed_options(base: list[str], model_folder: Path, tmp_path: Path) -> list[str]:
    return [
        *base,
        f"features.root={tmp_path / 'embedded'}",
        "features.name=mine",
        f"features.model.name={model_folder}",
        "features.batch_size=32",
    ]


def test_features_equal_the_model(embed_options: list[str], compose: Compose) -> None:
    config = compose("embed", embed_options)
    folder = embed_stage(config)
    clip = clip_model_from(config.features.model)
    clip.model.eval()
    pool = open_pool(
        LocalStorage(config.pool.root),
        cache_dir=Path(config.pool.cache_dir),
        max_bad_fraction=0,
        progress=False,
    )
    store = open_features(pool, folder=folder, keys=("mine_img", "mine_txt"), max_bad_fraction=0)
    assert store.pool_coverage.fraction == 1
    reader = SampleReader(pool=pool, max_image_pixels=10**6)
    keys = ("mine_img", "mine_txt")
    found = RowFeatures.build(store, keys, len(pool)).gather(store.parts[0].rows)
    assert found["mine_img"].dtype == torch.float16
    for i in (0, 7, len(store.parts[0].rows) - 1):
        row = int(store.parts[0].rows[i])
        with torch.no_grad():
            image = clip.model.encode_image(clip.eval_transform(reader.read_image(row))[None])
            text = clip.model.encode_text(clip.tokenizer([reader.read_caption(row)]))
        torch.testing.assert_close(
            found["mine_img"][i].float(), F.normalize(image, dim=1)[0], rtol=0, atol=1e-3
        )
        torch.testing.assert_close(
            found["mine_txt"][i].float(), F.normalize(text, dim=1)[0], rtol=0, atol=1e-3
        )


def test_finished_shards_are_not_embedded_again(embed_options: list[str], compose: Compose) -> None:
    config = compose("embed", embed_options)
    folder = embed_stage(config)
    (path,) = folder.glob("*.npz")
    written = path.stat().st_mtime_ns
    embed_stage(config)
    assert path.stat().st_mtime_ns == written
    path.unlink()
    embed_stage(config)
    assert path.exists()


def test_features_of_another_model_are_not_mixed(
    embed_options: list[str], compose: Compose, tmp_path: Path
) -> None:
    config = compose("embed", embed_options)
    folder = embed_stage(config)
    assert read_json(folder / "features.json")["name"] == "mine"
    model = compose("embed", embed_options, kind=EvalCommand).model
    other = load_clip_model("other", architecture=to_plain(model.architecture))
    save_model_folder(other, tmp_path / "other")
    with pytest.raises(InputError, match="holds features that differ in the model"):
        embed_stage(compose("embed", [*embed_options, f"features.model.name={tmp_path / 'other'}"]))


def test_a_replacement_that_is_killed_leaves_no_features_of_before(
    embed_options: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = compose("embed", embed_options)
    folder = embed_stage(config)
    (path,) = folder.glob("*.npz")
    before = path.read_bytes()
    torch.manual_seed(5)
    model = compose("embed", embed_options, kind=EvalCommand).model
    other = load_clip_model("other", architecture=to_plain(model.architecture))
    save_model_folder(other, tmp_path / "other")
    options = [*embed_options, f"features.model.name={tmp_path / 'other'}"]

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    replacing = compose("embed", [*options, "reuse=false"])
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_stage(replacing)
    embed_stage(compose("embed", options))
    assert path.read_bytes() != before


def test_features_of_another_precision_are_not_mixed(
    embed_options: list[str], compose: Compose
) -> None:
    folder = embed_stage(compose("embed", embed_options))
    other = compose("embed", [*embed_options, "trainer.precision=bf16-mixed"])
    with pytest.raises(InputError, match=r"differ in the precision .* reuse=false"):
        embed_stage(other)
    manifest = read_json(folder / "features.json")
    old = {key: manifest[key] for key in ("name", "model", "weights", "pool", "precision")}
    write_json(folder / "features.json", old)  # as an earlier version wrote it
    with pytest.raises(InputError, match=r"differ in the precision"):
        embed_stage(other)
    (path,) = folder.glob("*.npz")
    before = path.read_bytes()
    embed_stage(compose("embed", [*embed_options, "trainer.precision=bf16-mixed", "reuse=false"]))
    assert path.read_bytes() != before


def test_features_of_a_replaced_tar_are_made_again(
    embed_options: list[str],
    compose: Compose,
    copy_pool: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    tar = copy_pool / "shards" / "00000000.tar"
    rewrite(tar, shift=0)
    config = compose("embed", [*embed_options, f"pool.root={copy_pool}", "pool.cache_dir=null"])
    path = embed_stage(config) / "00000000.npz"
    (before,) = read_npz(path, ["mine_img"])
    os.utime(tar)  # a copy
    embed_stage(config)
    assert "reused the features of 1 of 1 shards" in caplog.text
    rewrite(tar, shift=1)  # names and sizes stay
    options = [*embed_options, f"pool.root={copy_pool}", "pool.cache_dir=null"]
    with pytest.raises(InputError, match=r"features of 1 tars \(00000000.npz\) are of other"):
        select_stage(compose("select", ["features=open_clip", *options]))
    embed_stage(config)
    assert "1 tars hold other members" in caplog.text
    (after,) = read_npz(path, ["mine_img"])
    np.testing.assert_allclose(after, np.roll(before, -1, axis=0), atol=1e-3)


def rewrite(tar: Path, shift: int) -> None:
    """Give the samples of a tar the images of their neighbours, all of one length."""
    with tarfile.open(tar) as archive:
        members = [(m, archive.extractfile(m).read()) for m in archive if m.isfile()]  # type: ignore[union-attr]
    at = [n for n, (m, _) in enumerate(members) if not m.name.endswith(("txt", "json"))]
    longest = max(len(members[n][1]) for n in at)
    shifted = [members[n][1].ljust(longest, b"\0") for n in [*at[shift:], *at[:shift]]]
    for n, data in zip(at, shifted, strict=True):
        members[n] = members[n][0], data
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_bad_samples_get_no_features_and_cannot_be_selected(
    index_tar: Callable[[Path], ShardIndex],
    embed_options: list[str],
    compose: Compose,
    copy_pool: Path,
) -> None:
    tar = copy_pool / "shards" / "00000000.tar"
    index = index_tar(tar)
    data = bytearray(tar.read_bytes())
    start, size = index.image_offsets_bytes[5], index.image_sizes_bytes[5]
    data[start : start + size] = b"\x00" * size
    tar.write_bytes(data)
    options = [*embed_options, f"pool.root={copy_pool}", "pool.cache_dir=null"]
    folder = embed_stage(compose("embed", options))
    uids, image = read_npz(folder / "00000000.npz", ["uids", "mine_img"])
    assert np.isnan(image[5]).all()
    assert np.isfinite(np.delete(image, 5, axis=0)).all()
    outcome = select_stage(
        compose("select", ["features=open_clip", *options, "selector.fraction=1.0"])
    )
    assert len(outcome.selection) == len(uids) - 1
    assert 5 not in outcome.rows
    (folder / "00000000.npz").unlink()
    with pytest.raises(InputError, match=r"1 of 240 samples are bad.*cannot be decoded"):
        embed_stage(compose("embed", [*options, "pool.max_bad_fraction=0.001"]))


def test_embed_needs_a_model(base: list[str], compose: Compose) -> None:
    with pytest.raises(InputError, match="embed needs a model"):
        embed_stage(compose("embed", [*base, "features=metadata"]))
    with pytest.raises(InputError, match=r"features\.model\.name must name a model"):
        embed_stage(compose("embed", base))
    with pytest.raises(InputError, match=r"features\.model\.pretrained is not set"):
        embed_stage(compose("embed", [*base, "features.model.name=ViT-B-32"]))


def test_rank_that_starts_late_still_embeds_its_whole_share(
    embed_options: list[str],
    compose: Compose,
    make_samples: Callable[..., list[Any]],
    write_pool: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 of 2 has written shard 0 already when rank 1 looks what is left."""
    root = write_pool(make_samples(12), shards=4)
    written = tmp_path / "embedded" / "00000000.npz"
    options = [*embed_options, f"pool.root={root}", "pool.cache_dir=null"]
    late = SimpleNamespace(
        global_rank=1,
        world_size=2,
        device=torch.device("cpu"),
        launch=lambda: None,
        barrier=lambda: None,
        autocast=nullcontext,
    )
    monkeypatch.setattr(embedding, "make_fabric", lambda config: late)
    second = SimpleNamespace(rank=1, size=2, sum=lambda values: values, barrier=lambda: None)
    monkeypatch.setattr(embedding, "ranks_of", lambda fabric: second)
    written.parent.mkdir()
    written.touch()
    folder = embed_stage(compose("embed", options))
    assert {path.stem for path in folder.glob("*.npz")} == {"00000000", "00000001", "00000003"}


def test_features_that_say_nothing_or_are_damaged_are_not_taken(
    embed_options: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    config = compose("embed", embed_options)
    folder = embed_stage(config)
    path = min(folder.glob("*.npz"))
    content = path.read_bytes()
    path.write_bytes(content[:300])
    embed_stage(config)
    assert "are damaged (such as of" in caplog.text
    assert path.read_bytes() == content
    (folder / "features.json").write_text("[]")
    with pytest.raises(InputError, match=r"a JSON object\. Got .* replace .* with reuse=false"):
        embed_stage(config)
    (folder / "features.json").unlink()
    for options in (embed_options, [*embed_options, "reuse=false"]):
        with pytest.raises(InputError, match=r"without a features.json .* Delete them"):
            embed_stage(compose("embed", options))


def test_no_old_features_are_left_when_new_ones_are_cut_off(
    embed_options: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = embed_stage(compose("embed", embed_options))
    other = [*embed_options, "trainer.precision=bf16-mixed"]
    with monkeypatch.context() as patched:
        patched.setattr(embedding, "_embed", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed_stage(compose("embed", [*other, "reuse=false"]))
    assert list(folder.glob("*.npz")) == []
    embed_stage(compose("embed", other))
    assert read_json(folder / "features.json")["precision"] == "bf16-mixed"
