"""What texts must not show: credentials, and characters that a terminal obeys.

Credentials are found by where they stand (the user and the password of a URL, the values behind its
`?`) and by their value, where this process has been told one (`remember`). Whoever prints, or
writes what a person reads, passes the text through `shown`.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
_LEAST = 4  # characters of a value that is looked for in texts
_WORD = 8  # characters below which it must stand alone: "test" is part of too many words
# says where a value comes from, and has none
_REFERENCE = re.compile(r"\$\{([^{}]|\$\{[^{}]*\})*\}")

# ---- names --------------------------------------------------------------------------------------
# Never anything else than credentials, wherever they stand
_NAMES = re.compile(
    r"pass(word|wd|phrase)|(^|[_.-])pwd($|[_.-])|secret|api[_-]?key|authorization|cookie"
    r"|credentials?$|(access|account|private|auth|sas|session|security|bearer|refresh|hub|hf)"
    r"[_-]?(key|token)(?![a-z])|connection[_-]?string",
    re.IGNORECASE,
)
# So does what one calls them where there is nothing else to name: in a URL, of a file system
_NAMES_OF_ACCESS = re.compile(
    _NAMES.pattern + r"|token|(^|[_-])key|auth|sig(nature)?$|^(code|hash|hmac|jwt|sas|policy)$"
    r"|^x-(amz|goog|oss|cos|obs|ms)-|^expires$|^(google|aws)accesskeyid$|^googleaccessid$",
    re.IGNORECASE,
)
# What a shared access signature of Azure consists of
_SIGNED = {
    *("sv", "ss", "srt", "sr", "sp", "st", "se", "spr", "sip", "ses", "saoid", "suoid"),
    *("skoid", "sktid", "skt", "ske", "sks", "skv"),
}
_IN_ENVIRONMENT = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(^|_)(PASS|PW)|API_?KEY|ACCESS_KEY)S?$"
)


def names_credentials(name: str, *, of_access: bool = False) -> bool:
    """Return whether a parameter of this name has credentials for its value.

    Args:
        name: such as `api_key`.
        of_access: it is a parameter of a URL or a file system, where `token` and `key` mean these.
    """
    return (_NAMES_OF_ACCESS if of_access else _NAMES).search(name) is not None


# ---- URLs ---------------------------------------------------------------------------------------
_IN_QUERY = re.compile(r"([?&;#][^=&;#?\s\"'<>]+=)([^&;#\s\"'<>]+)")
# A part behind a `?` or a `#` without a name, such as a signature alone; no end of a name of a file
_BARE = re.compile(r"([?&;#])([\w%+~-]{6,})(?=[&;#]|$)")
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://[^\s\"'<>]+")
_WITHOUT_SCHEME = re.compile(r"(?<![:\w/])//([^\s\"'<>/@:${]+:[^\s\"'<>@]+)@")
# "user:password@host:80" or "user:password@host/path", whose scheme was forgotten altogether
# It is looked for from the beginning of a name only, or of what follows the first plus in one: from
# everywhere, long texts would take the square of their length.
_WITHOUT_SLASHES = re.compile(
    r"(?:(?<![\w.+/:@%-])|(?<=[/:@%])(?P<kept>[\w.-]*\+))"
    r"(?P<login>[\w.+-]+:[^\s\"'<>@/:{}=,]{4,})@(?=[\w.-]+(:\d|/))"
)
_BEGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PORT = re.compile(r"\d*")
_NO_PASSWORDS = ("github", "git")  # have a repository there


def split_url(url: str) -> tuple[str, str, str]:
    """Split a URL in what is in front of its credentials, these (`user:password`), and the rest.

    Of schemes other than http a user alone is none: Azure has its containers there.
    """
    scheme, separator, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    port = authority.partition(":")[2]
    if not at and "@" in rest and not authority.startswith("[") and not _PORT.fullmatch(port):
        user, at, _ = rest.partition("@")  # a slash in the password, which ends it for others
    is_password = ":" in user or scheme.lower() in ("http", "https")
    if not separator or not at or not is_password or scheme.lower() in _NO_PASSWORDS:
        return f"{scheme}{separator}", "", rest
    return f"{scheme}{separator}", user, rest[len(user) + 1 :]


def is_reference(text: str) -> bool:
    """Return whether a text of a configuration only says where its value comes from."""
    return _REFERENCE.fullmatch(text) is not None


def begins_as_url(text: str) -> bool:
    """Return whether a text begins with a scheme, such as `https://`."""
    return _BEGIN.match(text) is not None


def hide_in_url(url: str, *, by: Callable[[str], str] = lambda credential: HIDDEN) -> str:
    """Replace the credentials of a URL, and all values behind its `?`.

    Args:
        url: all of the text.
        by: returns what takes the place of one.
    """
    front, user, rest = split_url(url)
    stays = is_reference(user) or is_reference(user.partition(":")[2])
    front += f"{user if stays else by(user)}@" if user else ""
    rest = _BARE.sub(lambda match: match[1] + by(match[2]), rest)
    return front + _IN_QUERY.sub(
        lambda match: match[1] + (match[2] if is_reference(match[2]) else by(match[2])), rest
    )


def hide_in_text(text: str, *, by: Callable[[str], str] = lambda credential: HIDDEN) -> str:
    """Replace as `hide_in_url` does in all URLs of a text."""
    if "@" in text:
        text = _WITHOUT_SLASHES.sub(
            lambda match: f"{match['kept'] or ''}{by(match['login'])}@", text
        )
    if "//" not in text:
        return text
    text = _WITHOUT_SCHEME.sub(lambda match: f"//{by(match[1])}@", text)
    return _URL.sub(lambda match: hide_in_url(match[0], by=by), text)


def query_credentials(url: str) -> list[str]:
    """List the `name=value` behind the `?` of a URL that are credentials, or belong to them."""
    query = split_url(url)[2].partition("#")[0].partition("?")[2]
    parts = [part for part in query.split("&") if part]
    names = [part.partition("=")[0] for part in parts]
    signed = _SIGNED if "sig" in names else set()
    return [
        part
        for part, name in zip(parts, names, strict=True)
        if name in signed or names_credentials(name, of_access=True)
    ]


# ---- values -------------------------------------------------------------------------------------
_values: set[str] = set()


def remember(value: object) -> None:
    """Have a value replaced in all that is `shown`; very short ones cannot be told from words."""
    text = str(value)
    scheme, _, rest = text.partition(" ")  # as headers have it: "Bearer VALUE"
    for each in (text, rest if scheme.lower() in _SCHEMES else text):
        if len(each) >= _LEAST and each not in _values and "${" not in each:
            _values.add(each)
            _pattern.cache_clear()


def forget() -> None:
    """Forget all values that were remembered."""
    _values.clear()
    _pattern.cache_clear()


_SCHEMES = ("basic", "bearer", "token", "digest")


def remember_url(url: str) -> None:
    """Remember the credentials of a URL, also as HTTP sends them."""
    _, user, _ = split_url(url)
    name, _, password = user.partition(":")
    for value in (user, password) if password else (name,):
        remember(unquote(value))
        remember(value)
    if password:
        for encoding in ("utf-8", "latin-1"):
            both = unquote(user).encode(encoding, errors="replace")
            remember(base64.b64encode(both).decode())
    for part in query_credentials(url):
        name, _, value = part.partition("=")
        if name not in _SIGNED:  # these are dates and letters
            remember(unquote(value))


def remember_all(tree: object, *, certain: bool = False) -> None:
    """Remember the credentials among the options of a file system.

    Args:
        tree: the options.
        certain: all texts and numbers in it are; else names, URLs and looks decide.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            name = str(key)
            is_one = name.lower() == "headers" or names_credentials(name, of_access=True)
            remember_all(value, certain=certain or is_one)
    elif isinstance(tree, list | tuple):
        for value in tree:
            remember_all(value, certain=certain)
    elif isinstance(tree, str) and "://" in tree:
        remember_url(tree)
    elif (isinstance(tree, str) and (certain or _is_random(tree))) or (
        certain and isinstance(tree, int | float) and not isinstance(tree, bool)
    ):
        remember(tree)


