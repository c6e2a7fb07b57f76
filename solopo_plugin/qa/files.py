"""Read files with the line named in errors, and write them whole or not at all: a run may be killed at any time.

Everything is UTF-8. Output files are written under a temporary name beside their place, synchronised to disk and
renamed. What grows answer by answer is in a store (store.py).
"""

import errno
import gzip
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from io import BufferedReader
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)  # what some file systems say
_LOCKS: set[int] = set()  # the files by which this process holds folders
FORGOTTEN = ".forgotten"  # folder of what `--no-resume` forgets, until there is an answer
# Who calls: in an address from the slashes, of which a `Path` leaves one, to the `@`; in hf://datasets/a/b@main nobody.
# Of http://host:8000/v1/a@b too much goes, since a password may hold slashes; never more than one address of several.
USER = re.compile(r"""(//)(?:[^\s'"/]*|[^\s'"/@]*:(?:(?!,\w+://)[^\s'"])*)@|(:/)[^\s'"/@]*:[^\s'"/]*@""")


class DataError(ValueError):
    """Say in one sentence what the user has to put right: what, where, the value seen, what to do.

    What an address has before its host, a user and perhaps a password, is left out.
    """

    def __init__(self, sentence: str):
        """Keep the sentence without them."""
        super().__init__(USER.sub(r"\1\2", sentence))


def shown(value: object) -> str:
    """Return a value and its type, in short, for a message."""
    return f"{type(value).__name__} {repr(value)[:80]}"


def is_path(name: str) -> bool:
    """Return whether a model's name can only be that of a folder, since those of the hub are `owner/model`."""
    return name.startswith(("/", ".", "~")) or name.strip("/").count("/") > 1


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "Did you mean `x`? " of the nearest known name, for a message; nothing where none is near.

    Args:
        name: What was written.
        known: What there is.
        cutoff: Likeness from 0 to 1 that the nearest must have; 0.6 is Python's default.
    """
    near = get_close_matches(str(name), known, n=1, cutoff=cutoff)
    return f"Did you mean `{near[0]}`? " if near else ""


def excerpt(said: object, most: int = 300) -> str:
    """Return what a library says, for a message: on one line of at most `most` characters, cut between two words."""
    text = " ".join(str(said).split())
    if len(text) <= most:
        return text
    end = most - len(" ...")
    words = text[: end + 1].rpartition(" ")[0]
    return (words if len(words) > most // 2 else text[:end]) + " ..."


def dump(value: object) -> bytes:
    """Return a value as one line of JSON in UTF-8. Half of a surrogate pair, which no file can hold, becomes a `?`."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def parse_line(line: bytes, path: Path | str, number: int) -> dict:
    """Return one line of a JSON lines file as a dict.

    Args:
        line: Its bytes.
        path: Of the file, for the message.
        number: Of the line, from 1, for the message.

    Raises:
        DataError: The line is no JSON object in UTF-8.
    """
    try:
        value = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        shown = line[:60].decode("utf-8", "replace")
        reason = "the text holds half a surrogate pair" if isinstance(error, UnicodeEncodeError) else error
        raise DataError(f"{path}:{number}: not a line of JSON ({reason}): {shown!r}.") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: a line must be a JSON object, got {type(value).__name__} {str(value)[:60]}.")
    return value


def read_jsonl(path: Path | str) -> Iterator[dict]:
    """Yield the objects of a JSON lines file; blank lines are skipped.

    Raises:
        DataError: No such file, or a line is no JSON object; the message says `file:line`.
    """
    with as_data_error(path, "read"), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield parse_line(line, path, number)


Bytes = BufferedReader | gzip.GzipFile  # a file that is read, as it is or unpacked


@contextmanager
def reading(path: Path | str) -> Iterator[Bytes]:
    """Open a file to read its bytes; what gzip has packed is unpacked on the way, whatever the file is called.

    Raises:
        DataError: No such file, or its bytes cannot be read or unpacked.
    """
    with as_data_error(path, "read"), open(path, "rb") as file:
        yield gzip.GzipFile(fileobj=file) if file.peek(2).startswith(b"\x1f\x8b") else file


