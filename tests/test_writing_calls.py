"""Nothing writes to the disk past `siftclip.writing`: the source is read for calls that would."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from source_files import MODES, sources

WRITER = "src/siftclip/writing.py"
GUARDS = {"atomic_path", "writing_to"}

# Of any object: methods of paths, and functions of libraries that write files
CALLS = {
    *("mkdir", "makedirs", "write_text", "write_bytes", "rename", "unlink", "rmdir", "rmtree"),
    *("touch", "symlink_to", "hardlink_to", "symlink", "link", "savez", "savez_compressed"),
    *("tofile", "save_file", "save_model", "save_pretrained", "to_csv", "to_parquet", "to_json"),
    *("write_table", "ParquetWriter", "open_memmap", "copyfile", "copytree", "copy2", "mkdtemp"),
    *("mkstemp", "NamedTemporaryFile", "TemporaryDirectory", "ftruncate", "truncate", "pwrite"),
    *("FileHandler", "RotatingFileHandler", "FileIO"),
}
# Whose names have other meanings, too
QUALIFIED = {
    *("os.replace", "os.remove", "os.renames", "os.utime", "shutil.move", "shutil.copy"),
    *("np.save", "numpy.save", "torch.save", "sqlite3.connect"),
}

# What is written past it, and why that is right. By file and function.
ALLOWED = {
    "src/siftclip/locks.py:_give_back": "a file that nobody locks holds nothing",
    "datamodules/storage/shard_cache.py:_touch": "the time of a copy, which may stay as it is",
    "eval/conformance": "checks of plug-ins, run by their authors; below the temporary folder",
    "eval/download/hub.py:__init__": "inside writing_to, where the object is made",
    "trainer/optim/loss_ranks.py": "checks of plug-ins, run by their authors",
    "trainer/optim/loss_checks.py": "checks of plug-ins; into memory",
    "trainer/cli/main.py:main": "the null device",
    "trainer/cli/streams.py": "the standard streams, which keep their faults themselves",
    "trainer/bench/measure.py:time_copying": "deletes what the line above has written",
    "trainer/settings/describing/reference.py:module": "a tool of the project's own docs",
    "src/siftclip/files.py:_mend_last_line": "called inside writing_to",
}


def raw_writes(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """Yield function, line and name of each call that writes outside of a guard."""
    yield from _walk(tree, "module")


def _walk(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.With) and any(_is_guard(item) for item in node.items):
        return
    if isinstance(node, ast.Call) and (name := _writes(node)):
        yield function, node.lineno, name
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, function)


def _is_guard(item: ast.withitem) -> bool:
    call = item.context_expr
    return isinstance(call, ast.Call) and _name(call.func) in GUARDS


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _writes(call: ast.Call) -> str:
    name, full = _name(call.func), ast.unparse(call.func)
    is_ours = full == "write_text"  # of siftclip.files, which is guarded
    if (name in CALLS and not is_ours) or full in QUALIFIED:
        return full
    if full == "os.open":
        flags = ast.unparse(call)
        return full if any(flag in flags for flag in ("O_CREAT", "O_WRONLY", "O_RDWR")) else ""
    if name == "open" or full in ("np.memmap", "tarfile.open", "zipfile.ZipFile"):
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        texts = [node.value for node in given if isinstance(node, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and set(text) <= MODES]
        return full if any(set(mode) & set("wax+") for mode in modes) else ""
    return ""


def _is_allowed(file: str, function: str) -> bool:
    return any(
        f"{file}:{function}" == place or file == place or file.startswith(f"{place}/")
        for place in ALLOWED
    )


def test_all_writing_is_guarded() -> None:
    found = [
        f"{file}:{line}: {name} in {function}"
        for file, tree in sources(but=WRITER)
        for function, line, name in raw_writes(tree)
        if not _is_allowed(file, function)
    ]
    assert not found, "\n".join(["Use siftclip.writing, or writing_to around it:", *found])


def test_no_entry_of_the_list_is_left_over() -> None:
    used = {
        place
        for file, tree in sources(but=WRITER)
        for function, _, _ in raw_writes(tree)
        for place in ALLOWED
        if f"{file}:{function}" == place or file == place or file.startswith(f"{place}/")
    }
    assert used == set(ALLOWED)


@pytest.mark.parametrize(
    ("code", "writes"),
    [
        ("Path('a').mkdir()", True),
        ("with writing_to(p):\n    p.mkdir()", False),
        ("with atomic_path(p) as t, t.open('wb') as file:\n    np.save(file, a)", False),
        ("with p.open('wb') as file:\n    pass", True),
        ("open(p, mode='a')", True),
        ("open(p)", False),
        ("p.open('rb+')", True),
        ("os.open(p, os.O_RDONLY)", False),
        ("np.memmap(p, mode='r+')", True),
        ("'a'.replace('b', 'c')", False),
        ("os.replace(a, b)", True),
        ("tarfile.open(p, 'w:gz')", True),
        ("tarfile.open(p)", False),
    ],
)
def test_the_reader_of_the_source_sees_it(code: str, writes: bool) -> None:
    assert bool([*raw_writes(ast.parse(code))]) is writes
