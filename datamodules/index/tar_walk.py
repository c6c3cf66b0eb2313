"""The samples of a webdataset tar from its headers alone: names, places and sizes, in one pass.

Python's tarfile spends about 20 microseconds a member on objects that nobody needs here. This walk
reads windows of the file, looks at three fields of each header, and checks the headers' sums in
blocks. Formats: v7, ustar, pax and GNU, long names included; sparse files are passed over.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from siftclip.datamodules.index.content import LOOKED_AT_BYTES, describe_content
from siftclip.errors import InputError, ParameterError
from siftclip.reading import open_handle

BLOCK_BYTES = 512
MAX_CONTENT_BYTES = 1 << 24  # what a header may make us read: a name, or a sample's JSON
_WINDOW_BYTES = 4096  # holds the small members between two images: one read a sample
_AHEAD_BYTES = 8 << 20  # asked of the system in advance: a cold disk is read at full speed
_HEADERS_A_BLOCK = 1024
_LENGTH_DIGITS = 10  # of the length of a pax record, with the blank behind it
_ZEROS = bytes(BLOCK_BYTES)
_LOOKED_BEHIND_BYTES = 1 << 16  # of what follows an end mark; writers fill up to 10 KB with zeros
_MAX_END_BYTES = 1 << 20  # of the zeros that a tar without members is; more are a lost file
_FILE_KINDS = b"0\x007"  # regular, regular in old tars, contiguous
_EXTENDED_KINDS = b"LxXg"
_EMPTY_KINDS = b"123456"  # links, devices, folders, pipes: no data follows, whatever the size says

# Where a member's name is split into key and suffix: at the first dot of the file's name, which is
# webdataset's rule, or at the last one, for pairs such as `movie.0001.jpg` and `movie.0001.txt`.
KeySplit = Literal["first_dot", "last_dot"]
KEY_SPLITS: tuple[KeySplit, ...] = ("first_dot", "last_dot")
_MAX_NAME = 200  # characters in messages: a header may make a name of megabytes
_META_NAME = re.compile(r"^__[^/]*__($|/)")  # not samples, by webdataset's rule


def require_key_split(parameter: str, value: object) -> KeySplit:
    """Return `value`, a parameter of that name, if it is one of `KEY_SPLITS`."""
    for key_split in KEY_SPLITS:
        if value == key_split:
            return key_split
    rule = f"must be one of {', '.join(KEY_SPLITS)}"
    raise ParameterError(rule, parameter=parameter, value=value)


class TruncatedTarError(Exception):
    """A tar ends in the middle of a member; the samples before the cut have been given out."""

    cause = "cut off with the end of their tar (at least)"  # of lost samples, to follow a count

    def __init__(self, message: str, member: str | None = None) -> None:
        """Store `member`, the name of the file that the cut runs through, where it can be read."""
        super().__init__(message)
        self.member = member


class NoTarError(TruncatedTarError):
    """A file is no uncompressed tar; nothing of it has been given out."""

    def __init__(self, name: str, found: str) -> None:
        """Take the `name` of the file and what it is, such as "a web page"."""
        super().__init__(f"{name} must be an uncompressed tar file. It is {found}")
        self.cause = f"lost with a tar that is {found} (at least)"


class JoinedTarError(TruncatedTarError):
    """Something follows the end mark of a tar, behind which no reader goes; all before is whole."""

    cause = (
        "lost with what is behind the end mark of their tar, as where cat joined tars (at least)"
    )


class Member(NamedTuple):
    """One file inside a tar: where its bytes are."""

    suffix: str  # lower case, what follows the dot that ends the key
    offset_bytes: int
    size_bytes: int
    content: bytes | None  # of the suffix that was asked for; b"" beyond MAX_CONTENT_BYTES


class TarSample(NamedTuple):
    """The members of one key, in the order of the tar, and the bytes that hold all of them."""

    key: str
    members: list[Member]
    start_bytes: int  # of the first header
    end_bytes: int  # behind the last member and what fills its block

    def find(self, *suffixes: str) -> Member | None:
        """Find the member with the first of these suffixes that exists; of two alike, the first."""
        for suffix in suffixes:
            for member in self.members:
                if member[0] == suffix:
                    return member
        return None

    def names(self) -> list[str]:
        """Return the members' names, suffixes in lower case."""
        return [f"{self.key}.{member.suffix}" for member in self.members]

    def repeats(self) -> bool:
        """Return whether two members have one suffix, as where several samples have one key."""
        return len({member.suffix for member in self.members}) < len(self.members)

    def hidden_pairs(self, first: Collection[str], second: Collection[str]) -> Counter[str]:
        """Count the pairs of suffixes, one of each kind, that dots in names hide in this key.

        `movie.1.jpg, movie.1.txt, movie.2.jpg, movie.2.txt` are the pairs `1` and `2` of the key
        `movie`; a mask `0001.seg.png` beside an image is none. A pair that is there twice counts
        as two.
        """
        counts: dict[str, Counter[str]] = {}
        for member in self.members:
            stem, dot, suffix = member.suffix.rpartition(".")
            if dot:
                counts.setdefault(stem, Counter())[suffix] += 1
        return Counter(
            {
                stem: max(kinds.values())
                for stem, kinds in counts.items()
                if not kinds.keys().isdisjoint(first) and not kinds.keys().isdisjoint(second)
            }
        )


