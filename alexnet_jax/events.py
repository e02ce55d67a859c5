"""Files that grow while a run trains, and never stop it: lines of text, and TensorBoard's events."""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epy

with epy.lazy_imports():  # it imports PyTorch where that is installed, which takes seconds
    import tensorboardX

EVENTS = "events.out.tfevents"  # how the names of TensorBoard's files begin


class PatientFile:
    """A file that grows at its end, and never fails its writer.

    Every write goes to the operating system at once, so that a process that is killed loses nothing. What cannot be
    written, because the disk is full, for example, is kept, and written before what comes next.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = print):
        """Open the file at the first write.

        Args:
          warn: is called with one line when a write has failed, and again only after all was written.
        """
        self._path, self._warn = path, warn
        self._file: int | None = None
        self._pending = bytearray()
        self._warned = False

    def write(self, content: bytes) -> None:
        """Append bytes, now or later."""
        self._pending += content
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            while self._pending:
                del self._pending[: os.write(self._file, self._pending)]
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"{self._path}: cannot be written now ({error.strerror}); it is tried again")

    def flush(self) -> bool:
        """Wait until everything is on disk, where no power failure can lose it; return whether it is."""
        self.write(b"")
        if self._file is None or self._pending:
            return not self._pending
        with contextlib.suppress(OSError):
            os.fsync(self._file)
            return True
        return False

    def close(self) -> None:
        """Try a last time to write what is pending."""
        self.flush()
        if self._pending:
            self._warn(f"{self._path}: lacks its last {len(self._pending)} bytes, which could not be written")
        if self._file is not None:
            os.close(self._file)
            self._file = None


class EventFile:
    """A file of TensorBoard's events, written without a thread: tensorboardX's would block once it has failed."""

    def __init__(self, folder: Path, warn: Callable[[str], None] = print):
        # TensorBoard reads files in the order of their names.
        name = f"{EVENTS}.{time.time_ns()}.{socket.gethostname()}"
        self._file = PatientFile(folder / name, warn)
        self._add(file_version="brain.Event:2")
        # TensorBoard drops what it knows of these steps, from files that this one replaces.
        self._add(step=0, session_log={"status": "START"})

    def add(self, summary: Any, step: int | None = None) -> None:
        """Append a summary as from `tensorboardX.summary`."""
        self._add(step=step, summary=summary)

    def _add(self, **fields: Any) -> None:
        event = tensorboardX.proto.event_pb2.Event(wall_time=time.time(), **fields)
        self.add_record(event.SerializeToString())

    def add_record(self, event: bytes) -> None:
        """Append an event as `read_events` yields it."""
        header = struct.pack("<Q", len(event))
        self._file.write(header + _masked_crc(header) + event + _masked_crc(event))

    def flush(self) -> bool:
        """Wait until everything is on disk; return whether it is."""
        return self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _masked_crc(content: bytes) -> bytes:
    return struct.pack("<I", tensorboardX.record_writer.masked_crc32c(content))


def read_events(file: Path) -> Iterator[bytes]:
    """Yield the events of a file, serialised, up to the first one that is incomplete or damaged."""
    with file.open("rb") as records:
        while len(header := records.read(12)) == 12 and header[8:] == _masked_crc(header[:8]):
            (size,) = struct.unpack("<Q", header[:8])
            event = records.read(size)
            if records.read(4) != _masked_crc(event):
                return
            yield event
