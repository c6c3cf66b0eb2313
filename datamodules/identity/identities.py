"""What a kept result depends on, said in one way for whatever is kept, and what is said of reuse.

Scores, selections, features, targets, results of evaluations and runs are reused where their
identity is the same: a plain dict of everything that the result depends on. It is written beside
the result, so that a later version, and a person, can tell why a result is not reused.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from siftclip.datamodules.identity.code_identity import code_identity
from siftclip.errors import InputError
from siftclip.files import content_digest, file_stamp, identity_hash, read_json
from siftclip.selectors.core.description import Behind, describe, stored_name

log = logging.getLogger(__name__)

FORMAT = 2  # of identities: 1 knew neither code nor the content of files
_FILES_OF_A_FOLDER = 10_000  # that are looked at; pools have more
_LOOKED_AT = 200  # kept results among which the nearest is looked for
_WORDS = {
    "selector": "the selector's parameters",
    "code": "the code",
    "pool": "the pool",
    "features": "the features",
    "columns": "the columns that it reads",
    "files": "the files that it reads",
    "samples": "the samples to choose from",
    "siftclip": "the version of siftclip",
    "selection": "the selection",
    "online": "the selection in the loop",
    "loss": "the loss",
    "loss_data": "what the loss reads",
    "budget": "the budget",
    "data": "how samples are loaded",
    "tars": "the tars",
    "members": "the images and captions of the pool",
    "model": "the model",
    "task": "the task",
    "precision": "the precision",
    "scale": "the budget",
    "optim": "the optimiser",
    "seed": "the seed",
    "max_caption_bytes": "how long captions may be",
    "batch_norms": "the samples that batch norms see together",
}


def kept_identity(kind: str, depends_on: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result of a kind depends on.

    `depends_on` holds plain values that JSON can hold: parameters by value, files by what they
    contain (`content_digest`), selectors by `selector_identity`.
    """
    return {"kind": kind, "format": FORMAT, **depends_on}


def selector_identity(selector: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what stands for a selector: its parameters, its code, and the files that these name.

    Args:
        selector: or any object that `describe` can describe.
        without: attributes that do not count.
    """
    behind = Behind()
    parameters = describe(selector, behind, without=without)
    return {
        "selector": parameters,
        "code": code_identity(behind.code),
        "files": named_files(behind.texts),
    }


def stored_targets(node: Any) -> Any:
    """Copy a part of a configuration, each `_target_` of ours under the name that is kept.

    So that files of ours may move, and a public name and the place of a class are the same.
    """
    if isinstance(node, list):
        return [stored_targets(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    stored = {key: stored_targets(value) for key, value in node.items()}
    target = stored.get("_target_")
    if isinstance(target, str) and target.startswith("siftclip."):
        stored["_target_"] = stored_name(pkgutil.resolve_name(target))
    return stored


def named_files(texts: Iterable[str]) -> dict[str, str]:
    """Hash the files and folders among some texts, each by its text.

    Of a file that is its digest. Of a folder, which needs a slash in its text to be taken for one,
    it is a hash of the stamps of its files, because it may be large.
    """
    digests = {}
    for text in sorted(texts):
        path = Path(text)
        looks_like_one = 0 < len(text) < 4096 and "\0" not in text and (path.suffix or "/" in text)
        try:
            if looks_like_one and path.is_file():
                digests[text] = content_digest(path)
            elif "/" in text and text.strip("/.") and looks_like_one and path.is_dir():
                digests[text] = _folder_stamp(path)
        except (OSError, InputError):  # a name that is too long, or a file that is not ours to read
            continue
    return digests


def _folder_stamp(folder: Path) -> str:
    """Return a stamp that changes with the files in a folder, hidden ones (caches) excluded."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = (name for name in names if not any(part.startswith(".") for part in name.parts))
    files = list(islice(shown, _FILES_OF_A_FOLDER + 1))
    if len(files) > _FILES_OF_A_FOLDER:
        log.warning(
            "%s holds more than %d files: a change of theirs is not noticed, so compute again, "
            "without reuse, when you change one",
            folder,
            _FILES_OF_A_FOLDER,
        )
        return "too many files"
    stamps = [[name.as_posix(), *file_stamp(folder / name)[1:]] for name in sorted(files)]
    return identity_hash({"files": stamps})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe in what two identities differ."""
    if old.get("format", 1) != FORMAT:
        return ["an earlier version kept it without noting the code and the content of files"]
    words = []
    for key in dict.fromkeys([*new, *old]):
        before, now = old.get(key), new.get(key)
        if before == now or key in ("kind", "format"):
            continue
        label = _WORDS.get(key, key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
            label += f" ({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''})"
        words.append(label)
    return words


def when(path: Path) -> str:
    """Return the time of a file's last change, in words, in the machine's time zone."""
    return f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"


def say_reused(what: str, path: Path) -> None:
    """Say in a line what is reused, from when, and how to have it computed again."""
    log.info("reused %s of %s (%s); reuse=false computes again", what, when(path), path)


def say_why_not(what: str, new: Mapping[str, Any], kept: Iterable[Path], *, like: str) -> None:
    """Say in a line why a kept result that is near to this one is not reused, if there is one.

    Args:
        what: the result is called.
        new: its identity.
        kept: JSON files with the identities of kept results, or with one under "identity".
        like: the key in which a kept result must agree to be mentioned.
    """
    nearest: tuple[int, Path, list[str]] | None = None
    newest = sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True)[:_LOOKED_AT]
    for path in newest:
        try:
            old = read_json(path)
        except (InputError, OSError):
            continue  # it is not reused, whatever it is
        old = old.get("identity", old) if isinstance(old, Mapping) else {}
        if not isinstance(old, Mapping) or old.get(like) != new.get(like):
            continue
        reasons = differences(old, new)
        if reasons and (nearest is None or len(reasons) < nearest[0]):
            nearest = len(reasons), path, reasons
    if nearest is not None:
        _, path, words = nearest
        log.info("not reused: %s of %s (%s): %s", what, when(path), path, "; ".join(words))
