"""What the Hugging Face hub, its HTTP client and the disk raise, as `InputError` with a way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from siftclip.errors import InputError
from siftclip.writing import DISK_FULL

_OTHER_WAY = "A task folder that was downloaded elsewhere can be copied here unchanged."


@contextmanager
def readable_errors(repository: str, endpoint: str, folder: Path | None) -> Iterator[None]:
    """Turn what huggingface_hub, its HTTP client and the disk raise into `InputError`.

    Its HTTP client is requests, httpx or httpx2, by its version: `HTTPError` is that client's, and
    what the first raises otherwise is an OSError.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, HTTPError) as error:
        raise InputError(_explain(error, repository, endpoint, folder)) from None


def may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        status = _status(error)
        return status is None or status >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return getattr(error, "errno", None) is None  # else it is the disk's


def _explain(error: Exception, repository: str, endpoint: str, folder: Path | None) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repository} cannot be downloaded while HF_HUB_OFFLINE is set. {_OTHER_WAY}"
    if isinstance(error, GatedRepoError):  # before its base class, RepositoryNotFoundError
        return (
            f"{repository} is gated: accept its conditions at {endpoint}/datasets/{repository}, "
            "and give a token of that account in HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{endpoint} has no data set {repository}, or it is private and HF_TOKEN is not that "
            "of an account that may read it."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no such revision at {endpoint}: {_first_line(error)}."
    if isinstance(error, EntryNotFoundError):
        return f"{repository} lists a file that {endpoint} does not have: {_first_line(error)}."
    if isinstance(error, HfHubHTTPError):
        status = _status(error)
        way = "Check HF_TOKEN." if status in (401, 403) else "Try again later."
        return f"{endpoint} answered {status} about {repository}: {_first_line(error)}. {way}"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return (
            f"There is no room left on the disk of {folder}. Make room and run this again; "
            "it continues where it was."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be written: {error.strerror}."
    return (
        f"{repository} could not be fetched from {endpoint}: {_first_line(error)}. Without a "
        "network, set a mirror in HF_ENDPOINT or a proxy in HTTPS_PROXY. Run this again to "
        f"continue. {_OTHER_WAY}"
    )


def _status(error: HfHubHTTPError) -> int | None:
    return None if error.response is None else error.response.status_code


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
