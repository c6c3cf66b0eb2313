"""Uids as texts: 32 hexadecimal digits, or a UUID with its dashes, in letters of either case."""

from __future__ import annotations

import re

UID_RULE = "32 hexadecimal digits, or a UUID with dashes"
DASHES = (8, 13, 18, 23)  # where a UUID of 36 characters has its dashes

_UID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def plain_uid(text: object) -> str | None:
    """Return a uid without dashes, 32 hexadecimal digits; None if it is no uid.

    Example:
        >>> from siftclip.uid_texts import plain_uid
        >>> plain_uid("00000000-0000-0001-0000-00000000000A")
        '0000000000000001000000000000000A'
        >>> plain_uid("1234") is None
        True
    """
    if not isinstance(text, str) or _UID.fullmatch(text) is None:
        return None
    return text.replace("-", "")
