"""How many small changes of the code the tests notice.

    python benchmarks/tools/mutants.py --count 300 --results mutants.jsonl --workers 2

Each mutant is one change at one place, drawn by a seed from all that there are, in a copy of the
files that git tracks. The test files that import the changed module run until the first fails,
without the slow ones; all must pass on the code as it is. What is done is kept, so that the command
can be stopped and started again.

mutmut 3 cannot do it here: it rewrites selectors/__init__.py, which Python finds in place of its
own `selectors` when it starts at the root. cosmic-ray has neither samples nor tests of a module.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("selectors", "datamodules", "eval", "trainer")
_PAIRS: list[tuple[type, type]] = [
    *[(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)],
    *[(ast.In, ast.NotIn), (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div)],
]
SWAPPED = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
SWAPPED |= {ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.BitXor: ast.BitOr}
RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "amin": "amax"}
DROPPED = ("normalize", "sorted", "clamp", "clamp_", "clamp_min", "clamp_min_", "abs", "round")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A piece of a file, as byte offsets, and what stands there instead."""

    path: str  # from the root
    line: int
    start: int
    end: int
    before: str
    after: str

    @property
    def name(self) -> str:
        """The same in every run on the same code."""
        return f"{self.path}:{self.line}:{self.start}: {self.before} -> {self.after}"


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may become."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        operators = [SWAPPED[type(node.ops[0])](), *node.ops[1:]]
        yield ast.Compare(node.left, operators, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPPED[type(node.op)](), node.values)
        yield node.values[0]  # without the rest
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPPED:
        yield ast.AugAssign(node.target, SWAPPED[type(node.op)](), node.value)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Call):
        yield from _changed_calls(node)


def _changed_calls(node: ast.Call) -> Iterator[ast.AST]:
    function = node.func
    if isinstance(function, ast.Name) and function.id in RENAMED:
        yield ast.Call(ast.Name(RENAMED[function.id]), node.args, node.keywords)
    if isinstance(function, ast.Attribute) and function.attr in RENAMED:
        renamed = ast.Attribute(function.value, RENAMED[function.attr])
        yield ast.Call(renamed, node.args, node.keywords)
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in DROPPED:
        is_method = isinstance(function, ast.Attribute) and not (
            isinstance(function.value, ast.Name) and function.value.id in ("F", "np", "torch")
        )
        if is_method:
            yield function.value  # type: ignore[union-attr]  # it is an attribute
        elif node.args:
            yield node.args[0]
    for number in range(len(node.keywords)):
        kept = [*node.keywords[:number], *node.keywords[number + 1 :]]
        yield ast.Call(function, node.args, kept)


def visited(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of code whose change could matter: no messages, annotations or decorators."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)):
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("log.", "tqdm")):
        return
    yield node
    skipped = ("annotation", "returns", "decorator_list", "type_params", "bases")
    for field, value in ast.iter_fields(node):
        if field not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visited(child)


def mutants_of(path: Path) -> list[Mutant]:
    """All of a file."""
    source = path.read_bytes()
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []
    for node in visited(ast.parse(source)):
        for new in changed(node):
            start = lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
            end = lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
            after = ast.unparse(ast.fix_missing_locations(new))
            if "\n" in after:
                continue
            if isinstance(node, ast.expr):
                after = f"({after})" if isinstance(new, (ast.IfExp, ast.BoolOp)) else after
            found.append(
                Mutant(
                    path=path.relative_to(ROOT).as_posix(),
                    line=node.lineno,  # type: ignore[attr-defined]
                    start=start,
                    end=end,
                    before=" ".join(source[start:end].decode().split()),
                    after=after,
                )
            )
    return found


def imported(path: Path) -> set[str]:
    """The modules that a file names, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def source_files() -> list[Path]:
    """All files of the packages, and those that the packages share."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return files + sorted((ROOT / "src" / "siftclip").glob("*.py"))


def module_name(path: Path) -> str:
    """Of a file below the root."""
    base = ROOT / "src" / "siftclip" if path.is_relative_to(ROOT / "src") else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(["siftclip", *(part for part in parts if part != "__init__")])


