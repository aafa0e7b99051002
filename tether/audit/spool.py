"""A writer's spool on disk: unsent blocks, and the state of each of its chains.

``<folder>/<run>/`` belongs to one run of one process, which holds the lock in it as long as it lives::

    lock    flock
    spool   records not yet acknowledged by the stream, in order
    state   [run, sequence up to which the stream has everything, [[subject, number, head, at] ...], message id at that sequence]

What is written here outlives its process. With the durability profile ``durable`` it is synced before anything else is
done with it, and outlives the machine's power too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from tether.audit import Mark, Record, What, read_records, write_record
from tether.errors import BadEncoding
from tether.wire import codec


class SpoolState(msgspec.Struct, frozen=True, array_like=True):
    """Progress of a run. ``heads`` rows: subject, number of the last block, head, UTC milliseconds."""

    run: str
    sequence: int
    heads: tuple[tuple[str, int, bytes, int], ...]
    last: str = ""
    """Message id of the block that the stream acknowledged with ``sequence``, if it was of this run."""

    def marks(self) -> list[Mark]:
        """Return the state as rows of the next run's first checkpoint."""
        return [Mark(at, What.PREVIOUS, self.run, name, 1, number, head) for name, number, head, at in self.heads]


class Leftover(msgspec.Struct, frozen=True):
    """A finished run: its state, and its unsent blocks."""

    folder: Path
    state: SpoolState | None
    records: tuple[Record, ...]


class Spool:
    """The files of one run. Blocking; one thread may append while another removes.

    Raises:
        OSError: the disk refuses; earlier content is still there.
    """

    def __init__(self, folder: Path, run: str, *, sync: bool) -> None:
        self._folder = folder / run
        self._sync = sync
        self._guard = threading.Lock()
        self._folder.mkdir(parents=True, mode=0o700)
        self._lock = _locked(self._folder)
        self._file = os.open(self._folder / "spool", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._size = 0
        self._sent = 0
        self._state: SpoolState | None = None

    @property
    def size(self) -> int:
        """Size of the spool file in bytes."""
        return self._size

    @property
    def empty(self) -> bool:
        return self._sent == self._size

    def append(self, records: Iterable[Record], state: SpoolState) -> None:
        """Append records, then the resulting state; all or none of the records."""
        content = b"".join([write_record(record) for record in records])
        with self._guard:
            try:
                _write(self._file, content, self._size)
                if self._sync:
                    os.fdatasync(self._file)
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
            self._size += len(content)
            self._keep(state)

    def _keep(self, state: SpoolState) -> None:
        """Write the state; a failure is harmless, because an older state is incomplete but not wrong."""
        self._state = state
        with contextlib.suppress(OSError):
            self._write_state(state)

    def _write_state(self, state: SpoolState) -> None:
        temporary = self._folder / ".state"
        with temporary.open("wb") as file:
            file.write(codec.pack((state.run, state.sequence, state.heads, state.last)))
            if self._sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(self._folder / "state")

    def waiting(self, most: int) -> list[tuple[Record, int]]:
        """Return the oldest unsent records, one per chain, each with the position after it."""
        found: list[tuple[Record, int]] = []
        chains: set[tuple[str, str]] = set()
        with self._guard, os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(self._sent)
            for record, position in read_records(file):
                chain = (record.message_id.partition(".")[0], record.subject)
                if len(found) == most or chain in chains or position > self._size:
                    break
                chains.add(chain)
                found.append((record, position))
        return found

    def done(self, position: int, sequence: int, last: str) -> None:
        """Record that everything before ``position`` is in the stream; ``sequence`` and ``last`` as in the state."""
        with self._guard:
            if self._file < 0:
                return
            if self._state is not None:
                self._keep(msgspec.structs.replace(self._state, sequence=sequence, last=last))
            self._sent = position
            if self._sent == self._size:
                os.ftruncate(self._file, 0)
                self._size = self._sent = 0

    def close(self) -> None:
        with self._guard:
            os.close(self._file)
            self._file = -1
        self._lock.close()


def _write(file: int, content: bytes, at: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _locked(folder: Path) -> BinaryIO:
    """Return the run's lock, locked while the file is open.

    Raises:
        OSError: another process has locked it.
    """
    file = (folder / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def leftovers(folder: Path) -> Iterator[Sequence[Leftover]]:
    """Return the runs in ``folder`` whose processes are dead; other processes cannot start there until the
    block ends.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as stack:
        door = stack.enter_context((folder / "door").open("ab"))
        fcntl.flock(door, fcntl.LOCK_EX)
        found = []
        for path in sorted(folder.glob("*/")):
            try:
                stack.enter_context(_locked(path))
            except OSError:
                continue
            found.append(read_run(path))
        yield found


def read_run(folder: Path) -> Leftover:
    """Read the files of a run, also while it writes them."""
    state = read_state(folder)
    records: list[Record] = []
    with contextlib.suppress(OSError, BadEncoding), (folder / "spool").open("rb") as file:
        records.extend(record for record, _ in read_records(file))
    return Leftover(folder, state, tuple(records))


def read_state(folder: Path) -> SpoolState | None:
    try:
        return msgspec.convert(codec.unpack((folder / "state").read_bytes()), SpoolState, strict=True)
    except (OSError, BadEncoding, msgspec.ValidationError):
        return None


def forget(found: Iterable[Leftover]) -> None:
    """Remove the files of runs that were taken over."""
    for item in found:
        shutil.rmtree(item.folder, ignore_errors=True)
