"""Values that never print: a URL without its credentials, options of which the names alone show.

Their text is what may be seen, so that nothing that formats or writes them can show more. What is
behind it comes by `reveal` alone, to the code that connects. A pickle has it where a process is
being started, and else a key to it, which only this process and its forks know.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any
from urllib.parse import urlsplit

from siftclip.redaction import (
    begins_as_url,
    hidden,
    hide_in_url,
    query_credentials,
    remember_all,
    remember_url,
    split_url,
)

_kept: dict[str, Any] = {}  # what pickles have keys to


class ConfidentialUrl(str):
    """A URL without its credentials, or the path of a folder, which has none.

    >>> from siftclip.confidential import ConfidentialUrl
    >>> url = ConfidentialUrl("https://alice:wonderland@example.org/pool")
    >>> print(url)
    https://***@example.org/pool
    """

    __slots__ = ("_whole",)
    _whole: str

    def __new__(cls, url: str) -> ConfidentialUrl:
        """Hide the credentials of a URL."""
        if isinstance(url, cls):
            return url
        self = super().__new__(cls, hide_in_url(url) if begins_as_url(url) else url)
        self._whole = url
        remember_url(url)
        return self

    def reveal(self) -> str:
        """Return the whole URL."""
        return self._whole

    @property
    def _user(self) -> str:
        """The user, where another one may have another folder: HTTP serves all the same."""
        front, user, _ = split_url(self._whole)
        name = user.partition(":")[0]
        return f"{name}@" if name and not front.lower().startswith("http") else ""

    @property
    def place(self) -> str:
        """The URL without its credentials: what it is for whoever reads it, and still a URL."""
        credentials = query_credentials(self._whole)
        front, _, rest = split_url(self._whole)
        if credentials:
            rest, _, query = rest.partition("?")
            others = "&".join(part for part in query.split("&") if part not in credentials)
            rest += f"?{others}" if others else ""
        return f"{front}{self._user}{rest}"

    def authorized(self, url: str) -> str:
        """Return a URL of the same server with the credentials of this one; others as they are."""
        here, there = urlsplit(self.place), urlsplit(url)
        if (here.scheme, here.netloc) != (there.scheme, there.netloc):
            return url
        front, user, _ = split_url(self._whole)
        if user:
            url = f"{front}{user}@{url[len(front) :].removeprefix(self._user)}"
        for part in query_credentials(self._whole):
            url += ("&" if "?" in url else "?") + part
        return url

    def __copy__(self) -> ConfidentialUrl:
        return self

    def __deepcopy__(self, memo: object) -> ConfidentialUrl:
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _reduced(self, str(self), self._whole)


class ConfidentialOptions(dict[str, Any]):
    """Options of a file system, in which all values but true, false and null are `***`.

    >>> from siftclip.confidential import ConfidentialOptions
    >>> ConfidentialOptions({"anon": False, "secret": "wonderland"})
    {'anon': False, 'secret': '***'}
    """

    __slots__ = ("_whole",)

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Hide the values of options."""
        self._whole = revealed(options)
        remember_all(self._whole)
        super().__init__(hidden(self._whole, of_access=True))

    def reveal(self) -> dict[str, Any]:
        """Return the options with their values."""
        return copy.deepcopy(self._whole)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._whole == revealed(other)

    __hash__ = None  # as of every mapping

    def __copy__(self) -> ConfidentialOptions:
        return self

    def __deepcopy__(self, memo: object) -> ConfidentialOptions:
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _reduced(self, dict(self), self._whole)


def confidential(value: Any) -> Any:
    """Return a text as `ConfidentialUrl`, a mapping as `ConfidentialOptions`, others unchanged."""
    if isinstance(value, str):
        return ConfidentialUrl(value)
    if isinstance(value, Mapping):
        return ConfidentialOptions(value)
    return value


def revealed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with their values, whether these are hidden or not."""
    return options.reveal() if isinstance(options, ConfidentialOptions) else dict(options)


def _reduced(value: Any, shown: Any, whole: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return what a pickle holds."""
    kind = type(value)
    # to a process that is being started it goes through a pipe, and into no file
    if shown == whole or get_spawning_popen() is not None:
        return kind, (whole,)
    key = next((key for key, kept in _kept.items() if kept == whole), None)
    if key is None:
        key = secrets.token_hex(16)
        _kept[key] = whole
    return _recalled, (kind, key, shown)


def _recalled(kind: Callable[[Any], Any], key: str, shown: Any) -> Any:
    return kind(_kept.get(key, shown))