def tests_by_module() -> dict[str, list[str]]:
    """The test files of each module: what imports it, else what imports those that import it.

    Those that bear its name come first, then those of its package, then what takes most from it.
    """
    files = source_files()
    importers: dict[str, set[str]] = defaultdict(set)
    for path in files:
        for name in imported(path):
            importers[name].add(module_name(path))
    tests = {path: imported(path) for path in (ROOT / "tests").rglob("test_*.py")}
    found = {}
    for module in map(module_name, files):
        word = module.rpartition(".")[2].removesuffix("_command")
        own = {path for path, names in tests.items() if module in names}
        near = own or {path for path, names in tests.items() if names & importers[module]}
        near |= {path for path in tests if word in path.stem}

        def place(
            path: Path, module: str = module, word: str = word
        ) -> tuple[bool, bool, int, str]:
            taken = sum(name.startswith(f"{module}.") for name in tests[path])
            is_other = not {*module.split(".")[1:2]} & {*path.parts}
            return word not in path.stem, is_other, -taken, path.name

        ordered = sorted(near, key=place)
        found[module] = [path.relative_to(ROOT).as_posix() for path in ordered]
    return found


def run_tests(folder: Path, tests: Sequence[str], limit_seconds: float) -> str:
    """`survived`, `killed` or `time-out`."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "-m", "not slow"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return "survived" if process.wait(limit_seconds) == 0 else "killed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return "time-out"


def copy_of_the_code(folder: Path) -> Path:
    """What git tracks, links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def judge(mutant: Mutant, tests: Sequence[str], folder: Path, limit_seconds: float) -> str:
    """Change the copy, run the tests, and change it back."""
    path = folder / mutant.path
    whole = path.read_bytes()
    path.write_bytes(whole[: mutant.start] + mutant.after.encode() + whole[mutant.end :])
    try:
        return run_tests(folder, tests, limit_seconds)
    finally:
        path.write_bytes(whole)


def report(outcomes: dict[str, str]) -> str:
    """A table by package, and what survived."""
    by_package: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in outcomes.items():
        by_package[name.partition("/")[0]][outcome] += 1
        by_package["all"][outcome] += 1
    lines = ["| | mutants | noticed | |", "|---|---|---|---|"]
    for package, counts in sorted(by_package.items(), key=lambda item: item[0] == "all"):
        noticed = counts["killed"] + counts["time-out"]
        total = counts.total()
        lines.append(f"| {package} | {total} | {noticed} | {100 * noticed / total:.0f} % |")
    survivors = [name for name, outcome in outcomes.items() if outcome == "survived"]
    return "\n".join([*lines, "", *(f"- `{name}`" for name in sorted(survivors))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--files", type=int, default=5, help="test files of a module, at most")
    parser.add_argument("--only", default="", help="a part of the paths to change")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a mutant's tests")
    options = parser.parse_args()
    tests = tests_by_module()
    everything = []
    for path in source_files():
        own = tests[module_name(path)][: options.files]
        if options.only in str(path.relative_to(ROOT)) and own:
            everything += [(mutant, own) for mutant in mutants_of(path)]
    drawn = random.Random(options.seed).sample(everything, min(options.count, len(everything)))
    outcomes: dict[str, str] = {}
    if options.results.exists():
        records = map(json.loads, options.results.read_text().splitlines())
        outcomes = {record["name"]: record["outcome"] for record in records}
    print(f"{len(drawn)} of {len(everything)} mutants, {len(outcomes)} of them done", flush=True)
    folders: queue.Queue[Path] = queue.Queue()

    def work(task: tuple[Mutant, list[str]]) -> None:
        mutant, files = task
        folder = folders.get()
        try:
            outcome = judge(mutant, files, folder, options.limit)
        finally:
            folders.put(folder)
        outcomes[mutant.name] = outcome
        line = {"name": mutant.name, "outcome": outcome, "tests": files, **asdict(mutant)}
        with options.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{outcome:9} {mutant.name}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        for number in range(options.workers):
            folders.put(copy_of_the_code(Path(temporary) / str(number) / "code"))
        with ThreadPoolExecutor(options.workers) as threads:
            list(threads.map(work, [task for task in drawn if task[0].name not in outcomes]))
    print(report(outcomes))


if __name__ == "__main__":
    main()
