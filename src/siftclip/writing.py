"""The one way to the disk: files appear whole or not at all, and a fault says what to do.

Everything that Siftclip writes passes through here; `tests/test_writing_calls.py` reads the source
for calls that do not. A full disk, a read-only or forbidden folder, a name that is too long or a
mount that has vanished become one `WriteError`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from siftclip.errors import InputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN)
_REASONS = {
    errno.ENOSPC: "its disk is full (No space left on device)",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "its file system is read-only",
    errno.EACCES: "you have no permission to write there",
    errno.EPERM: "you have no permission to write there",
    errno.EISDIR: "a folder has that name",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "its disk reports an input/output error",
    errno.EFBIG: "the file would be larger than the file system or `ulimit -f` allows",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EBUSY: "it is in use",
    errno.ETXTBSY: "it is in use",
    errno.ENOTEMPTY: "a folder with files has that name",
    **dict.fromkeys(_GONE, "its folder is gone, as after its disk was unmounted"),
}
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)
_OF_DISKS = (*DISK_FULL, errno.EIO, errno.EFBIG, errno.EROFS)


class WriteError(InputError):
    """A file or a folder cannot be written.

    Attributes:
        path: what cannot be written.
        number: the error number of the operating system, such as `errno.ENOSPC`.
        owner: what it belongs to, as the message calls it; "" if the path says all.
    """

    def __init__(self, path: str | Path, number: int, owner: str = "") -> None:
        self.path, self.number, self.owner = Path(path), number, owner
        super().__init__(str(path), number, owner)

    def __str__(self) -> str:
        return self.told_with("")

    def told_with(self, option: str) -> str:
        """Return the message, with the option that names another folder; "" if none is known."""
        elsewhere = f"another folder with {option}" if option else "another folder"
        if self.number in DISK_FULL:
            way_out = f"Make room, and the same command continues; or choose {elsewhere}."
        elif self.number in (errno.EMFILE, errno.ENFILE):
            way_out = "Raise that limit, and the same command continues."
        else:
            way_out = f"Choose {elsewhere}; or put it right, and the same command continues."
        what = (
            f"{self.owner} cannot be written: {self.path}:"
            if self.owner
            else (f"{self.path} cannot be written:")
        )
        return f"{what} {self._reason()}. {way_out}"

    def _reason(self) -> str:
        if self.number in _NO_FOLDER:
            places = (self.path, *self.path.parents)
            file = next((place for place in places if os.path.lexists(place)), self.path)
            return f"{file} is a file, where a folder must be"
        return _REASONS.get(self.number) or os.strerror(self.number)

    def __reduce__(self) -> tuple[type[WriteError], tuple[str, int, str]]:
        return type(self), (str(self.path), self.number, self.owner)


@contextmanager
def writing_to(path: Path, owner: str = "") -> Iterator[None]:
    """Tell faults of the operating system inside the block as faults of writing `path`.

    Whichever library meets them: some keep the number in their text alone. What fails at another
    file, such as one that is read meanwhile, passes through unchanged.

    Args:
        path: of a file or a folder.
        owner: see `WriteError`.

    Raises:
        WriteError: it cannot be written.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number = _number_of(error, path)
        if number is None:
            raise
        raise WriteError(path, number, owner) from error


_LEFT = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)\.tmp")
_ABANDONED_SECONDS = 7 * 86_400  # of another machine, whose processes cannot be asked for
_swept: set[Path] = set()


def temporary_beside(path: Path) -> Path:
    """Return the name of this process for a temporary file or folder beside `path`.

    What killed processes of this machine have left in that folder is deleted, once in a process;
    what those of other machines have left, a week after they last wrote to it.
    """
    if path.parent not in _swept:
        _swept.add(path.parent)
        for left in filter(is_abandoned, path.parent.glob(".*.tmp")):
            with suppress(WriteError):  # it may be another user's
                (delete_folder if left.is_dir() else delete_file)(left)
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


