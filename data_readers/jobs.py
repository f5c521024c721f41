"""What jobs that may take hours share: progress lines, and one process at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from util import claim

log = logging.getLogger("pmat")

_EVERY = 10.0  # seconds between two progress lines
_POLL = 0.5  # seconds between two looks at a lock


class Progress:
    """A line in the log now and then: how much of `total` is done, and how long the rest takes."""

    def __init__(self, what: str, total: int, unit: str = "", done: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._begun_at = done
        self._start = self._said = time.monotonic()

    def add(self, amount: int) -> None:
        """`amount` more of the total is done; says so at most every few seconds."""
        self.done += amount
        now = time.monotonic()
        if now - self._said < _EVERY:
            return
        self._said = now
        if not self.total:  # a server need not say how much it will send
            log.info("%s: %d%s", self.what, self.done, self.unit)
            return
        pace = (self.done - self._begun_at) / (now - self._start)
        left = f", {(self.total - self.done) / pace / 60:.1f} min left" if pace else ""
        share = 100 * self.done / self.total
        log.info("%s: %.0f %% of %d%s%s", self.what, share, self.total, self.unit, left)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is inside `alone` with this lock file, then hold it.

    The lock ends with the process, however it ends; otherwise its file is removed. Raises UserError
    where it cannot be written.
    """
    waiting = False
    while (held := _hold(lock)) is None:
        if not waiting:
            log.info("%s: waiting for another process", lock)
            waiting = True
        time.sleep(_POLL)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            lock.unlink()
        held.close()


def _hold(lock: Path) -> IO[str] | None:
    """The lock file, claimed; None while another process has it."""
    held = claim(lock)
    if held is None:
        return None
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(held.fileno()), os.stat(lock)):
            return held
    held.close()  # its last holder removed it in between: what we hold has no name any more
    return _hold(lock)
