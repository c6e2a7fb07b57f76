"""Keep the answers of long work in one SQLite file, so that what was answered once is not asked for again.

An answer is known by its set (who answers, with what settings), its question, its number and a hash of the prompt.
The first answer stays: nothing is overwritten, so that the answers to earlier settings and prompts are there when those
come back. What users read are JSON lines files, which are written from here when the answers are complete.

Every addition is one transaction, which survives `kill -9` at once and a power cut after about a second: SQLite's
write-ahead log is appended to without waiting for the disk (`synchronous=NORMAL`), and copied into the file, waiting
for it, once a second. A rollback journal would wait for the disk two or three times for every answer, and the requests
under way with it. The log's usual index is memory that processes share, which network file systems do not have; a
connection that holds the file for itself (`locking_mode=EXCLUSIVE`) needs none (https://www.sqlite.org/wal.html,
section 8). So there is one writer, and no other program reads the file meanwhile.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Container, Iterable
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .files import DataError, as_data_error, dump

STORE = "answers.db"  # its name in a work folder and in an evaluation's folder
SYNC_SECONDS = 1.0
_TABLES = (
    "CREATE TABLE IF NOT EXISTS sets (id INTEGER PRIMARY KEY, name TEXT, hash TEXT, settings TEXT, used INTEGER, "
    "UNIQUE (name, hash))",
    "CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, set_id INTEGER, question TEXT, k INTEGER, "
    "prompt TEXT, value TEXT, UNIQUE (set_id, question, k, prompt))",
    "CREATE TABLE IF NOT EXISTS served (hash TEXT PRIMARY KEY, name TEXT)",  # the server's name of who answered
)
_MAKE = "INSERT OR IGNORE INTO sets VALUES (NULL, ?, ?, ?, 0)"
_ID = "SELECT id FROM sets WHERE name = ? AND hash = ?"
_FULL = "free some space and start again, what is finished is kept"
_REASONS = {  # second word of SQLite's name for an error -> what is said; {} is SQLite's own sentence
    "FULL": f"the disk is full ({{}}); {_FULL}",
    "IOERR": f"{{}}; if the disk or your quota is full, {_FULL}",
    "CANTOPEN": f"{{}}; if the disk or your quota is full, {_FULL}",
    "BUSY": "another program has it open; close that and start again",
    "NOTADB": "{}; remove it and start again, what stands in JSON lines files is taken from there",
    "CORRUPT": "{}; remove it and start again, what stands in JSON lines files is taken from there",
}


def has_answers(path: Path) -> bool:
    """Return whether there is any answer in a store that nobody of this process has open; True if it cannot be told."""
    try:
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
            return path.exists() and db.execute("SELECT 1 FROM answers").fetchone() is not None
    except sqlite3.Error as error:
        return "no such table" not in str(error)


class Store:
    """Hold answers in one file, for one writer at a time. Use as a context manager, or call `close`.

    Raises:
        DataError: In every method: the disk is full, the file is in use, or it is no store.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        with as_data_error(self.path, "write"):  # which can say more of why than SQLite
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        self._db, self._synced = sqlite3.connect(self.path), time.monotonic()
        with self._transaction() as run:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
                run(f"PRAGMA {pragma}")
            for table in _TABLES:
                run(table)

    def set_of(self, name: str, settings: Any) -> int:
        """Return the number of a set of answers, made if it is not there; it is the last used from now on.

        Args:
            name: Who answers.
            settings: All on which the answers depend but their prompts, as JSON has it, in any order of keys.
        """
        digest = _digest(settings)
        with self._transaction() as run:
            run(_MAKE, (name, digest, json.dumps(settings)))
            run("UPDATE sets SET used = (SELECT max(used) + 1 FROM sets) WHERE name = ? AND hash = ?", (name, digest))
            return run(_ID, (name, digest)).fetchone()[0]

    def last_used(self, name: str) -> tuple[int, Any] | None:
        """Return number and settings of the set that was in use last under a name, None without any."""
        return next(iter(self.sets(name)), None)

    def sets(self, name: str) -> list[tuple[int, Any]]:
        """Return number and settings of every set under a name, first the one that was in use last."""
        with self._transaction() as run:
            found = run("SELECT id, settings FROM sets WHERE name = ? ORDER BY used DESC", (name,)).fetchall()
        return [(number, json.loads(settings)) for number, settings in found]

    def add(self, set_id: int, rows: Iterable[tuple[str, int, str, dict]]) -> None:
        """Add answers, all or none of them; those that are there already stay as they are.

        Args:
            set_id: From `set_of`.
            rows: The question, the answer's number, the hash of the prompt, and the answer.
        """
        with self._transaction() as run:
            for question, k, prompt, value in rows:
                given = set_id, question, k, prompt, dump(value).decode()
                run("INSERT OR IGNORE INTO answers VALUES (NULL, ?, ?, ?, ?, ?)", given)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            with self._transaction() as run:
                run("PRAGMA wal_checkpoint")
            self._synced = time.monotonic()

    def keep_served(self, set_id: int, name: str) -> str:
        """Keep what a server calls who answers with a set's settings, unless that is known; returns what is kept.

        Without an answer with these settings nothing is known. Sets from before names were kept have none.
        """
        answered = "EXISTS (SELECT 1 FROM answers JOIN sets b ON set_id = b.id WHERE b.hash = a.hash)"
        known = f"EXISTS (SELECT 1 FROM served WHERE hash = a.hash) AND {answered}"
        put = f"INSERT OR REPLACE INTO served SELECT hash, ? FROM sets a WHERE id = ? AND NOT ({known})"
        with self._transaction() as run:
            run(put, (name, set_id))
            return run("SELECT b.name FROM sets a JOIN served b USING (hash) WHERE id = ?", (set_id,)).fetchone()[0]

    def find(self, set_id: int, prompts: dict[str, str]) -> tuple[dict[tuple[str, int], int], set[str]]:
        """Return the place of every answer of a set by question and number; of several to one question the last.

        Args:
            set_id: From `set_of`.
            prompts: Questions with the hash of their prompt now; answers to other prompts are not meant.

        Returns:
            The places, later answers have larger ones, and the questions that have only answers to other prompts.
        """
        found, others = {}, set()
        with self._transaction() as run:
            rows = run("SELECT id, question, k, prompt FROM answers WHERE set_id = ? ORDER BY id", (set_id,))
            for place, question, k, prompt in rows:
                if prompts.get(question, prompt) == prompt:
                    found[question, k] = place
                else:
                    others.add(question)
        return found, others - {question for question, _ in found}

    def get(self, place: int) -> dict:
        """Return the answer at a place."""
        with self._transaction() as run:
            return json.loads(run("SELECT value FROM answers WHERE id = ?", (place,)).fetchone()[0])

    def take_over(self, set_id: int, busy: Container[str]) -> str | None:
        """Copy into an empty set the answers of the same settings under another name; returns that name.

        Args:
            set_id: From `set_of`.
            busy: Names whose answers are their own.
        """
        with self._transaction() as run:
            others = "SELECT b.id, b.name FROM sets a JOIN sets b USING (hash) WHERE a.id = ? ORDER BY b.used DESC"
            copy = "INSERT INTO answers SELECT NULL, ?, question, k, prompt, value FROM answers WHERE set_id = ?"
            if not run("SELECT 1 FROM answers WHERE set_id = ?", (set_id,)).fetchone():
                for other, name in run(others, (set_id,)).fetchall():
                    if name not in busy and run(f"{copy} ORDER BY id", (set_id, other)).rowcount > 0:
                        return name
        return None

    def copy(self, other: int, set_id: int, n: int) -> int:
        """Copy into a set the first `n` answers to each question of another set; returns how many were not there."""
        with self._transaction() as run:
            served = "SELECT a.hash, served.name FROM sets a, sets b JOIN served ON served.hash = b.hash"
            run(f"INSERT OR IGNORE INTO served {served} WHERE a.id = ? AND b.id = ?", (set_id, other))
            copy = "INSERT OR IGNORE INTO answers SELECT NULL, ?, question, k, prompt, value FROM answers"
            return run(f"{copy} WHERE set_id = ? AND k < ? ORDER BY id", (set_id, other, n)).rowcount

    def forget(self, sets: Iterable[tuple[str, Any]]) -> None:
        """Make sets of answers empty, all or none of them; each is there from then on, but not the last used.

        What they had is kept for `remember` until the next call.

        Args:
            sets: Who answers and with what settings, as of `set_of`.
        """
        with self._transaction() as run:
            run("DELETE FROM answers WHERE set_id < 0")
            for name, settings in sets:
                digest = _digest(settings)
                run(_MAKE, (name, digest, json.dumps(settings)))
                run(f"UPDATE answers SET set_id = -set_id WHERE set_id = ({_ID})", (name, digest))

    def remember(self, sets: Iterable[tuple[str, Any]]) -> bool:
        """Give sets back what `forget` took from them, unless one of them has an answer; returns whether none has."""
        with self._transaction() as run:
            for name, settings in sets:
                if run(f"SELECT 1 FROM answers WHERE set_id = ({_ID})", (name, _digest(settings))).fetchone():
                    return False
            run("UPDATE answers SET set_id = -set_id WHERE set_id < 0")
            run("DELETE FROM sets WHERE used = 0 AND id NOT IN (SELECT set_id FROM answers)")  # that `forget` made
        return True

    def close(self) -> None:
        """Write everything into the one file, wait until it is on the disk, and let others at it."""
        self._db.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    @contextmanager
    def _transaction(self):
        """Run all or nothing of what is done in the block; an error of SQLite becomes one sentence."""
        try:
            with self._db:
                yield self._db.execute
        except sqlite3.Error as error:
            kind = getattr(error, "sqlite_errorname", "SQLITE_ERROR").split("_")[1]
            reason = _REASONS.get(kind, "{}").format(error)
            raise DataError(f"Cannot write {self.path}: {reason}.") from None


def _digest(settings: Any) -> str:
    """Return the hash of settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