class TarSource(Protocol):
    """The bytes of a tar, wherever it is. Offsets grow, so a stream can be one."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def size_bytes(self) -> int:
        """Of the whole tar."""

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Read at least `size_bytes` from an offset; fewer only where the tar ends."""


class LocalTar:
    """A tar on a local disk. Close it, or use it as a context."""

    def __init__(self, path: Path | str) -> None:
        """Open the file.

        Raises:
            InputError: it cannot be opened.
        """
        self.name = str(path)
        try:
            self._file = open_handle(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        self.size_bytes = os.fstat(self._file).st_size
        self._ahead_bytes = 0

    def __enter__(self) -> LocalTar:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._file

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        if offset_bytes + _AHEAD_BYTES // 2 > self._ahead_bytes and hasattr(os, "posix_fadvise"):
            start = max(self._ahead_bytes, offset_bytes)
            os.posix_fadvise(self._file, start, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            self._ahead_bytes = start + _AHEAD_BYTES
        try:
            return os.pread(self._file, max(size_bytes, _WINDOW_BYTES), offset_bytes)
        except OSError as error:
            raise InputError(f"{self.name} cannot be read: {error.strerror}.") from None


# name, offset of the data, its size, offset of the first header, end of the data's last block, data
_File = tuple[str, int, int, int, int, bytes | None]


def walk_tar(
    source: TarSource, *, content_of: str | None = None, key_split: KeySplit = "first_dot"
) -> Iterator[TarSample]:
    """Yield the samples of a tar in order: consecutive members with the same key.

    A sample may have a suffix twice (`TarSample.repeats`), which webdataset refuses. Members whose
    name has no dot or is `__like_this__`, folders and links are passed over, as webdataset does,
    and so are hidden files.

    Args:
        source: of the bytes.
        content_of: a suffix, without its dot, whose members come with their bytes.
        key_split: the dot that ends the key.

    Raises:
        InputError: the file cannot be read.
        TruncatedTarError: the file ends inside a member. The sample which the cut runs through
            is not given out. A damaged header counts as a cut.
        NoTarError: this is not an uncompressed tar at all.
    """
    ending = "" if content_of is None else f".{content_of}"
    key, members, first, last = "/", list[Member](), 0, 0  # no sample's key ends so
    cut: TruncatedTarError | None = None
    new = tuple.__new__  # a third of the time of a named tuple's own constructor
    split = _split_at_first if key_split == "first_dot" else _split_at_last
    is_quick = key_split == "first_dot"
    try:
        for files in _walk_files(source, ending):
            for name, offset, size, start, end, content in files:
                key_here, _, suffix = name.partition(".")
                if not is_quick or not suffix or "/" in suffix or name[0] in "._":  # rare
                    key_here, suffix = split(name)
                if key_here != key:
                    if key_here[-1:] in ("", "/"):  # of no sample; a folder's is of hidden files
                        continue
                    if members:
                        yield TarSample(key, members, first, last)
                    key, members, first = key_here, [], start
                members.append(new(Member, (suffix.lower(), offset, size, content)))
                last = end
    except TruncatedTarError as error:
        cut = error
    cut_key = "" if cut is None or cut.member is None else split(cut.member)[0]
    is_whole = cut is None or isinstance(cut, JoinedTarError)
    if members and (is_whole or cut_key not in ("", key)):
        yield TarSample(key, members, first, last)
    if cut is not None:
        raise cut


def _split_at_first(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix; an empty key if it belongs to no sample.

    Hidden files, such as macOS's `._0001.jpg` beside each `0001.jpg`, belong to none. webdataset's
    rule gives those in folders the folder as their key, and so parts the samples between them.
    """
    key, dot, suffix = name.partition(".")
    if not dot or "/" in suffix or not key or key[-1] == "/":  # rare: a dot in a folder's name
        end = _find_key_end(name)
        key, suffix = name[:end], name[end + 1 :]
        if not key:
            return "", ""
        if name.rpartition("/")[2].startswith("."):
            return "", ""
    if key[:2] == "__" and _META_NAME.match(name):
        return "", ""
    return key, suffix


def _find_key_end(name: str) -> int:
    """Find the dot that ends the key of a member whose name has several, or folders; 0 for none.

    It is the match of webdataset's `^((?:.*/|)[^.]+)[.]([^/]*)$`, for which Python takes a time
    that grows with the square of the name's length.
    """
    dot = name.find(".", name.rfind("/") + 1)
    before = name.rfind(".", 0, max(0, dot))
    if before < 0:
        return max(0, dot)
    slash = name.find("/", before + 1, dot - 1)
    return dot if slash >= 0 and "\n" not in name[:slash] else 0


def _split_at_last(name: str) -> tuple[str, str]:
    """Split as `_split_at_first`, at the last dot; what that passes over, this does, too."""
    if not _split_at_first(name)[0]:
        return "", ""
    key, _, suffix = name.rpartition(".")
    return key, suffix


class _Extended:
    """What long-name and pax headers say of the file behind them; they win over its own header."""

    __slots__ = ("found", "path", "size_bytes", "sparse")

    def __init__(self) -> None:
        self.found = self.sparse = False
        self.path: str | None = None
        self.size_bytes: int | None = None

    def add(self, kind: int, record: bytes) -> None:
        """Read the content of a header of kind L (GNU), x, X or g (pax).

        Raises:
            ValueError: it is damaged.
        """
        if kind == ord("L"):
            self.found, self.path = True, _text(record)
            return
        start = 0
        while start < len(record) and record[start] != 0:
            blank = record.find(b" ", start, start + _LENGTH_DIGITS)
            end = start + int(record[start:blank]) if blank > start else 0
            if not start < blank < end <= len(record):
                raise ValueError("a pax record of impossible length")
            keyword, equals, value = record[blank + 1 : end - 1].partition(b"=")
            if not equals or record[end - 1] != ord("\n"):
                raise ValueError("a pax record without end")
            if keyword == b"path":
                self.found, self.path = True, _text(value).rstrip("/")
            elif keyword == b"size":
                self.found, self.size_bytes = True, int(value)
            elif keyword.startswith(b"GNU.sparse."):
                self.found = self.sparse = True
            start = end


class _HeaderWalk:
    """Goes from header to header of a tar, and gives out its regular files in blocks."""

    def __init__(self, source: TarSource, ending: str) -> None:
        """Begin at a tar's first header; names of files whose bytes are read end with `ending`."""
        self._read, self._total = source.read, source.size_bytes
        self._window, self._window_start, self._window_end = b"", 0, 0
        self._position = self._start = 0  # of the next header, and of the first of its file
        self._common, self._extended = _Extended(), _Extended()  # of all files, and of the next
        self._ending = ending
        self._last_letters = (ending[-1], ending[-1].upper()) if ending else ()  # cheap to look at
        self.ended = False
        self.problem: str | None = None  # why the tar ends too early
        self.cut: str | None = None  # the member that is not whole
        self.joined = False  # there is something behind the end mark

    def stop(self, problem: str | None, *, cut: str | None = None) -> None:
        """Read no further; `problem` says why, unless this is the end."""
        self.ended, self.problem, self.cut = True, problem, cut

    def _stop_at_end_mark(self) -> None:
        """Stop where a tar says that it ends; another archive may follow, which no reader sees."""
        size = min(self._total - self._position, _LOOKED_BEHIND_BYTES)
        self.joined = bool(self._content(self._position, size).strip(b"\0"))
        self.stop(None)

    def read_block(self) -> tuple[list[bytes], list[_File], list[int]]:
        """Return the next headers, the files among them, and the number of headers up to each.

        A pool has millions of files: what most of them need is done here, without a call.
        """
        headers: list[bytes] = []
        files: list[_File] = []
        counts: list[int] = []
        total, last_letters = self._total, self._last_letters
        while len(headers) < _HEADERS_A_BLOCK and not self.ended:
            position = self._position
            data = position + BLOCK_BYTES
            if data > self._window_end and not self._move_window():
                break
            at = position - self._window_start
            header = self._window[at : at + BLOCK_BYTES]
            kind = header[156]
            if kind == 0 and header == _ZEROS:
                self._stop_at_end_mark()
                break
            headers.append(header)
            try:
                # eleven octal digits and an end, unless the writer was creative
                size = int(header[124:135], 8) if header[135] <= 32 else _number(header[124:136])
            except ValueError:
                size = _number(header[124:136])
            if kind not in _FILE_KINDS:
                read = self._read_extended if kind in _EXTENDED_KINDS else self._pass_over
                read(header, kind, size)
                continue
            end = header.find(0, 0, 100)
            name = header[: end if end >= 0 else 100].decode("utf-8", "backslashreplace")
            is_sparse = False
            if header[345] or self._extended.found or self._common.found:
                name, size, is_sparse = self._stated_elsewhere(header, name, size)
            is_folder = kind == 0 and name.endswith("/")  # as old tars have it
            if is_folder or not 0 <= size <= total - data:
                self._pass_folder_or_stop(name, is_folder)
                continue
            content = None
            if name[-1:] in last_letters and name.lower().endswith(self._ending):
                content = self._content(data, size) if size <= MAX_CONTENT_BYTES else b""
            behind = data + (size + BLOCK_BYTES - 1 & -BLOCK_BYTES)  # `round_up`, without a call
            if not is_sparse:
                files.append((name, data, size, self._start, behind, content))
                counts.append(len(headers))
            self._position = self._start = behind
        return headers, files, counts

    def _move_window(self) -> bool:
        """Read the next header; False where there is none."""
        if self._position < self._total:  # a header may send us anywhere
            self._read_window(self._position, BLOCK_BYTES)
        if self._position + BLOCK_BYTES <= self._window_end:
            return True
        self.stop("without an end mark")
        return False

    def _read_window(self, offset: int, size: int) -> None:
        self._window, self._window_start = self._read(offset, size), offset
        self._window_end = offset + len(self._window)

    def _content(self, data: int, size: int) -> bytes:
        """`size` bytes from an offset, fewer where the tar ends."""
        if data + size > self._window_end:
            self._read_window(data, size)
        at = data - self._window_start
        return self._window[at : at + size]

    def _stated_elsewhere(self, header: bytes, name: str, size: int) -> tuple[str, int, bool]:
        """Name and size of a file, and whether it is sparse, by ustar's prefix and long headers."""
        if header[345]:
            name = f"{_text(header[345:500])}/{name}"
        extended, common = self._extended, self._common
        self._extended = _Extended()
        for stated in (common.size_bytes, extended.size_bytes):
            size = size if stated is None else stated
        return extended.path or common.path or name, size, extended.sparse or common.sparse

    def _pass_folder_or_stop(self, name: str, is_folder: bool) -> None:
        if is_folder:
            self._position = self._start = self._position + BLOCK_BYTES
        else:
            self.stop(f"inside the member {name[:_MAX_NAME]!r}", cut=name)

    def _pass_over(self, header: bytes, kind: int, size: int) -> None:
        """Go on behind what is no regular file."""
        data = position = self._position + BLOCK_BYTES
        if kind == ord("S"):
            position += _sparse_map_bytes(self._read, header, data)
        if kind not in _EMPTY_KINDS:
            position += round_up(max(0, size))
        self._position = position
        if kind != ord("K"):  # the name of a link's target is part of the next file
            self._start, self._extended = position, _Extended()

    def _read_extended(self, _: bytes, kind: int, size: int) -> None:
        """Take note of the content of a long-name or pax header."""
        data = self._position + BLOCK_BYTES
        if not 0 <= size <= MAX_CONTENT_BYTES or size > self._total - data:
            self.stop("inside a long header")
            return
        record = self._content(data, size)
        # webdataset writes parts of a second for every file: a header with nothing else
        if kind != ord("x") or record[:9] != b"%d mtime=" % size:
            try:
                (self._common if kind == ord("g") else self._extended).add(kind, record)
            except ValueError:
                self.stop("at a damaged long header")
                return
        self._position = data + (size + BLOCK_BYTES - 1 & -BLOCK_BYTES)  # as above


def _walk_files(source: TarSource, ending: str) -> Iterator[list[_File]]:
    """Yield the regular files of a tar, in blocks whose headers have been checked."""
    if source.size_bytes == 0:
        raise NoTarError(source.name, "empty")
    walk = _HeaderWalk(source, ending)
    is_first = True
    while not walk.ended:
        headers, files, counts = walk.read_block()
        valid = _count_valid(headers)
        if valid < len(headers):
            walk.stop("at a damaged header")
        if is_first and valid == 0:
            _require_tar(source, walk)
        is_first = False
        yield files[: bisect_right(counts, valid)]
    if walk.joined:
        raise JoinedTarError(f"{source.name} goes on behind its end mark")
    if walk.problem is not None:
        raise TruncatedTarError(
            f"{source.name} ends after {source.size_bytes} bytes: {walk.problem}", walk.cut
        )


def _require_tar(source: TarSource, walk: _HeaderWalk) -> None:
    """Raise NoTarError for a file without one sound header, unless it is a tar without members."""
    if walk.problem is None and source.size_bytes <= _MAX_END_BYTES:
        return
    found = describe_content(source.read(0, LOOKED_AT_BYTES)[:LOOKED_AT_BYTES])
    raise NoTarError(source.name, found or "damaged from its first header on")


def round_up(size_bytes: int) -> int:
    """Round up to the bytes that a tar takes for a member of a size: whole blocks."""
    return (size_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


def _text(field: bytes) -> str:
    # Names that are not UTF-8 become printable, so that messages can show them.
    end = field.find(0)
    return (field if end < 0 else field[:end]).decode("utf-8", "backslashreplace")


def _number(field: bytes) -> int:
    """Parse a header's number: octal, or binary as GNU tar writes large ones; -1 for neither."""
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] & 1 else 0)
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _sparse_map_bytes(read: Callable[[int, int], bytes], header: bytes, data: int) -> int:
    """Compute the size of the maps between a sparse file's header and its data."""
    more, size = header[482], 0
    while more:
        block = read(data + size, BLOCK_BYTES)[:BLOCK_BYTES]
        size += BLOCK_BYTES
        more = block[504] if len(block) == BLOCK_BYTES else 0
    return size


def _count_valid(headers: list[bytes]) -> int:
    """Count the headers up to the first whose sum is not the one that it states."""
    if not headers:
        return 0
    fields = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK_BYTES)
    sums = fields.sum(axis=1, dtype=np.uint32) - fields[:, 148:156].sum(axis=1, dtype=np.uint32)
    sums += 8 * ord(" ")
    digits = fields[:, 148:154] - ord("0")  # six octal digits and an end, as all writers do
    stated = (digits.astype(np.int64) * 8 ** np.arange(5, -1, -1)).sum(axis=1)
    for index in np.flatnonzero((digits > 7).any(axis=1) | (fields[:, 154] > ord(" "))):
        stated[index] = _number(headers[index][148:156])
    wrong = np.flatnonzero(sums != stated)
    for index in wrong:  # some old writers summed signed bytes
        header = np.frombuffer(headers[index], dtype=np.int8)
        signed = int(header.sum(dtype=np.int64) - header[148:156].sum(dtype=np.int64)) + 256
        if signed != stated[index]:
            return int(index)
    return len(headers)