def is_abandoned(path: Path) -> bool:
    """Return whether a temporary file or folder is left behind by a process that is no more."""
    match = _LEFT.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] != _host():
        with suppress(OSError):
            return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        return False
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def _host() -> str:
    return f"{zlib.crc32(os.uname().nodename.encode()):08x}"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` which replaces it when the block ends without error.

    Its content is on the disk before it has the name: a power cut leaves no name without data. It
    has the permissions that the umask gives, also where a library writes a file of its own that
    others may not read, as safetensors does.

    Raises:
        WriteError: it cannot be written.
    """
    make_folder(path.parent)
    temporary = temporary_beside(path)
    with writing_to(path):
        try:
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            temporary.chmod(mode)
            _to_disk(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # of a disk that fails; what counts is why
                temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Make a folder and those above it, unless they are there; returns it.

    Raises:
        WriteError: it cannot be made.
    """
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def new_folder_whole(folder: Path) -> Iterator[None]:
    """Delete what the block has written into a new folder if it fails: it can be tried again.

    What was there before, which is to be written over, stays.
    """
    is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    try:
        yield
    except BaseException:
        if is_new and folder.is_dir():
            with suppress(WriteError):  # of a disk that fails; what counts is why
                delete_folder(folder)
        raise


def delete_file(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        WriteError: it cannot be deleted.
    """
    with writing_to(path), suppress(FileNotFoundError):
        path.unlink()


def delete_folder(path: Path) -> None:
    """Delete a folder with all that is in it, if it is there.

    Raises:
        WriteError: it cannot be deleted.
    """
    with writing_to(path), suppress(FileNotFoundError):
        shutil.rmtree(path)


def delete_inside(root: Path, place: str) -> bool:
    """Delete a file below a folder without following any link on the way to it.

    A link in its own place is deleted itself, and what it leads to stays.

    Args:
        root: the folder.
        place: the path of the file in there, with slashes.

    Returns:
        Whether there was something to delete.

    Raises:
        WriteError: it cannot be deleted, or a link or a file is on the way.
    """
    *parents, name = _parts(place)
    with writing_to(root / place), suppress(FileNotFoundError), _told_of(root / place):
        with _opened_inside(root, parents) as folder:
            os.unlink(name, dir_fd=folder)
        return True
    return False


def delete_empty_folders(root: Path, place: str) -> None:
    """Delete a folder below another one, and those in it, as far as they are empty.

    No link is followed.

    Args:
        root: the other one, which stays.
        place: the path of the folder in there, with slashes.

    Raises:
        WriteError: one cannot be deleted.
    """
    *parents, last = _parts(place)
    absent = suppress(FileNotFoundError, NotADirectoryError)
    with writing_to(root / place), absent, _told_of(root / place):
        with _opened_inside(root, [*parents, last]) as folder, os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in names:
            delete_empty_folders(root, f"{place}/{name}")
        with _opened_inside(root, parents) as folder:
            try:
                os.rmdir(last, dir_fd=folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise


def _parts(place: str) -> list[str]:
    """Split a path inside a folder, which does not lead out of it."""
    parts = place.split("/")
    if {"", ".", ".."} & {*parts}:
        raise ValueError(f"{place!r} is no path inside a folder")
    return parts


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Name a path in faults of the operating system, which else name a part of it alone."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _opened_inside(root: Path, parts: Sequence[str]) -> Iterator[int]:
    """Open a folder below another one, through no link; yields its descriptor."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    folder = os.open(root, flags)
    try:
        for part in parts:
            inner = os.open(part, flags | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def delete(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there.

    A folder loses its name first, so that none is left half deleted under it.

    Raises:
        WriteError: it cannot be deleted.
    """
    if not path.is_dir() or path.is_symlink():
        delete_file(path)
        return
    doomed = path
    if not _LEFT.fullmatch(path.name):
        doomed = temporary_beside(path)
        delete_folder(doomed)
        move(path, doomed)
    delete_folder(doomed)


def place_folder(temporary: Path, path: Path) -> None:
    """Give a folder that is complete its name, in place of what is there.

    Its files and their names are on the disk before: a power cut leaves no name without data.

    Args:
        temporary: of `temporary_beside(path)`, with files whose content is on the disk.
        path: the name.

    Raises:
        WriteError: it cannot be moved.
    """
    with writing_to(path):
        _to_disk(temporary)
    if os.path.lexists(path):
        delete_file(path) if path.is_symlink() or not path.is_dir() else delete_folder(path)
    move(temporary, path)
    with writing_to(path):
        _to_disk(path.parent)


def move(source: Path, target: Path) -> None:
    """Give a file or a folder another name on the same disk.

    Raises:
        WriteError: it cannot be moved.
    """
    with writing_to(target):
        os.replace(source, target)


@contextmanager
def temporary_folder(prefix: str = "siftclip-", parent: Path | None = None) -> Iterator[Path]:
    """Make a folder for the time of the block: below `parent`, or where `TMPDIR` says.

    Raises:
        WriteError: it cannot be made.
    """
    place = make_folder(parent) if parent is not None else _temporary_place()
    with writing_to(place):
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def allocate(file: int, size_bytes: int) -> None:
    """Reserve the disk space of an open file, inside `writing_to`.

    A page of a memory map that finds no room ends the process with SIGBUS, without a message.

    Args:
        file: its descriptor.
        size_bytes: of the whole file.
    """
    if size_bytes:
        os.posix_fallocate(file, 0, size_bytes)


def _temporary_place() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:  # of several places none can be written
        raise WriteError(os.environ.get("TMPDIR", "/tmp"), error.errno or errno.EIO) from error


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):  # of a file system that has none
            raise
    finally:
        os.close(file)


# How libraries name an error number in their texts: pyarrow, and those in Rust
_IN_TEXT = re.compile(r"\b(?:os error|errno:?|code:) (\d+)", re.IGNORECASE)
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # numpy's, without a number


def _number_of(error: Exception, path: Path) -> int | None:
    """Find the error number of a failed write in an exception; None if it is of something else.

    Args:
        error: as it was caught.
        path: what was written; faults of other files do not count.
    """
    number = _own_number(error)
    if number is not None:
        names = [getattr(error, name, None) for name in ("filename", "filename2")]
        return number if _are_near(path, names) else None
    # torch closes its file after the write that failed, and fails at that
    cause = error.__cause__ or error.__context__
    number = _own_number(cause) if isinstance(cause, OSError) else None
    return number if number in _OF_DISKS else None


def _own_number(error: Exception) -> int | None:
    text = str(error)
    match = _IN_TEXT.search(text)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and match is not None:
        number = int(match[1])
    if number is None and _CUT_SHORT.search(text):
        number = errno.ENOSPC
    return number if number in _REASONS or number in _NO_FOLDER else None


def _are_near(path: Path, names: list[object]) -> bool:
    """Tell whether the files that an error names, if any, are `path`, beside it, above or below."""
    own = os.path.abspath(path)
    beside = os.path.dirname(own)
    given = [os.path.abspath(os.fsdecode(name)) for name in names if isinstance(name, str | bytes)]
    return not given or any(
        os.path.dirname(name) == beside
        or f"{own}{os.sep}".startswith(f"{name}{os.sep}")
        or name.startswith(f"{own}{os.sep}")
        for name in given
    )
