"""What samples without an image or a caption consist of, and commands that give them both.

A stranger's pool may be sound and only have other names: `.tif`, `NAME.input.jpg`, captions in the
JSON. Then a message says what is there, and gives the command that writes it under the names that
are read.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from annotated_types import MaxLen, MinLen

from siftclip.errors import InputError

if TYPE_CHECKING:
    from siftclip.datamodules.index.tar_walk import KeySplit

IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp")  # open_clip's order of preference
TEXT_SUFFIX = "txt"
_OTHER_IMAGES = ("tif", "tiff", "gif", "bmp", "avif", "jfif", "jpe", "img", "image")
_OTHER_TEXTS = ("caption", "captions", "text", "cap", "prompt", "outputs", "output", "label")
_TEXT_FIELDS = (
    *("caption", "captions", "text", "txt", "texts", "alt", "alt_text", "title"),
    *("description", "prompt", "label"),
)
MAX_KINDS = 20  # that are kept apart
_KINDS_SHOWN = 3
_SUFFIXES_SHOWN = 5
_FIELDS_SHOWN = 3
_DEPTH = 3  # of objects inside a JSON

WRITE_BOTH = (
    "A sample needs both, with these suffixes: docs/pools.md has commands that write such tars."
)

ANOTHER_SPLIT = (
    "These are several samples each: webdataset's rule ends a key at the first dot of a name. Read "
    "the pool with last_dot as the key split."
)
# The names that webdataset shall see, which ends keys at the first dot
_WITHOUT_DOTS = (
    ', rename_files = lambda n: n.rpartition(".")[0].replace(".", "_") + "." + n.rpartition(".")[2]'
)

COPY_AGAIN = "Copy these tars again, remove them, or allow more with max_bad_fraction."
_COMPRESSORS = ("gzip", "bzip2", "xz", "zstd")

KindsState: TypeAlias = list[Annotated[list[Any], MinLen(3), MaxLen(3)]]
Field = tuple[str | int, ...]  # names and places on the way to a text in a JSON


@dataclass(frozen=True, slots=True)
class MemberKind:
    """The suffixes of a sample, in the order of the tar, and where its JSON holds texts."""

    suffixes: tuple[str, ...]
    fields: tuple[Field, ...] = ()

    @property
    def has_image(self) -> bool:
        """Whether there is an image that is read."""
        return any(suffix in IMAGE_SUFFIXES for suffix in self.suffixes)

    @property
    def has_text(self) -> bool:
        """Whether there is a caption that is read."""
        return TEXT_SUFFIX in self.suffixes


_OTHERS = MemberKind(())  # of kinds beyond MAX_KINDS


@dataclass(slots=True)
class MemberKinds:
    """Counts of incomplete samples by what they consist of."""

    counts: Counter[MemberKind] = field(default_factory=Counter)

    def add(self, kind: MemberKind, samples: int = 1) -> None:
        """Count samples of a kind."""
        is_new = kind not in self.counts and len(self.counts) >= MAX_KINDS
        self.counts[_OTHERS if is_new else kind] += samples

    def merge(self, other: MemberKinds) -> None:
        """Add what another one has counted."""
        for kind, samples in other.counts.items():
            self.add(kind, samples)

    def state(self) -> KindsState:
        """Return plain values, for JSON."""
        return [
            [list(kind.suffixes), [list(f) for f in kind.fields], count]
            for kind, count in self.counts.items()
        ]

    @classmethod
    def from_state(cls, state: KindsState) -> MemberKinds:
        """Invert `state`.

        Raises:
            InputError: it is something else.
        """
        kinds = cls()
        try:
            for suffixes, fields, count in state:
                kinds.counts[MemberKind(tuple(suffixes), tuple(map(tuple, fields)))] = int(count)
        except (TypeError, ValueError):
            raise InputError("the kinds of incomplete samples cannot be read") from None
        return kinds

    def describe(self) -> str:
        """Say what the samples have and lack, in one sentence for each thing that is lacking."""
        by_lack: dict[str, list[str]] = {}
        for kind, count in self.counts.most_common():
            by_lack.setdefault(_lack(kind), []).append(_has(kind, count))
        return " ".join(
            f"{'; '.join(shown[:_KINDS_SHOWN])}"
            f"{f'; and {len(shown) - _KINDS_SHOWN} other kinds' if shown[_KINDS_SHOWN:] else ''}; "
            f"none of these has {lack}."
            for lack, shown in by_lack.items()
        )

    def way_out(self, tars: str, key_split: KeySplit) -> str:
        """Return the command that writes the most frequent kind with the names that are read.

        Args:
            tars: a pattern of the shell for the tars, quoted.
            key_split: with which they were read.
        """
        kind, _ = max(self.counts.items(), key=lambda item: item[1], default=(_OTHERS, 0))
        if key_split == "first_dot" and _has_several(kind):
            return ANOTHER_SPLIT
        image, text = _image_of(kind), _text_of(kind)
        if image is None or text is None:
            return WRITE_BOTH
        parts = {"__key__": 's["__key__"]', "jpg": image, TEXT_SUFFIX: text}
        if "json" in kind.suffixes:
            parts["json"] = 's["json"]'
        sample = ", ".join(f'"{name}": {value}' for name, value in parts.items())
        program = (
            "import json, sys, webdataset as w; o = w.TarWriter(sys.argv[2]); "
            f"[o.write({{{sample}}}) for s in w.WebDataset(sys.argv[1], shardshuffle = False"
            f"{'' if key_split == 'first_dot' else _WITHOUT_DOTS})]; o.close()"
        )
        command = for_each_tar(tars, program)
        return f"This writes them as .jpg and .txt into the folder new, a pool then: {command}"


def for_each_tar(tars: str, program: str) -> str:
    """Return the command that runs a Python program with each tar and the path of its new one."""
    run = f'{shlex.quote(sys.executable)} -c {shlex.quote(program)} "$t" "new/${{t##*/}}"'
    return f"mkdir new; for t in {tars}; do {run}; done"


def sort_tars(tars: str, *, drop_folders: bool) -> str:
    """Return the command that writes tars whose members are sorted by name.

    Args:
        tars: a pattern of the shell for the tars, quoted.
        drop_folders: from the names.
    """
    name = 'm.name.rpartition("/")[2]' if drop_folders else "m.name"
    program = (
        'import sys, tarfile; a = tarfile.open(sys.argv[1]); b = tarfile.open(sys.argv[2], "w"); '
        f"m = sorted((({name}, m) for m in a if m.isfile()), key = lambda x: x[0]); "
        '[(setattr(x, "name", n), b.addfile(x, a.extractfile(x))) for n, x in m]; b.close()'
    )
    return f"This brings them together: {for_each_tar(tars, program)}"


def unpack_tars(tars: str, cause: str) -> str:
    """Return the command that decompresses tars, if the cause of their loss is that they must be.

    Args:
        tars: a pattern of the shell for the tars, quoted.
        cause: which names how they are compressed.
    """
    program = next((name for name in _COMPRESSORS if f"compressed by {name} " in cause), None)
    if program is None:
        return COPY_AGAIN
    run = f'{program} -dc "$t" > "new/${{t##*/}}"'
    return f"This decompresses them: mkdir new; for t in {tars}; do {run}; done"


def kind_of(suffixes: Sequence[str], record: bytes | None) -> MemberKind:
    """Return the kind of a sample with these suffixes and, if it has one, this JSON."""
    fields: tuple[Field, ...] = ()
    if record is not None and TEXT_SUFFIX not in suffixes:
        try:
            fields = tuple(_text_fields(json.loads(record)))
        except (ValueError, RecursionError):
            fields = ()
    return MemberKind(tuple(suffixes), fields)


def _text_fields(record: Any) -> list[Field]:
    """Find the fields of a JSON that hold texts: those that are named so, else the first."""
    fields = list(_walk(record, ()))
    named = {name: [path for path in fields if _last_name(path) == name] for name in _TEXT_FIELDS}
    captions = [path for paths in named.values() for path in paths]
    return (captions or fields)[:_FIELDS_SHOWN]


def _walk(value: Any, path: Field) -> Iterator[Field]:
    if isinstance(value, str) and value.strip() and path:
        yield path
    elif isinstance(value, Mapping) and len(path) < _DEPTH:
        for name, inner in value.items():
            yield from _walk(inner, (*path, name))
    elif isinstance(value, list) and value and path and len(path) < _DEPTH:
        yield from _walk(value[0], (*path, 0))


def _last_name(path: Field) -> str:
    return next((part.lower() for part in reversed(path) if isinstance(part, str)), "")


def _is_caption(path: Field) -> bool:
    return _last_name(path) in _TEXT_FIELDS


def _has_several(kind: MemberKind) -> bool:
    """Return whether several images are in one sample, whose suffixes all have dots inside."""
    endings = Counter(suffix.rpartition(".")[2] for suffix in kind.suffixes)
    images = sum(endings[known] for known in (*IMAGE_SUFFIXES, *_OTHER_IMAGES))
    return images > 1 and all("." in suffix for suffix in kind.suffixes)


def _lack(kind: MemberKind) -> str:
    image = f"an image ({_listed(IMAGE_SUFFIXES, 'or')})"
    text = f"a caption (.{TEXT_SUFFIX})"
    if kind.has_image:
        return text
    return image if kind.has_text else f"{image} or {text}"


def _has(kind: MemberKind, count: int) -> str:
    samples = "1 sample has" if count == 1 else f"{count} samples have"
    if not kind.suffixes:
        return f"{samples} other members"
    fields = ", ".join(".".join(map(str, path)) for path in kind.fields)
    inside = (
        f' whose texts are "{fields}"' if len(kind.fields) > 1 else f' with the text "{fields}"'
    )
    return f"{samples} {_listed(kind.suffixes, 'and')}{inside if fields else ''}"


def _listed(suffixes: Sequence[str], word: str) -> str:
    """List suffixes with their dots, not too many."""
    shown = [f".{suffix}" for suffix in suffixes[:_SUFFIXES_SHOWN]]
    if len(suffixes) > _SUFFIXES_SHOWN:
        return f"{', '.join(shown)} {word} {len(suffixes) - _SUFFIXES_SHOWN} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {word} {shown[-1]}"


def _image_of(kind: MemberKind) -> str | None:
    """Return the expression for the image of a sample `s`, as webdataset gives it."""
    known = (*IMAGE_SUFFIXES, *_OTHER_IMAGES)
    return _member(kind, lambda suffix: suffix in IMAGE_SUFFIXES) or _member(
        kind, lambda suffix: suffix.rpartition(".")[2] in known
    )


def _text_of(kind: MemberKind) -> str | None:
    """Return the expression for the caption of a sample `s`."""
    if kind.has_text:
        return f's["{TEXT_SUFFIX}"]'
    path = next(filter(_is_caption, kind.fields), None)
    if path is not None:
        return 'json.loads(s["json"])' + "".join(
            f"[{json.dumps(part, ensure_ascii=False)}]" for part in path
        )
    known = (TEXT_SUFFIX, *_OTHER_TEXTS)
    return _member(kind, lambda suffix: suffix.rpartition(".")[2] in known)


def _member(kind: MemberKind, is_wanted: Callable[[str], bool]) -> str | None:
    suffix = next(filter(is_wanted, kind.suffixes), None)
    return None if suffix is None else f"s[{json.dumps(suffix)}]"
