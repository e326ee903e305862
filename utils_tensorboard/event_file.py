"""One event file of TensorBoard: it sorts last in its folder, and never makes a deleted folder anew."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENT_FILE_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\..+")
EVENT_VERSION = "brain.Event:2"  # a purge is asked for by an event, and not by a step that goes back


class EventFile:
    """Writes events, in place of TensorBoard's EventFileWriter.

    That one has a thread, which prints a traceback when it cannot write, and opens the file by its name for
    each event, so that it comes back while its folder is being deleted.
    """

    def __init__(self, log_dir: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._log_dir = log_dir
        self._file = new_path(log_dir).open("xb")
        self._records = RecordWriter(self._file)
        self.add_event(Event(wall_time=time.time(), file_version=EVENT_VERSION))

    def get_logdir(self) -> str:
        return str(self._log_dir)

    def add_event(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()  # a reader sees each event at once

    def flush(self) -> None:
        """There is nothing left to flush."""

    def close(self) -> None:
        self._file.close()


def event_file_times(log_dir: Path) -> list[int]:
    """Return the times in the names of the event files of a folder; none if there is no such folder."""
    names = os.listdir(log_dir) if log_dir.is_dir() else []
    return [int(match[1]) for match in map(EVENT_FILE_NAME.fullmatch, names) if match]


def has_events(log_dir: Path) -> bool:
    """Return whether there is an event file in a folder."""
    return bool(event_file_times(log_dir))


def new_path(log_dir: Path) -> Path:
    """Return the path of a new event file.

    TensorBoard reads the files of a folder in the order of their names, which begin with the time in whole
    seconds, and none that sorts before one that it has read. So the name has a later time than all others,
    also in the same second and where the clock is behind.
    """
    seconds = max([int(time.time()), *(latest + 1 for latest in event_file_times(log_dir))])
    return log_dir / f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.0"


def open_events(log_dir: Path, purge_step: int | None) -> SummaryWriter:
    """Return a SummaryWriter that writes to a new EventFile, after an event that asks for the purge.

    SummaryWriter has no public way to be given its file. The two attributes and the method that are replaced
    here were tried with PyTorch 2.13.0 and TensorBoard 2.21.0. The classes are defined in the function, as
    PyTorch is imported only when it is needed.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.writer import FileWriter

    class OneFileWriter(FileWriter):
        def __init__(self) -> None:
            self.event_writer = EventFile(log_dir)

    writer = OneFileWriter()
    if purge_step is not None:
        writer.add_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    class OneFileSummaryWriter(SummaryWriter):
        all_writers: Any
        file_writer: Any

        def _get_file_writer(self) -> FileWriter:
            self.file_writer, self.all_writers = writer, {writer.get_logdir(): writer}
            return writer

    return OneFileSummaryWriter(str(log_dir))