def split_names(text: str) -> list[str]:
    """Split a list of names at its commas, but leave the comma in the name of what is there.

    Of the names that can begin at a place, the longest that a file or folder has is taken.
    """
    parts, names = text.split(","), []
    while parts:
        joined = (n for n in range(len(parts), 1, -1) if os.path.exists(",".join(parts[:n]).strip()))
        n = next(joined, 1)
        names.append(",".join(parts[:n]).strip())
        parts = parts[n:]
    return [name for name in names if name]


def write_jsonl(path: Path | str, rows: Iterable[dict]) -> int:
    """Write rows as JSON lines, atomically; returns how many there were."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(dump(row) + b"\n")
            count += 1
    return count


def write_json(path: Path | str, value: object) -> None:
    """Write one value as indented JSON, atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


@contextmanager
def replacing(path: Path | str, shared: bool = False, lasts: bool = True):
    """Give a binary file to write to, which takes the place of `path` when the block ends without an error.

    Args:
        path: Of the file; its folder is made if it is not there.
        shared: Other processes may write the same file at the same time.
        lasts: Its name outlives a power cut, for which the folder is synchronised; the file is in any case.

    Raises:
        DataError: The disk is full or the place cannot be written to; what stood at `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    with as_data_error(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # gives a full disk its space back
            raise
        if lasts:
            _sync_folder(path.parent)


@contextmanager
def set_aside(paths: Iterable[Path], folder: Path, put_back: Callable[[], bool]) -> Iterator[None]:
    """Move files and folders into `folder` while a block runs, and remove them behind it.

    Args:
        paths: Of those that are there are moved.
        folder: Is not there before, nor behind.
        put_back: Called where the block fails; True: they are put back. A block that is stopped has removed them.
    """
    places = {folder / str(i): path for i, path in enumerate(paths) if path.exists()}
    try:
        with as_data_error(folder, "write"):
            folder.mkdir()
            for place, path in places.items():
                path.rename(place)
        yield
    except Exception:
        if put_back():
            for place, path in places.items():
                if place.exists():
                    place.rename(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def as_data_error(path: Path | str, verb: str):
    """Raise a failure to read or write within the block as a `DataError` of one sentence.

    Args:
        path: Of the file or folder, for the sentence.
        verb: `read` or `write`, for the sentence.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"Cannot {verb} {path}: there is no such file or folder; check the path.") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"Cannot write {path}: the disk is full ({error.strerror}); free some space and start again, "
                "what is finished is kept."
            ) from None
        raise DataError(f"Cannot {verb} {path}: {error.strerror or error}.") from None
    except (EOFError, zlib.error) as error:  # of a file that gzip has packed
        raise DataError(f"Cannot {verb} {path}: {error}; is the file complete?") from None


@contextmanager
def lock_folder(folder: Path, key: str | None = None, name: str = ".lock") -> Iterator[None]:
    """Lock a folder for this process; the lock ends with it, however it ends. Nothing is locked where that cannot be.

    Processes that it forks, as a DataLoader's workers, do not hold the lock.

    Args:
        folder: It is made if it is not there.
        key: The recipe's key that names the folder, for the sentence; None: wait until nobody else holds it.
        name: Of the file that is locked with a `key`; it stays there.

    Raises:
        DataError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where training runs too
        yield
        return
    with as_data_error(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644) if key else os.open(folder, os.O_RDONLY)
        _LOCKS.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if key else 0))
        except BlockingIOError:
            raise DataError(f"Another run is at work in {folder}; wait for it, or give another `{key}`.") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        if lock in _LOCKS:  # not in a process that was forked meanwhile
            _LOCKS.remove(lock)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # also of copies that others have
            os.close(lock)


def _close_locks() -> None:
    """Close what a forked process has of its parent's locks, which would last as long as the last copy."""
    for lock in _LOCKS:
        os.close(lock)
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_locks)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where a folder can be synchronised: not on Windows."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
