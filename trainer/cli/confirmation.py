"""Asks on the terminal before something is removed, or takes long."""

from __future__ import annotations

import sys

from siftclip.errors import InputError


def confirmed(question: str, *, yes: bool, option: str) -> bool:
    """Return whether something may be done.

    Args:
        question: to ask, without its question mark.
        yes: it was said already.
        option: that says it, for the message.

    Raises:
        InputError: nobody said it, and there is no terminal to ask on.
    """
    if yes:
        return True
    if not at_terminal():
        raise InputError(
            f"Nothing was removed: there is no terminal to ask on. {option}=true removes it."
        )
    return asked(question)


def at_terminal() -> bool:
    """Return whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def asked(question: str) -> bool:
    """Ask on the terminal, and return whether the answer is yes.

    Args:
        question: without its question mark.
    """
    print(f"{question}? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