def _is_random(text: str) -> bool:
    kinds = (str.isupper, str.islower, str.isdigit)
    return len(text) >= 12 and sum(any(map(kind, text)) for kind in kinds) >= 2 and "/" not in text


def _in_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if _IN_ENVIRONMENT.search(name) and len(value) >= _WORD and not value.startswith("/"):
            yield value


def _forms(value: str) -> Iterator[str]:
    """Yield a value as texts may have it: quoted for a URL, JSON, Python or HTML, and as base64."""
    yield from (value, quote(value, safe=""), quote(value), quote_plus(value))
    yield from (json.dumps(value)[1:-1], repr(value)[1:-1], html.escape(value))
    if len(value) >= _WORD:
        encoded = base64.b64encode(value.encode(errors="replace")).decode().rstrip("=")
        yield from (encoded, encoded.replace("+", "-").replace("/", "_"))


@cache
def _pattern(more: frozenset[str]) -> re.Pattern[str] | None:
    forms = {form for value in _values | more for form in _forms(value)}
    if not forms:
        return None
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(
        "|".join(
            re.escape(form) if len(form) >= _WORD else rf"(?<!\w){re.escape(form)}(?!\w)"
            for form in longest_first
        )
    )


def redact(text: str) -> str:
    """Replace by `***` what is secret in a text: values that are remembered, credentials of URLs.

    Values of the environment count as remembered, where their names say what they are (HF_TOKEN).
    """
    pattern = _pattern(frozenset(_in_environment()))
    if pattern is not None:
        text = pattern.sub(HIDDEN, text)
    return hide_in_text(text)


def hidden(tree: Any, *, of_access: bool = False) -> Any:
    """Copy a configuration without its credentials, for a record.

    Args:
        tree: plain values.
        of_access: of the options of a file system, whose values are all hidden but true, false and
            null; elsewhere names and URLs decide.
    """
    if isinstance(tree, Mapping):
        return {
            key: _hidden_value(value)
            if of_access or names_credentials(str(key))
            else hidden(value, of_access=key == "storage_options")
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [hidden(value, of_access=of_access) for value in tree]
    if not isinstance(tree, str):
        return tree
    return redact(hide_in_url(tree) if begins_as_url(tree) else str(tree))


def _hidden_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _hidden_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden_value(inner) for inner in value]
    stays = value is None or isinstance(value, bool)
    return value if stays or (isinstance(value, str) and is_reference(value)) else HIDDEN


# ---- what a terminal obeys ----------------------------------------------------------------------
def printable(text: str) -> str:
    """Return the text with escapes such as `\\x1b` for all that a terminal would obey, not show.

    Control characters, line breaks, marks that turn the direction, and parts of characters.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def shown(text: str) -> str:
    """Return what may be printed of a text: `redact`, and `printable` but for its line breaks."""
    return "\n".join(printable(line) for line in redact(text).split("\n"))
