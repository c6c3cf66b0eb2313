"""`siftclip subset` as a person types it: words, files that come back, exit statuses."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import without_model

from siftclip.datamodules.selection.selection import read_selection
from siftclip.errors import InputError
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.settings.commands import SubsetVerifyCommand

Cli = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., Any]


@pytest.fixture
def selected(base: list[str], composing: Callable[..., Any]) -> Path:
    """The folder of a kept selection of half of the pool."""
    words = [w for w in without_model(base) if not w.startswith(("scale.", "optim."))]
    with composing() as compose:
        return select_stage(compose("select", [*words, "selector.fraction=0.5"])).folder


@pytest.fixture
def pool_words(demo_data: DemoData) -> list[str]:
    return [f"pool.root={demo_data.pool}", f"pool.cache_dir={demo_data.root / 'cache'}"]


def printed(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The last line of each label that a command has printed."""
    assert result.returncode == 0, result.stderr
    return {line[:11].strip(): line[11:] for line in result.stdout.splitlines()}


def test_a_selection_goes_round(
    selected: Path, pool_words: list[str], base: list[str], typed: Cli, tmp_path: Path
) -> None:
    """From a selection through all files, and back into a command that selects."""
    made = printed(typed("subset", "import", str(selected), "half", *pool_words))
    assert made["samples"] == "120 samples"
    assert made["coverage"] == "120 of 120 are in the pool"
    for number, name in enumerate(("half.npy", "half.parquet", "half.txt")):
        assert printed(typed("subset", "export", "half", name))["written"] == name
        again = printed(typed("subset", "import", name, f"again{number}"))
        assert again["samples"] == "120 samples"
    digests = {printed(typed("subset", "show", n))["digest"] for n in ("half", "again0", "again2")}
    assert digests == {read_selection(selected).digest}
    listed = typed("subset", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["subset", "again0", "again1", "again2", "half"]
    path = next(
        line for line in typed("subset", "show", "half").stdout.splitlines() if "train" in line
    )
    words = [word for word in base if word.partition(".")[0] in ("pool", "features", "trainer")]
    result = typed("select", *words, "overlap=false", *path.split()[2:])
    assert "kept       120 samples" in result.stdout, result.stderr


def test_in_a_process_of_its_own(selected: Path, cli: Cli, tmp_path: Path) -> None:
    assert printed(cli("subset", "import", str(selected), "half"))["samples"] == "120 samples"
    fault = cli("subset", "show", "other")
    assert (fault.returncode, fault.stdout) == (2, "")
    assert fault.stderr.startswith("siftclip subset show: error: subset_show.name must be one of")
    assert len(fault.stderr.splitlines()) == 1


def test_subsets_are_combined(selected: Path, typed: Cli, tmp_path: Path) -> None:
    rows = read_selection(selected).to_subset()
    np.save(tmp_path / "first.npy", rows[:70])
    typed("subset", "import", "first.npy")
    union = printed(typed("subset", "combine", "all", "union", "first", str(selected)))
    assert union["samples"] == "120 samples"
    both = printed(typed("subset", "combine", "both", "intersection", str(selected), "first.npy"))
    assert both["samples"] == "70 samples"
    rest = printed(typed("subset", "combine", "rest", "difference", str(selected), "first"))
    assert rest["samples"] == "50 samples"
    drawn = ("subset", "combine", "drawn", "sample", "rest", "subset_combine.samples=1000")
    assert printed(typed(*drawn, "seed=1"))["samples"] == "1000 samples, 50 distinct"
    assert "unchanged" in printed(typed(*drawn, "seed=1"))
    other = typed(*drawn, "seed=2")
    assert other.returncode == 2
    assert "subset_combine.name is that of another subset, of 1000 samples" in other.stderr
    nothing = typed("subset", "combine", "none", "intersection", "rest", "first")
    assert nothing.returncode == 2
    assert "The intersection of rest and first has no samples: 50 and 70" in nothing.stderr
    assert "train with" in typed("subset", "show", "rest").stdout


def test_verify_says_by_its_exit_status_what_changed(
    selected: Path, copy_pool: Path, typed: Cli, tmp_path: Path
) -> None:
    words = [f"pool.root={copy_pool}", f"pool.cache_dir={tmp_path / 'cache'}"]
    typed("subset", "import", str(selected), "half", *words)
    fine = typed("subset", "verify", "half", *words)
    assert fine.returncode == 0, fine.stderr
    assert "FAULT" not in fine.stdout
    assert "tars: as they were when the subset was made" in fine.stdout
    assert typed("subset", "verify", "half").returncode == 0  # the pool that was noted
    (tar,) = copy_pool.glob("shards/*.tar")
    shutil.copy(tar, tar.with_name("more.tar"))
    changed = typed("subset", "verify", "half", *words)
    assert changed.returncode == 2
    assert "FAULT      tars: not there when the subset was made: more.tar" in changed.stdout
    assert "does not fit" in changed.stderr
    shutil.move(tar.with_name("more.tar"), tar.with_name("other.tar"))
    tar.unlink()
    gone = typed("subset", "verify", "half", *words)
    assert f"FAULT      index: missing, and indexed before: {tar.name}, more.tar" in gone.stdout
    shutil.rmtree(copy_pool)
    nowhere = typed("subset", "verify", "half")
    assert nowhere.returncode == 2
    assert f"half was made for {copy_pool}, which is not there. Name the pool: pool.root=" in (
        nowhere.stderr
    )


def test_a_list_of_tars(
    pool_words: list[str], demo_data: DemoData, typed: Cli, tmp_path: Path
) -> None:
    (tar,) = demo_data.pool.glob("shards/*.tar")
    (tmp_path / "tars.txt").write_text(f"/elsewhere/{tar.name}\n")
    without = typed("subset", "import", "tars.txt", "all")
    assert without.returncode == 2
    assert "pool.root must be given to read tars.txt, a list of tars" in without.stderr
    assert printed(typed("subset", "import", "tars.txt", "all", *pool_words))["samples"] == (
        "240 samples"
    )
    shards = "subset_export.format=shards"
    assert (
        "pool.root must name the pool" in typed("subset", "export", "all", "a.txt", shards).stderr
    )
    assert typed("subset", "export", "all", "a.txt", shards, *pool_words).returncode == 0
    assert (tmp_path / "a.txt").read_text() == f"{tar.absolute()}\n"


WRONG = [
    (("import",), "subset_import.path must name a file or folder"),
    (("import", "nowhere.npy"), "subset_import.path must be an existing file or folder"),
    (("import", "s.npy", "a/b"), "subset_import.name"),
    (
        ("import", "s.npy", "ok", "subset_import.format=text"),
        "s.npy is not a readable list of uids",
    ),
    (("import", "damaged.parquet"), "must be a parquet file with a column 'uid'"),
    (("export", "nothing", "a.npy"), "'nothing' must be the name of a subset in outputs/subsets"),
    (("export", "s.npy", "a.zip"), "subset_export.path must end in one of .npy, .parquet, .txt"),
    (("export", "s.npy", "a.npy", "subset_export.format=parquet"), "must end in .parquet for"),
    (("export", "s.npy", "s.npy"), "exists. Name another file, or set subset_export.overwrite"),
    (("export", "s.npy", "s.parquet", "more"), "too many words without '='"),
    (("show", "nothing"), "subset_show.name must be one of the subsets in outputs/subsets: there"),
    (("combine", "c", "union", "s.npy"), "subset_combine.b must be given"),
    (("combine", "c", "sample", "s.npy"), "subset_combine.samples must be given"),
    (("combine", "c", "xor", "s.npy", "s.npy"), "subset_combine.operation must be one of"),
    (("verify", "s.npy"), "s.npy does not say which pool it is of. Name the pool: pool.root="),
    (("verify", "s.npy", "pool.root=nowhere"), "pool.root must be an existing folder or a URL"),
    (("lst",), "Did you mean subset list?"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_words_are_one_message(
    words: tuple[str, ...], message: str, typed: Cli, tmp_path: Path
) -> None:
    np.save("s.npy", np.array([(0, 9)], dtype=np.dtype("u8,u8")))
    Path("damaged.parquet").write_bytes(b"PAR1 and no more")
    result = typed("subset", *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.glob("outputs/subsets/*/selection.json"))


def test_a_group_that_may_be_missing_is_checked_where_it_is_given(compose: Compose) -> None:
    words = ["subset_verify.subset=a"]
    assert compose("subset_verify", words).pool is None
    settings: SubsetVerifyCommand = compose("subset_verify", [*words, "pool.root=/data/pool"])
    assert settings.pool is not None
    assert settings.pool.root == "/data/pool"
    with pytest.raises(InputError, match=r"pool\.max_bad_fraction must be .* Got 2"):
        compose("subset_verify", [*words, "pool.max_bad_fraction=2"])
