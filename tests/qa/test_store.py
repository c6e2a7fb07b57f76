"""Check that the store keeps: torn logs, full disks, power cuts; answers come back with settings and prompts."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solopo_plugin.qa import files
from solopo_plugin.qa import store as store_module
from solopo_plugin.qa.files import DataError, lock_folder
from solopo_plugin.qa.store import Store

FUZZ = settings(deadline=None, max_examples=100, derandomize=True, database=None)


def fill(store: Store, values: list) -> int:
    """One transaction for each value; returns the set."""
    set_id = store.set_of("m", {})
    for i, value in enumerate(values):
        store.add(set_id, [(str(i), 0, "p", {"value": value})])
    return set_id


def values(store: Store) -> list:
    return [answer["value"] for answer in all_of(store, store.set_of("m", {}))]


def all_of(store: Store, set_id: int) -> list[dict]:
    """The last answer to every question."""
    return [store.get(place) for place in store.find(set_id, {})[0].values()]


def as_it_lies(path: Path, folder: Path, log_bytes: int | None = None) -> Path:
    """A copy of the files of a store that is open, as a kill leaves them; the log cut after so many bytes."""
    folder.mkdir()
    shutil.copy(path, folder)
    if log_bytes != 0:
        log = path.with_name(path.name + "-wal").read_bytes()
        (folder / (path.name + "-wal")).write_bytes(log[:log_bytes])
    return folder / path.name


@FUZZ
@given(st.lists(st.text(max_size=30), max_size=6), st.data())
def test_a_log_may_be_torn_anywhere(tmp_path_factory, given_values, data):
    """Cut at any byte: the whole additions before the cut are there, and adding goes on behind them."""
    folder = tmp_path_factory.mktemp("torn")
    ends = [0]
    with Store(folder / "a.db") as store:
        set_id = fill(store, [])
        for i, value in enumerate(given_values):
            ends.append((folder / "a.db-wal").stat().st_size)
            store.add(set_id, [(str(i), 0, "p", {"value": value})])
        size = (folder / "a.db-wal").stat().st_size
        cut = data.draw(st.integers(ends[1] if given_values else size, size))
        copy = as_it_lies(folder / "a.db", folder / "copy", cut)
    whole = sum(end <= cut for end in ends[2:]) + (bool(given_values) and cut == size)
    with Store(copy) as store:
        assert values(store) == given_values[:whole]
        store.add(store.set_of("m", {}), [("last", 0, "p", {"value": "last"})])
    with Store(copy) as store:
        assert values(store) == given_values[:whole] + ["last"]


def test_a_torn_answer_that_is_longer_than_a_page(tmp_path):
    with Store(tmp_path / "a.db") as store:
        fill(store, [1, "x" * 300_000])
        size = (tmp_path / "a.db-wal").stat().st_size
        copies = [as_it_lies(tmp_path / "a.db", tmp_path / str(cut), size - cut) for cut in (0, 1, 100_000)]
    for copy, left in zip(copies, ([1, "x" * 300_000], [1], [1]), strict=True):
        with Store(copy) as store:
            assert values(store) == left


def test_what_is_added_is_in_the_file_itself_after_a_second(tmp_path, monkeypatch):
    """A power cut may take the log with all that was not waited for; what was is in the file."""
    with Store(tmp_path / "a.db") as store:
        fill(store, [1, 2, 3])
        monkeypatch.setattr(store_module, "SYNC_SECONDS", 0.0)
        store.add(store.set_of("m", {}), [("3", 0, "p", {"value": 4})])
        copy = as_it_lies(tmp_path / "a.db", tmp_path / "cut", 0)
    with Store(copy) as store:
        assert values(store) == [1, 2, 3, 4]


def test_a_full_disk(tmp_path):
    """One sentence; what was there stays, and with more room it goes on."""
    with Store(tmp_path / "a.db") as store:
        set_id = fill(store, [1])
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(DataError, match=r"^Cannot write \S+a.db: the disk is full .* free some space and start"):
            store.add(set_id, [("q", i, "p", {"value": "x" * 1000}) for i in range(100)])
        assert values(store) == [1]
        store._db.execute("PRAGMA max_page_count = 10000")
        store.add(set_id, [("2", 0, "p", {"value": 2})])
    with Store(tmp_path / "a.db") as store:
        assert values(store) == [1, 2] and [path.name for path in tmp_path.iterdir()] == ["a.db", "a.db-wal"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]


def test_the_first_answer_to_a_prompt_stays(tmp_path):
    with Store(tmp_path / "a.db") as store:
        warm, cold = store.set_of("m", {"t": 1, "p": None}), store.set_of("m", {"t": 0})
        assert store.set_of("m", {"p": None, "t": 1}) == warm != cold  # in any order of keys
        assert store.last_used("m") == (warm, {"t": 1, "p": None}) and store.last_used("n") is None
        store.add(warm, [("q", 1, "p1", {"a": 1}), ("q", 1, "p2", {"a": 2}), ("q", 1, "p1", {"a": 3})])
        store.add(cold, [("q", 0, "p1", {"a": 4})])
        for prompt, a in (("p1", 1), ("p2", 2)):
            found, others = store.find(warm, {"q": prompt})
            assert list(found) == [("q", 1)] and store.get(found["q", 1]) == {"a": a} and not others
        assert store.find(warm, {"q": "p3"}) == ({}, {"q"}) and all_of(store, warm) == [{"a": 2}]
        store.forget([("m", {"t": 0})])
        assert not all_of(store, cold) and all_of(store, warm) and store.remember([("m", {"t": 0})])
        store.forget([("m", {"t": 0}), ("later", {"t": 0})])
        assert store.remember([("m", {"t": 0}), ("later", {"t": 0})]) and all_of(store, cold) == [{"a": 4}]
        assert store.sets("later") == []  # or it would not take over what others of its settings have
        store.forget([("m", {"t": 0}), ("new", {"t": 0})])
        store.add(store.set_of("new", {"t": 0}), [("q", 0, "p1", {"a": 5})])
        assert not store.remember([("m", {"t": 0}), ("new", {"t": 0})]) and not all_of(store, cold)


def test_answers_of_the_same_settings_are_taken_over(tmp_path):
    with Store(tmp_path / "a.db") as store:
        old, other, new = store.set_of("old", {"t": 1}), store.set_of("old", {"t": 2}), store.set_of("new", {"t": 1})
        assert store.take_over(new, ()) is None  # there is nothing
        store.add(old, [("q", 0, "p", {"a": 1})])
        store.add(other, [("q", 0, "p", {"a": 2})])
        assert store.take_over(new, {"old", "new"}) is None  # which is asked for itself
        assert store.take_over(new, {"new"}) == "old" and store.take_over(new, {"new"}) is None
        assert all_of(store, old) == all_of(store, new) == [{"a": 1}]


@pytest.mark.slow
def test_what_cannot_be_opened_is_a_sentence(tmp_path):
    (tmp_path / "b.db").write_text("no store at all " * 99)
    with pytest.raises(DataError, match=r"^Cannot write \S+b.db: file is not a database; remove it and start again"):
        Store(tmp_path / "b.db")
    with pytest.raises(DataError, match=r"^Cannot write /dev/null/c.db: File exists\.$"):
        Store("/dev/null/c.db")
    with Store(tmp_path / "a.db"), pytest.raises(DataError, match="a.db: another program has it open; close that and"):
        Store(tmp_path / "a.db")


def locked_with_a_worker(folder: Path, pipe) -> None:
    """Be a run that has forked a worker, as a DataLoader does; tell the worker's number, and wait."""
    with lock_folder(folder, "output_dir"):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        pipe.send(worker.pid)
        pipe.recv()
    pipe.send("left")
    pipe.recv()


