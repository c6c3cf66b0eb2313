"""A URL and options that never print, but still connect."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from siftclip.confidential import ConfidentialOptions, ConfidentialUrl
from siftclip.datamodules.pool.pool import PoolOptions
from siftclip.datamodules.storage.connections import connect
from siftclip.datamodules.storage.local import default_cache
from siftclip.errors import InputError
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.pool import PoolSettings

URL = "https://alice:wonderland@host:8443/pool?sv=1&sig=a%2Fb&version=2"
OPTIONS = {"key": "wonderland", "client_kwargs": {"headers": {"X": "wonderland"}}, "anon": False}
VALUES: list[Any] = [ConfidentialUrl(URL), ConfidentialOptions(OPTIONS)]


@pytest.mark.parametrize("value", VALUES, ids=["url", "options"])
def test_no_text_of_it_has_the_secret(value: Any, tmp_path: Path) -> None:
    texts = [str(value), repr(value), f"{value}", "%s %r" % (value, value), json.dumps(value)]  # noqa: UP031
    texts += [json.dumps({"a": value}), yaml.dump(value), repr([value]), "".join(value)]
    texts += [str(pickle.dumps(value, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    assert not [text for text in texts if "wonderland" in text or "%2Fb" in text]
    assert "wonderland" in str(value.reveal())


@pytest.mark.parametrize("value", VALUES, ids=["url", "options"])
def test_copies_are_whole_in_this_process(value: Any) -> None:
    read_back = pickle.loads(pickle.dumps(value))  # noqa: S301 - ours
    for same in (copy.copy(value), copy.deepcopy(value), read_back):
        assert type(same) is type(value)
        assert same == value
        assert same.reveal() == value.reveal()


def send(value: Any, queue: Any) -> None:
    queue.put(str(value.reveal()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_is_started_gets_it_whole(method: str) -> None:
    context = multiprocessing.get_context(method)
    for value in VALUES:
        queue = context.Queue()
        process = context.Process(target=send, args=(value, queue))
        process.start()
        assert queue.get(timeout=60) == str(value.reveal())
        process.join()


def test_another_process_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = [pickle.dumps(value) for value in VALUES]
    monkeypatch.setattr("siftclip.confidential._kept", {})
    url, options = map(pickle.loads, pickled)
    for root, given, name in ((url, VALUES[1], "root"), (VALUES[0], options, "storage_options")):
        with pytest.raises(InputError, match=rf"^{name} has \*\*\* in the place of credentials"):
            connect(root, given)


def test_a_place_is_the_same_for_whoever_reads_it() -> None:
    others = [URL.replace("wonderland", "x"), URL.replace("a%2Fb", "c").replace("sv=1", "sv=2")]
    others.append("https://host:8443/pool?version=2")
    places = {ConfidentialUrl(url).place for url in (URL, *others)}
    assert places == {"https://host:8443/pool?version=2"}
    assert len({default_cache(url) for url in (URL, *others)}) == 1
    assert ConfidentialUrl("ftp://alice:pw@host/x").place == "ftp://alice@host/x"


@pytest.mark.parametrize(
    "root",
    [
        *("/data/pool", "s3://bucket/pool", "https://host/pool?version=2", "sftp://alice@host/x"),
        *("abfs://container@account/x", "github://org:repo@main/x", "/data/a?token=b"),
    ],
)
def test_a_place_without_credentials_is_what_it_was(root: str) -> None:
    """Caches in the home directory are named after it."""
    assert ConfidentialUrl(root).place == root
    assert ConfidentialUrl(root).reveal() == root
    assert ConfidentialUrl(root).authorized(f"{root}/x") == f"{root}/x"


def test_credentials_go_to_their_own_server_alone() -> None:
    url = ConfidentialUrl(URL)
    assert url.authorized("https://host:8443/pool/x@y.tar") == (
        "https://alice:wonderland@host:8443/pool/x@y.tar?sv=1&sig=a%2Fb"
    )
    for other in ("https://host/pool", "http://host:8443/", "https://evil:8443/", "file:///x"):
        assert url.authorized(other) == other


def test_settings_keep_it_and_records_do_not() -> None:
    settings = PoolSettings(root=URL, storage_options=OPTIONS)
    assert "wonderland" not in repr(settings)
    plain = to_plain(settings)
    assert "wonderland" not in str(plain)
    assert (type(plain["root"]), plain["storage_options"]["anon"]) == (str, False)
    options = PoolOptions(root=settings.root, storage_options=settings.storage_options)
    assert options == PoolOptions(root=URL, storage_options=OPTIONS)
    assert "wonderland" not in repr(options)
    assert options.root.reveal() == URL  # type: ignore[attr-defined]
    assert options.storage_options.reveal() == OPTIONS  # type: ignore[attr-defined]
