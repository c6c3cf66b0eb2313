"""Mutations of files: of any bytes, and of what lies inside of JSON, tars, archives and tables."""

from __future__ import annotations

import copy
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

BLOCK = 512
# Values that a record may have in the place of another one.
HOSTILE: Sequence[Any] = (
    *(None, True, -1, 0, 1, 3.5, 7.0, 10**30, -(10**400), 1e308, float("nan"), float("inf")),
    *("", "x", "\ud800", "../../x", "${oc.env:HOME}", "\x1b[2J", "a" * 5000),
    *([], {}, [[]], ["a", 1], {"a": {"b": []}}, {"": None}),
)
# Sizes that a header may state: huge, negative, not octal.
SIZES = (
    *(b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + b"\0" * 3 + b"\xff" * 8, b"77777777777\0"),
    *(b"-0000000001\0", b"0000zzz0000\0", b" " * 12, b"\0" * 12, b"00000001000\0"),
    b"1_0 \0\0\0\0\0\0\0\0",
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip, cut, swap, repeat, overwrite or lengthen, up to three times."""
    for _ in range(random.randint(1, 3)):
        data = random.choice(_OF_BYTES)(bytearray(data), random)
    return data


def _place(data: bytearray, random: Random) -> int:
    edges = (random.randrange(64), len(data) - 1 - random.randrange(64))
    return max(0, min(len(data) - 1, random.choice((*edges, random.randrange(len(data) or 1)))))


def _flip(data: bytearray, random: Random) -> bytes:
    for _ in range(random.choice((1, 2, 16)) if data else 0):
        data[_place(data, random)] ^= 1 << random.randrange(8)
    return bytes(data)


def _cut(data: bytearray, random: Random) -> bytes:
    return bytes(data[: _place(data, random)])


def _remove(data: bytearray, random: Random) -> bytes:
    start = _place(data, random)
    del data[start : start + random.choice((1, 7, BLOCK))]
    return bytes(data)


def _swap(data: bytearray, random: Random) -> bytes:
    first, second, size = _place(data, random), _place(data, random), random.choice((1, 8, BLOCK))
    one, other = bytes(data[first : first + size]), bytes(data[second : second + size])
    data[first : first + size] = other
    data[second : second + size] = one
    return bytes(data)


def _overwrite(data: bytearray, random: Random) -> bytes:
    value = random.choice(
        (b"\0" * 64, b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<q", -1), b"9" * 20)
    )
    start = _place(data, random)
    data[start : start + len(value)] = value
    return bytes(data)


def _lengthen(data: bytearray, random: Random) -> bytes:
    return bytes(data) + random.choice((b"\0" * 1024, b"\n", bytes(data[:2000]), b"\xff\xfe"))


_OF_BYTES: Sequence[Callable[[bytearray, Random], bytes]] = (
    *(_flip, _flip, _cut, _remove, _swap, _overwrite, _lengthen),
)


def mutate_value(value: Any, random: Random) -> Any:
    """Replace, remove, add or rename something at a random place of a value of JSON."""
    value = copy.deepcopy(value)
    node, depth = value, random.randrange(4)
    while depth and (inner := _inner(node)):
        node, depth = random.choice(inner), depth - 1
    if isinstance(node, dict) and node:
        key = random.choice(sorted(node, key=str))
        action = random.randrange(5)
        if action == 0:
            del node[key]
        elif action == 1:
            node["unknown"] = random.choice(HOSTILE)
        else:
            node[key] = random.choice(HOSTILE)
    elif isinstance(node, list) and node:
        node[random.randrange(len(node))] = random.choice(HOSTILE)
    else:
        return random.choice(HOSTILE)
    return value


def _inner(node: Any) -> list[Any]:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [value for value in values if isinstance(value, (dict, list)) and value]


def mutate_json(data: bytes, random: Random) -> bytes:
    """Mutate the value of a JSON, or its text."""
    action = random.randrange(8)
    if action == 0:
        return mutate_bytes(data, random)
    if action == 1:
        return random.choice((b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe{}", b""))
    if action == 2:  # a name twice
        return data.replace(b"{", b'{"seed": 1, "seed": 2, ', 1)
    return json.dumps(mutate_value(json.loads(data), random)).encode()


def mutate_lines(data: bytes, random: Random) -> bytes:
    """Mutate a line of a JSONL, or its bytes."""
    lines = data.splitlines(keepends=True)
    if not lines or random.randrange(6) == 0:
        return mutate_bytes(data, random)
    at = random.randrange(len(lines))
    lines[at] = mutate_json(lines[at], random) + b"\n"
    return b"".join(lines)


def mutate_yaml(data: bytes, random: Random) -> bytes:
    """Mutate a line of a YAML, or its bytes."""
    action = random.randrange(6)
    if action == 0:
        return mutate_bytes(data, random)
    if action == 1:
        bomb = b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 10)
        )
        return random.choice((bomb, b"[" * 20_000, b"a: " + b"1:" * 9000 + b"1", b"? a: b\n: c"))
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines))
    name = lines[at].partition(b":")[0]
    values = (
        *(b"${oc.env:HOME}", b"!!python/object/apply:os.system [true]", b"!!timestamp x", b"3"),
        *(b"!!int x", b"!!bool x", b"*a", b"&a [*a]", b"2001-99-99", b"1e999", b"[]", b"{a: {}}"),
        *(b"{_target_: os.system}", b"!!binary x", b"!!set {a, b}", b'"\\ud800"', b"null"),
    )
    if action == 2:
        lines.insert(at, lines[at])
    elif action == 3:
        lines[at] = random.choice((b"  ", b"\t", b"- ")) + lines[at]
    else:
        lines[at] = name + b": " + random.choice(values) + b"\n"
    return b"".join(lines)


def mutate_tar(data: bytes, random: Random) -> bytes:
    """Mutate a field of a header and correct its sum, put another header before it, or bytes."""
    headers = [
        at for at in range(0, len(data) - BLOCK, BLOCK) if data[at + 257 : at + 262] == b"ustar"
    ]
    if not headers or random.randrange(4) == 0:
        return mutate_bytes(data, random)
    at = random.choice(headers)
    header = bytearray(data[at : at + BLOCK])
    action = random.randrange(5)
    if action == 0:
        header[124:136] = random.choice(SIZES)
    elif action == 1:
        header[156] = random.choice(b"\x000123456789LKxXgSDMNV\xff")
    elif action == 2:
        name = random.choice(
            (
                b"../../etc/passwd",
                b"\xff\xfe.jpg",
                b"a\0b.jpg",
                b".",
                b"a/.jpg",
                b"\x1b]0;x.jpg",
                b"",
            )
        )
        header[:100] = name.ljust(100, b"\0")
    elif action == 3:
        return data[:at] + _long_header(random) + data[at:]
    else:
        header[329:337] = header[345:353] = b"\x01\xff\0\0\0\0\0\0"
        header[482] = random.randrange(256)
    _correct_sum(header)
    return data[:at] + bytes(header) + data[at + BLOCK :]


def _long_header(random: Random) -> bytes:
    content = random.choice(
        (
            b"30 path=" + b"x" * 21 + b"\n",
            b"22 size=99999999999999\n",
            b"12 size=-10\n",
            b"5 a=\n" * 2000,
            b"99999999999999999999 path=x\n",
            b"0 path=x\n",
            b"18 GNU.sparse.a=1\n\0",
            b"a.b/" + b"a/" * 3000 + b"\0",
            b"\xff" * 700,
        )
    )
    info = tarfile.TarInfo("././@LongLink")
    info.type = random.choice((b"L", b"K", b"x", b"X", b"g"))
    info.size = len(content)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if random.randrange(3) == 0:
        header[124:136] = random.choice(SIZES)
        _correct_sum(header)
    return bytes(header) + content + bytes(-len(content) % BLOCK)


def _correct_sum(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def mutate_array(array: np.ndarray, random: Random) -> np.ndarray:
    """Give an array another dtype, shape, length or order of bytes, or hostile values."""
    action = random.randrange(9)
    if action == 0:
        return array[: random.randrange(len(array))] if array.ndim and len(array) else array
    if action == 1:
        return np.asarray(array.tolist(), dtype="U5" if array.dtype.fields is None else object)
    if action == 2 and array.dtype.fields is None and array.dtype.kind in "fiub":
        return array.astype(random.choice((">f4", "<f8", "i8", "c16", "f2", "?", "g", "u1")))
    if action == 3:
        return array.reshape(-1)[:, None] if random.randrange(2) else array[None]
    if action == 4 and array.dtype.kind in "fiu" and array.size:
        array = array.copy()
        values = (-1, 2**62, 0) if array.dtype.kind in "iu" else (np.nan, np.inf, 1e30, -1.0)
        with np.errstate(all="ignore"):
            array.flat[random.randrange(array.size)] = np.asarray(random.choice(values)).astype(
                array.dtype
            )
        return array
    if action == 5 and array.ndim > 1:
        return array[:, : max(0, array.shape[1] - random.choice((1, 3)))]
    if action == 6:
        return np.zeros((0,) * max(1, array.ndim), array.dtype)
    if action == 7:
        return np.asarray(random.choice((0, 1.5, "x")))
    return np.concatenate([array, array]) if array.ndim else array


def mutate_npy(data: bytes, random: Random) -> bytes:
    """Mutate the array of an npy, its header, or bytes."""
    action = random.randrange(4)
    if action == 0:
        return mutate_bytes(data, random)
    if action == 1:
        old, new = random.choice(
            (
                (b"'shape': (", b"'shape': (-1, "),
                (b"'shape': (", b"'shape': (99999999999, "),
                (b"'fortran_order': False", b"'fortran_order': True "),
                (b"'descr': ", b"'descr': '|O', 'd': "),
                (b"<", b">"),
                (b"{", b"["),
            )
        )
        return data.replace(old, new, 1)
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return npy_bytes(mutate_array(array, random))


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def mutate_archive(
    data: bytes, random: Random, mutate_member: Callable[[bytes, Random], bytes]
) -> bytes:
    """Mutate a member of a zip and write it anew, or its bytes."""
    action = random.randrange(4)
    if action == 0:
        return mutate_bytes(data, random)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = random.randrange(len(members))
    name, content = members[at]
    if action == 1:
        del members[at]
    elif action == 2 and random.randrange(2):
        members[at] = (random.choice(("x.npy", "../x.npy", f"{name}.npy", "")) or "y", content)
    else:
        members[at] = (name, mutate_member(content, random))
    buffer = io.BytesIO()
    kind = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def mutate_npz(data: bytes, random: Random) -> bytes:
    """Mutate an array of an npz, its name, or bytes."""
    return mutate_archive(data, random, mutate_npy)


def mutate_parquet(data: bytes, random: Random) -> bytes:
    """Mutate a column of a parquet file, its type or name, or bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if random.randrange(3) == 0:
        return mutate_bytes(data, random)
    table = pq.read_table(io.BytesIO(data))
    at = random.randrange(table.num_columns)
    name, rows = table.column_names[at], table.num_rows
    columns = (
        lambda: pa.array([None] * rows),
        lambda: pa.array([["a"], None] * rows)[:rows],
        lambda: pa.array([{"a": 1}] * rows),
        lambda: pa.array(range(rows)),
        lambda: pa.array([b"\xff" * 16] * rows, pa.binary(16)),
        lambda: pa.array([1.5, None] * rows)[:rows],
        lambda: pa.array(["é", "x" * 32] * rows)[:rows].dictionary_encode(),
        lambda: pa.array([2**63 - 1] * rows, pa.timestamp("ns")),
        lambda: pa.array([b"\xff\xfe"] * rows, pa.large_binary()),
    )
    action = random.randrange(5)
    if action == 0:
        table = table.remove_column(at)
    elif action == 1:
        table = table.append_column(name, table[name])
    elif action == 2:
        table = table.slice(0, random.randrange(rows + 1))
    else:
        table = table.set_column(at, name, random.choice(columns)())
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Mutate the header of safetensors, its length, or bytes."""
    size = int.from_bytes(data[:8], "little")
    action = random.randrange(4)
    if action == 0:
        return mutate_bytes(data, random)
    if action == 1:
        wrong = random.choice((0, size - 1, size + 8, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + data[8:]
    header = json.dumps(mutate_value(json.loads(data[8 : 8 + size]), random)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]
