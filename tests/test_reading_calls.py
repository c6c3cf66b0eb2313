"""Nothing opens a file of others past `siftclip.reading`: the source is read for calls that would.

What lies under a name may be a pipe that never ends or a loop of links.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from source_files import MODES, sources

READER = "src/siftclip/reading.py"
# What is opened past it, and why that is right. By file and function.
ALLOWED = {
    "datamodules/identity/code_identity.py:_read": "the source of a module that was imported",
    "datamodules/identity/kept_code.py:kept_code": "a file of this package",
    "eval/tasks/images.py:_read": "a tar that was found to be a file when the task was read",
    "eval/tasks/images.py:read_images": "the same",
    "eval/tasks/samples.py:read_samples": "the same",
    "src/siftclip/cores.py:memory_bytes": "a file of Linux",
    "trainer/api/nodes.py:_names_by_target": "files of this package",
    "trainer/bench/measure.py:available_memory_bytes": "a file of Linux",
    "trainer/optim/loss_ranks.py": "checks of plug-ins, run by their authors",
    "trainer/runtime/environment.py:cpu_model": "a file of Linux",
    "trainer/settings/describing/selector_parameters.py": "files of this package",
    "trainer/settings/kept_config.py:_restore_references": "a file of this package",
}


def raw_reads(tree: ast.AST, function: str = "module") -> Iterator[tuple[str, int, str]]:
    """Yield function, line and name of each call that opens a path to read it."""
    if isinstance(tree, ast.FunctionDef):
        function = tree.name
    if isinstance(tree, ast.Call) and _reads(tree):
        yield function, tree.lineno, ast.unparse(tree.func)
    for child in ast.iter_child_nodes(tree):
        yield from raw_reads(child, function)


def _reads(call: ast.Call) -> bool:
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    if name in ("read_text", "read_bytes"):
        return is_method  # the functions of the same names are the guarded ones
    module = ast.unparse(call.func).rpartition(".")[0]
    if name != "open" or module in ("os", "tarfile", "Image", "archive", "zipfile"):
        return False
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    texts = [node.value for node in given if isinstance(node, ast.Constant)]
    modes = [text for text in texts if isinstance(text, str) and set(text) <= MODES]
    return not any(set(mode) & set("wax+") for mode in modes)


def found() -> Iterator[tuple[str, str, str]]:
    """Yield file, function and place of each."""
    for file, tree in sources(but=READER):
        for function, line, name in raw_reads(tree):
            yield file, function, f"{file}:{line}: {name} in {function}"


def _is_at(place: str, file: str, function: str) -> bool:
    return place in (file, f"{file}:{function}")


def test_all_reading_is_guarded() -> None:
    others = [
        told
        for file, function, told in found()
        if not any(_is_at(place, file, function) for place in ALLOWED)
    ]
    assert not others, "\n".join(["Use siftclip.reading:", *others])


def test_no_entry_of_the_list_is_left_over() -> None:
    places = [(file, function) for file, function, _ in found()]
    assert {place for place in ALLOWED if any(_is_at(place, *at) for at in places)} == set(ALLOWED)


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        ("path.read_text()", True),
        ("read_text(path)", False),
        ("Path(file).read_bytes()", True),
        ("with path.open('rb') as file:\n    pass", True),
        ("with path.open() as file:\n    pass", True),
        ("open(path)", True),
        ("path.open('wb')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("open_file(path)", False),
    ],
)
def test_what_counts_as_reading(code: str, reads: bool) -> None:
    assert bool(list(raw_reads(ast.parse(code)))) is reads