@pytest.mark.parametrize("killed", [True, False])
def test_a_lock_ends_with_its_run_while_its_workers_live_on(tmp_path, killed):
    """Leave the workers alive, as persistent ones are, and those of a run that was stopped or killed."""
    here, there = multiprocessing.Pipe()
    run = multiprocessing.get_context("fork").Process(target=locked_with_a_worker, args=(tmp_path, there))
    run.start()
    worker = here.recv()
    try:
        with pytest.raises(DataError, match="Another run is at work in .*; wait for it"), lock_folder(tmp_path, "x"):
            pass
        if killed:
            run.kill()
            run.join()
        else:
            here.send("leave")
            assert here.recv() == "left"
        with lock_folder(tmp_path, "x"):
            pass
        os.kill(worker, 0)  # it lives
    finally:
        os.kill(worker, signal.SIGKILL)
        run.kill()
        run.join()


def test_a_lock_stays_when_a_forked_process_leaves_its_block(tmp_path):
    """Leave it as by an exception there; end it with its block where another has a copy of the file."""
    lock = lock_folder(tmp_path, "output_dir")
    lock.__enter__()
    forked = multiprocessing.get_context("fork").Process(target=lock.__exit__, args=(None, None, None))
    forked.start()
    forked.join()
    assert forked.exitcode == 0
    with pytest.raises(DataError, match="Another run is at work"), lock_folder(tmp_path, "x"):
        pass
    copies = [os.dup(number) for number in files._LOCKS]
    lock.__exit__(None, None, None)
    with lock_folder(tmp_path, "x"):
        pass
    assert len(copies) == 1 and not files._LOCKS
    os.close(copies[0])
