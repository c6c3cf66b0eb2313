"""Galleries: which samples they show, in which order, and their pages in a real browser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from hypothesis import given
from hypothesis import strategies as st

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.selection import make_selection, read_selection, write_selection
from siftclip.errors import InputError
from siftclip.files import write_npy
from siftclip.trainer.compare.page.galleries import (
    MOST_PAIRS,
    MOST_SAMPLES,
    PAGE,
    Gallery,
    choose_galleries,
    limited,
)
from siftclip.trainer.compare.page.in_loop import ChosenInLoop, chosen_in_loop, count_rows
from siftclip.trainer.compare.page.pool_view import PoolView
from siftclip.trainer.compare.page.selection_page import ShownSelections
from siftclip.trainer.compare.show import show_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage


@pytest.fixture
def root(make_samples: Callable[..., Any], write_pool: Callable[..., Path]) -> Path:
    return write_pool(make_samples(60))


@pytest.fixture
def pool(root: Path, tmp_path: Path) -> Pool:
    return Pool(str(root), cache_dir=str(tmp_path / "cache"), progress=False)


def view_of(pool: Pool, **kept: np.ndarray) -> PoolView:
    return PoolView(
        pool=pool,
        kept=kept,
        scores={},
        kinds=None,
        sizes=None,
        max_image_pixels=10**6,
        images=False,
    )


def first_rows(count: int) -> np.ndarray:
    return (np.arange(60) < count).astype(np.int64)


def test_any_two_arms_are_shown_where_they_disagree(pool: Pool) -> None:
    """Pairs with the baseline first, then others; of both those that disagree most."""
    kept = {"a": first_rows(30), "base": first_rows(40), "b": first_rows(10), "c": first_rows(60)}
    kept["again"] = kept["base"]
    galleries = choose_galleries(
        ShownSelections(arms=("base", *(set(kept) - {"base"}))), view_of(pool, **kept)
    )
    pairs = [gallery.title.removeprefix("kept by ").split(", dropped by ") for gallery in galleries]
    assert pairs[:3] == [["base", "b"], ["c", "base"], ["base", "a"]]
    agreement = []
    for gallery, (arm, against) in zip(galleries, pairs, strict=True):
        own, other = kept[arm] > 0, kept[against] > 0
        assert {*gallery.rows} <= {*np.flatnonzero(own & ~other)}
        assert len(gallery.rows) == min(MOST_SAMPLES, int((own & ~other).sum()))
        agreement.append((own & other).sum() / (own | other).sum())
    assert agreement[3:] == sorted(agreement[3:])
    assert {frozenset(pair) for pair in pairs} == {
        frozenset(pair)
        for pair in [
            ("base", "a"),
            ("base", "b"),
            ("base", "c"),
            ("a", "b"),
            ("a", "c"),
            ("b", "c"),
        ]
        + [("again", other) for other in "abc"]
    }


def test_of_many_arms_a_few_pairs_are_shown(pool: Pool) -> None:
    kept = {f"arm {at}": first_rows(3 * at + 3) for at in range(9)}
    galleries = choose_galleries(ShownSelections(arms=tuple(kept)), view_of(pool, **kept))
    assert len(galleries) == 8 + MOST_PAIRS
    assert galleries[8].title == "kept by arm 8, dropped by arm 1"


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from([PAGE, 20]))), st.integers(0, 300))
def test_first_pages_go_before_others(sizes: list[tuple[int, int]], most: int) -> None:
    galleries = [
        Gallery(
            title=str(at),
            note="",
            rows=tuple(range(size)),
            notes=tuple(map(str, range(size))),
            least=least,
        )
        for at, (size, least) in enumerate(sizes)
    ]
    shown = {gallery.title: gallery for gallery in limited(galleries, most)}
    assert sum(len(gallery.rows) for gallery in shown.values()) <= most
    room = most
    for gallery in galleries:
        least = min(len(gallery.rows), gallery.least)
        assert (gallery.title in shown) == bool(least and least <= room)
        room -= least if gallery.title in shown else 0
    for gallery in galleries:
        if gallery.title not in shown:
            continue
        least = min(len(gallery.rows), gallery.least)
        more = min(len(gallery.rows) - least, room)
        room -= more
        assert shown[gallery.title] == gallery.cut(least + more)
        assert shown[gallery.title].rows == gallery.rows[: least + more]


@given(st.lists(st.lists(st.integers(-1, 9), min_size=3, max_size=3), min_size=1))
def test_rows_of_steps_are_counted(steps: list[list[int]]) -> None:
    counts = Counter(row for step in steps for row in step)
    wanted = [counts[row] for row in range(10)]
    assert count_rows(np.array(steps, dtype=np.int64), 10).tolist() == wanted


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (np.array([[10]]), "rows from 10 to 10"),
        (np.array([[-2]]), "rows from -2 to -2"),
        (np.array([[0.5]]), "must be int64"),
        (np.array([1]), "must be int64"),
    ],
)
def test_what_is_no_record_is_refused(steps: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match=says):
        count_rows(steps, 10)


def test_what_an_arm_chose_in_the_loop_is_shown(pool: Pool) -> None:
    times = np.r_[np.arange(20), np.zeros(40)].astype(np.int64)
    kept = first_rows(50)
    view = view_of(pool, jest=kept)
    view.in_loop["jest"] = ChosenInLoop(times=times, of="in 9 steps")  # type: ignore[index]
    most, never = choose_galleries(ShownSelections(arms=("jest",)), view)
    assert most.rows == tuple(range(19, 0, -1))
    assert most.notes[:2] == ("19 times", "18 times")
    assert most.note == "19 samples were chosen at all, in 9 steps."
    assert {*never.rows} == {0, *range(20, 50)}


def test_a_run_says_what_it_chose(
    base: list[str], compose: Callable[..., Any], demo_data: DemoData
) -> None:
    """By the record of each step, where it is kept; of another pool it says nothing."""
    options = ["selector=random", "selector.fraction=1", "online=every_step"]
    record = ["online.diagnostics.record_chosen=true", "online.selector.fraction=0.5"]
    run = train_stage(compose("train", [*base, *options, *record]))
    pool = Pool(str(demo_data.pool), cache_dir=str(demo_data.root / "cache"), progress=False)
    selection = read_selection(run.path)
    found = chosen_in_loop(run, selection, pool)
    assert found is not None
    counts = Counter(np.load(run.path / "chosen.npy").ravel().tolist())
    assert {row: times for row, times in enumerate(found.times.tolist()) if times} == dict(counts)
    assert found.of == "in 6 steps"
    write_npy(run.path / "chosen.npy", np.zeros((2, 2)))  # damaged
    assert chosen_in_loop(run, selection, pool) is None
    (run.path / "chosen.npy").unlink()
    assert chosen_in_loop(run, selection, pool) is None


def test_selections_while_training_are_counted(pool: Pool, tmp_path: Path) -> None:
    run = RunDir(path=tmp_path / "run")
    whole = make_selection(pool.uids, np.ones(60, dtype=np.int64), {})
    for number, rows in ((1, [3, 5]), (2, [5, 7])):
        own = make_selection(pool.uids[rows], np.array([1, 4]), {})
        write_selection(own, run.path / "selections" / f"v{number:04}")
    found = chosen_in_loop(run, whole, pool)
    assert found is not None
    assert {row: times for row, times in enumerate(found.times.tolist()) if times} == {
        3: 1,
        5: 2,
        7: 1,
    }
    assert found.of == "in 2 selections while training"


SEEN = "[...document.querySelectorAll('.gallery > li')].filter(li => li.checkVisibility()).length"
STATE = "document.querySelector('.pages [role=status]').textContent"


def test_browser_turns_the_pages_of_a_gallery(
    browser: Browser, root: Path, compose: Callable[..., Any], tmp_path: Path
) -> None:
    """By the keyboard alone; a search sees all samples, and so does print."""
    options = [f"pool.root={root}", f"output_dir={tmp_path}", "progress=false", "show.samples=30"]
    page = show_stage(compose("show", options), lambda own: compose("train", own)).page
    browser.complaints.clear()
    browser.open(page)
    assert (browser.run(SEEN), browser.run(STATE)) == (12, "1 to 12 of 30")

    def press(button: int) -> None:
        browser.run(f"document.querySelectorAll('.pages button')[{button}].focus()")
        for kind in ("keyDown", "keyUp"):
            browser.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                text="\r" if kind == "keyDown" else "",
                windowsVirtualKeyCode=13,
            )

    previous, following = 0, 1
    press(previous)
    assert browser.run(STATE) == "1 to 12 of 30"
    press(following)
    press(following)
    assert (browser.run(SEEN), browser.run(STATE)) == (6, "25 to 30 of 30")
    press(following)
    assert browser.run(STATE) == "25 to 30 of 30"
    press(previous)
    assert (browser.run(SEEN), browser.run(STATE)) == (12, "13 to 24 of 30")
    assert browser.run("document.activeElement.textContent") == "Previous"
    search = "field => { field.value = 'WORD'; field.dispatchEvent(new Event('input')) }"
    captions = browser.run(
        "[...document.querySelectorAll('.gallery > li')].map(li => li.dataset.text)"
    )
    word = captions[0].lower()
    field = "document.querySelector('[data-search=galleries]')"
    browser.run(f"({search.replace('WORD', word)})({field})")
    wanted = sum(word in caption.lower() for caption in captions)
    assert browser.run(SEEN) == wanted > 0  # it is not on the page that was turned to
    browser.run(f"({search.replace('WORD', '')})({field})")
    assert (browser.run(SEEN), browser.run(STATE)) == (12, "13 to 24 of 30")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run(SEEN) == 30
    browser.call("Emulation.setEmulatedMedia", media="")
    assert browser.complaints == []
    whole = page.read_text(encoding="utf-8")
    (tmp_path / "plain.html").write_text(whole.partition("<script>")[0], encoding="utf-8")
    browser.open(tmp_path / "plain.html")
    assert browser.run(SEEN) == 30
