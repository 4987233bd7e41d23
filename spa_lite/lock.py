"""One process per run folder. The system's own file lock: it ends with its holder, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from spa_lite.errors import RunError

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises RunError that says which process holds it."""
    with (folder / NAME).open("a+", encoding="utf-8") as file:
        _take(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _take(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunError(
            f"{folder} is in use by {file.read().strip() or 'another process'}; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
        # A file system without locks: two processes at once are the user's own care there.


def holder(folder: Path) -> str | None:
    """Who works on a run folder now; None if nobody does."""
    try:
        with locked(folder):
            return None
    except RunError:
        return (folder / NAME).read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return None
