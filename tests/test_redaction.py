"""Texts as they may be shown: without credentials, and without what a terminal obeys."""

from __future__ import annotations

import base64
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip import redaction
from siftclip.errors import InputError, ParameterError
from siftclip.redaction import hidden, hide_in_url, redact, remember, remember_all, shown


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_values", set())
    redaction._pattern.cache_clear()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://alice:pw@host:80/pool", "http://***@host:80/pool"),
        ("https://token@host/pool", "https://***@host/pool"),
        ("s3://KEY:SECRET@bucket/pool", "s3://***@bucket/pool"),
        ("ftp://u:p@host/", "ftp://***@host/"),
        ("http://u:a/b@host/x@y", "http://***@host/x@y"),
        ("http://u:a@b@host/x", "http://***@host/x"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("http://host/x?token=a&Sig=b;c=d#e=f", "http://host/x?token=***&Sig=***;c=***#e=***"),
        ("http://host/{00..12}.tar?sig=a%2Fb", "http://host/{00..12}.tar?sig=***"),
        (
            "http://u:${oc.env:PW}@host/?sig=${oc.env:S}",
            "http://u:${oc.env:PW}@host/?sig=${oc.env:S}",
        ),
        # what stands there is no password
        ("sftp://alice@host/pool", "sftp://alice@host/pool"),
        (
            "abfs://container@account.dfs.core.windows.net/",
            "abfs://container@account.dfs.core.windows.net/",
        ),
        ("github://org:repo@main/pool", "github://org:repo@main/pool"),
        ("s3://bucket/a@b:c", "s3://bucket/a@b:c"),
    ],
)
def test_a_url_shows_no_credentials(url: str, text: str) -> None:
    assert hide_in_url(url) == text
    assert redact(f"cannot read '{url}', a URL") == f"cannot read '{text}', a URL"


@pytest.mark.parametrize("part", ["a+", "//a:b", "a:bbbb ", "http://a:b", "a.-+"])
def test_long_texts_take_a_time_in_proportion_to_their_length(part: str) -> None:
    """What others print passes through here; a square would be minutes."""
    start = time.perf_counter()
    redact(part * 60_000 + ":@x/")
    assert time.perf_counter() - start < 10


def test_a_name_behind_a_plus_is_hidden_wherever_it_stands() -> None:
    assert redact("see /b+alice:wonderland@host/x") == "see /b+***@host/x"
    assert redact("b+alice:wonderland@host:80") == "***@host:80"


def test_a_part_behind_a_url_without_a_name_is_hidden() -> None:
    assert hide_in_url("http://host/x?wonderland#looking-glass") == "http://host/x?***#***"
    for url in ("http://host/0000?.tar", "http://host/x?{0..9}.tar", "s3://b/a?b/c", "s3://b/a?.*"):
        assert hide_in_url(url) == url


def test_a_url_without_its_scheme_shows_no_credentials() -> None:
    assert redact("got 'alice:wonderland@127.0.0.1:80/x'") == "got '***@127.0.0.1:80/x'"
    assert redact("alice:wonderland@host/x") == "***@host/x"
    arm = "{a:selector@online.selector=jest,b:model@x.y=3}"
    for text in (arm, "a: b@c/d", "12:30:15 me@host/x", "git@github.com:org/repo"):
        assert redact(text) == text
    assert redact("no folder '//alice:wonderland@host/pool'") == "no folder '//***@host/pool'"
    for text in ("//host/pool", "a//b:c@d", "x: //alice@host", "http://h//a:b@c", "//${a:b}@h"):
        assert redact(text) == text


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "pass={}&x",
        repr,
        json.dumps,
        lambda value: base64.b64encode(value.encode()).decode(),
        lambda value: "Wonder%22%5Cland%20%2F42",
    ],
)
def test_what_is_remembered_is_found_in_other_forms(form: object) -> None:
    value = 'Wonder"\\land /42'
    remember(value)
    text = form.format(value) if isinstance(form, str) else form(value)  # type: ignore[operator]
    assert "land" not in redact(text)
    assert "***" in redact(text)


def test_short_values_are_found_as_words_and_shorter_ones_are_words() -> None:
    remember("train")
    remember("pw")
    assert redact("train the trainer by pw") == "*** the trainer by pw"


def test_options_of_a_file_system_that_are_no_secrets_are_left_in_texts() -> None:
    options = {
        "client_kwargs": {"region_name": "us-east-1", "headers": {"X-Any": "of-a-header"}},
        "endpoint_url": "http://user:of-a-url@localhost:9000",
        "default_cache_type": "readahead",
        "default_block_size": 1000,
        "password": 123456,
        "anything": "Ab3dEf6hIj9lMn",
    }
    remember_all(options)
    kept = "us-east-1 http://localhost:9000 readahead 1000 samples"
    assert redact(kept) == kept
    assert redact("of-a-header of-a-url 123456 Ab3dEf6hIj9lMn") == "*** *** *** ***"


def test_the_header_of_a_login_is_found() -> None:
    redaction.remember_url("http://alice:w%26nder@host/")
    header = base64.b64encode(b"alice:w&nder").decode()
    assert redact(f"Basic {header}") == "Basic ***"
    remember("Bearer abcdefgh")
    assert redact("sent abcdefgh") == "sent ***"


def test_tokens_of_the_environment_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    assert (
        redact("hf_abcdefgh is not valid: /home/me/key.json")
        == "*** is not valid: /home/me/key.json"
    )


def test_a_record_has_names_and_no_values() -> None:
    record = {
        "pool": {
            "root": "http://u:p@host/",
            "storage_options": {"anon": True, "n": 5, "a": {"b": ["c", None]}, "e": "${oc.env:E}"},
        },
        "trainer": {"loggers": {"x": {"api_key": "k", "name": "n"}}},
        "model": {"hf_tokenizer_name": "t", "context_length": 77},
        "arms": ["pool.root=https://u:p@host/", 1.5, True],
    }
    assert hidden(record) == {
        "pool": {
            "root": "http://***@host/",
            "storage_options": {
                "anon": True,
                "n": "***",
                "a": {"b": ["***", None]},
                "e": "${oc.env:E}",
            },
        },
        "trainer": {"loggers": {"x": {"api_key": "***", "name": "n"}}},
        "model": {"hf_tokenizer_name": "t", "context_length": 77},
        "arms": ["pool.root=https://***@host/", 1.5, True],
    }


@given(st.text())
def test_shown_text_cannot_move_the_cursor(text: str) -> None:
    assert all(line.isprintable() for line in shown(text).split("\n"))
    assert shown(shown(text)) == shown(text)


def test_errors_hold_nothing_that_may_not_be_shown() -> None:
    remember("of-a-header")
    error = ParameterError(
        "cannot be read: \x1b[2J of-a-header", parameter="root", value="http://u:p@host/"
    )
    assert str(error) == ("root cannot be read: \\x1b[2J ***. Got 'http://***@host/'.")
    assert "of-a-header" not in repr(error)
    assert InputError("a\u202eb\x07\nc").args == ("a\\u202eb\\x07\nc",)
