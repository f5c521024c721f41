"""Files of one record per line, JSON or (Amazon 2014) Python literals, plain or gzipped."""

from __future__ import annotations

import ast
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_readers.jobs import Progress
from util import UserError

_MB = 10**6
_LOOK = 10_000  # lines between two looks at how far the file has been read


class Lines(NamedTuple):
    """A file of records, to name a place in it."""

    path: Path

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """(line, its bytes) of each line that is not blank, with progress where that takes long.

        Raises UserError for a file that is missing, cut short or damaged.
        """
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                progress = Progress(f"reading {self.path}", size // _MB, " MB")
                unpacked = gzip.GzipFile(fileobj=file) if self.path.suffix == ".gz" else file
                for number, raw in enumerate(unpacked, 1):
                    if not raw.isspace():
                        yield number, raw
                    if number % _LOOK == 0:
                        progress.add(file.tell() // _MB - progress.done)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{self.path} is cut short or damaged ({error}); download it again."
            ) from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); check it.") from None

    def line(self, row: int) -> int:
        """Line of the file on which record `row` (from 0) stands."""
        return next(line for i, (line, _) in enumerate(self) if i == row)

    def parse(self, line: int, raw: bytes) -> dict[str, Any]:
        """One record. Raises UserError naming the line."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(
                line, f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8"
            ) from None
        record = _value(text.strip())
        if not isinstance(record, dict):
            raise self.fault(line, f"{text.strip()[:40]!r} is no record {{...}}")
        return record

    def fault(self, line: int, problem: str) -> UserError:
        """The error to raise for one line."""
        return UserError(f"{self.path}, line {line}: {problem}; mend or download the file again.")


def _value(text: str) -> Any:
    """JSON, else a Python literal; None for neither. Never evaluates anything."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
