"""Delimited text in, typed columns out; every complaint names the file, the line and the remedy."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from util import UserError

# What a column holds. Ids are categories: 25M of them cost a code each, not a Python string each.
ID, TEXT, WHOLE, REAL = "category", "object", "int64", "float64"

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_INT64_LIMIT = 2.0**63
# Words in the name of a column that holds times.
_TIMES = {
    "timestamp", "timestamps", "time", "times", "ts", "date", "datetime", "created", "unixtime",
    "reviewtime", "unixreviewtime",
}  # fmt: skip


class Form(NamedTuple):
    """How a file is laid out."""

    sep: str = ","  # one character, or "::", which no field may then contain and no quotes protect
    names: tuple[str, ...] = ()  # of the columns where the file has no header line
    encoding: str = "utf-8"

    @property
    def delimiter(self) -> str:
        """What `sep` is turned into for parsers that want one character."""
        return self.sep if len(self.sep) == 1 else "\t"

    @property
    def quoting(self) -> int:
        """Whether double quotes protect a separator, as the csv module names it."""
        return csv.QUOTE_MINIMAL if len(self.sep) == 1 else csv.QUOTE_NONE


CSV = Form()


class Table(NamedTuple):
    """A parsed file which still knows where each of its rows came from."""

    path: Path
    form: Form
    frame: pd.DataFrame

    def line(self, row: int) -> int:
        """Line of the file on which data row `row` (from 0) starts; a header is line 1."""
        # Rereading beats row + 2: blank lines are skipped, quoted fields may span lines.
        return next(line for i, (line, _) in enumerate(_records(self.path, self.form)) if i == row)

    def fault(self, row: int, column: str, problem: str) -> UserError:
        """The error to raise for one cell; `problem` says what is wrong and what to do."""
        return _fault(self.path, self.line(row), column, problem)

    def check(self, column: str, good: np.ndarray, problem: str) -> None:
        """Raise UserError for the first row where `good` [rows] is False; `{}` shows its value."""
        if not good.all():
            row = int(np.argmin(good))
            value = self.frame[column].iloc[row]
            shown = repr(value.item() if isinstance(value, np.generic) else value)
            raise self.fault(row, column, problem.format(shown))

    def whole(self, column: str) -> np.ndarray:
        """[rows] int64. Raises UserError for a value with decimals."""
        values = self.frame[column].to_numpy()
        self.check(column, values == np.floor(values), "{} is not a whole number; mend the cell")
        return values.astype(np.int64)


def read_table(
    path: Path, columns: dict[str, str], *, form: Form = CSV, optional: tuple[str, ...] = ()
) -> Table:
    """Read the columns named in `columns` (name -> ID, TEXT, WHOLE or REAL).

    WHOLE comes back as float64 where the file holds decimals. Columns of the file that are not
    asked for are dropped, columns listed in `optional` may be absent. Raises UserError for a
    missing or empty file, a missing column, lines of the wrong length, bytes that are not UTF-8,
    empty ids and cells that are not finite numbers.
    """
    names = header(path, form)
    missing = [name for name in columns if name not in names and name not in optional]
    if missing:
        raise UserError(
            f"{path}, line 1: column {missing[0]!r} is missing; "
            f"add it or rename one of those found: {', '.join(names)}."
        )
    frame = _parse(path, form, names, {name: columns.get(name, ID) for name in names})
    if not len(frame):
        raise UserError(f"{path} has a header but no rows; add at least one row.")
    table = Table(path, form, frame[[name for name in columns if name in names]])
    for name in table.frame:
        if columns[name] == ID:
            ids, codes = table.frame[name].cat.categories, table.frame[name].cat.codes.to_numpy()
            check_ids(table, name, ids, codes)
        elif columns[name] in (WHOLE, REAL):
            values = table.frame[name].to_numpy()
            table.check(name, np.isfinite(values), "{} is not finite; write a plain number")
            if columns[name] == WHOLE and values.dtype != np.int64:
                small = np.abs(values) < _INT64_LIMIT
                table.check(name, small, "{} does not fit 64 bits; write a smaller number")
    return table


def check_ids(table: Table, column: str, ids: pd.Index | pd.Series, codes: np.ndarray) -> None:
    """Raise UserError for an id that is empty, or that looks like another one: rows have `codes`
    [rows] of `ids`."""
    bare = ids.str.strip()
    problems = (
        (bare == "", "is empty; fill it in"),
        (bare != ids, "{} begins or ends with a space, so it is another id; remove the space"),
        (ids.str.contains("\0", regex=False), "{} has a NUL byte; remove it"),
    )
    for bad, problem in problems:
        table.check(column, ~np.isin(codes, np.flatnonzero(bad)), problem)


def dataset_name(folder: Path, default: str) -> str:
    """The `name:` line of dataset.yaml (read without a YAML parser: only this line matters)."""
    path = folder / "dataset.yaml"
    if not path.is_file():
        return default
    found = re.search(r"^name:[ \t]*(.*?)[ \t]*(?: #.*)?$", _text(path), re.MULTILINE)
    return (found and found[1].strip("\"'")) or default


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _encoding_fault(path) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check it.") from None


def header(path: Path, form: Form = CSV) -> list[str]:
    """Names of the columns, from the first line unless the form gives them."""
    try:
        if form.names and path.stat().st_size:
            return list(form.names)
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = [name.strip() for name in next(csv.reader(file, delimiter=form.sep), [])]
    except UnicodeDecodeError:
        raise _encoding_fault(path) from None
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); check path and permissions.") from None
    if not any(names):
        raise UserError(f"{path} is empty; its first line must name the columns.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}, line 1: column {twice[0]!r} appears twice; rename one of them.")
    return names


def refuse_misnamed_times(path: Path, form: Form) -> None:
    """Without times the order of the file counts: never because a column has another name."""
    for name in header(path, form):
        words = set(re.findall("[a-z]+", name.lower()))  # of unix_timestamp, timestamp:float, ...
        if words & _TIMES:
            raise UserError(
                f"{path}, line 1: column {name!r} looks like times; call it 'timestamp', or remove "
                "it if the order of the rows is to count."
            )


def _parse(path: Path, form: Form, header: list[str], kinds: dict[str, str]) -> pd.DataFrame:
    """One pass of the C parser, two if a WHOLE column turns out to hold decimals."""
    for whole in (WHOLE, REAL):
        # Ids are read as text first: asked for categories, pandas makes numbers of "007".
        as_read = {WHOLE: whole, ID: TEXT}
        dtypes = {name: as_read.get(kind, kind) for name, kind in kinds.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                warnings.simplefilter("ignore", RuntimeWarning)  # inf cells: refused by the caller
                # No usecols: with it pandas lets over-long lines pass, an unquoted comma say.
                frame = pd.read_csv(
                    _source(path, form), sep=form.delimiter, quoting=form.quoting, names=header,
                    header=None if form.names else 0, index_col=False, dtype=dtypes,
                    na_filter=False, encoding=form.encoding,
                )  # fmt: skip
                ids = {name: "category" for name, kind in kinds.items() if kind == ID}
                return frame.astype(ids)
        except UnicodeDecodeError:
            raise _encoding_fault(path) from None
        except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
            raise _length_fault(path, form, len(header), error) from None
        except (ValueError, OverflowError) as error:
            reason = error
    raise _number_fault(path, form, header, kinds, reason)


def _source(path: Path, form: Form) -> Path | io.BytesIO:
    """What pandas reads. It has no fast parser for "::", so such a file is rewritten in memory."""
    if len(form.sep) == 1:
        return path
    return io.BytesIO(path.read_bytes().replace(form.sep.encode(), form.delimiter.encode()))


def _records(path: Path, form: Form) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each data row as the C parser counts them: blank lines skipped."""
    csv.field_size_limit(2**31 - 1)  # an unclosed quote may swallow megabytes: say where it began
    encoding = "utf-8-sig" if form.encoding == "utf-8" else form.encoding
    with open(path, encoding=encoding, newline="") as file:
        lines = (line.replace("\0", " ").replace(form.sep, form.delimiter) for line in file)
        reader = csv.reader(lines, delimiter=form.delimiter, quoting=form.quoting)
        start = 1
        for record in reader:
            if (start > 1 or form.names) and (len(record) > 1 or "".join(record).strip()):
                yield start, record
            start = reader.line_num + 1


def _first(
    path: Path, form: Form, bad: Callable[[list[str]], bool]
) -> tuple[int, list[str]] | None:
    """The first record that is bad: a slow search, made only once parsing has failed."""
    return next(((line, rec) for line, rec in _records(path, form) if bad(rec)), None)


def _fault(path: Path, line: int, column: str, problem: str) -> UserError:
    return UserError(f"{path}, line {line}, column {column!r}: {problem}.")


def _encoding_fault(path: Path) -> UserError:
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                return UserError(
                    f"{path}, line {line}: byte {error.start + 1} of the line "
                    f"(0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8."
                )
    return UserError(f"{path} is not UTF-8; save it as UTF-8.")


def _length_fault(path: Path, form: Form, width: int, error: Exception) -> UserError:
    found = _first(path, form, lambda record: len(record) > width)
    if found is None:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        last = deque(_records(path, form), maxlen=1)  # an open quote swallows all rows below it
        where = f"{path}, line {last[0][0]}:" if last else f"{path}"
        return UserError(f"{where} cannot be parsed ({reason}); look for an unclosed quote.")
    line, record = found
    found = f"{path}, line {line}: {len(record)} fields where"
    if form.names:
        return UserError(f"{found} there are {width} columns; remove the stray {form.sep!r}.")
    return UserError(
        f"{found} the header has {width}; put fields that contain {form.sep!r} in double quotes."
    )


def _number_fault(
    path: Path, form: Form, header: list[str], kinds: dict[str, str], error: Exception
) -> UserError:
    """Name the first cell of a numeric column that is no number (or does not fit 64 bits)."""
    numeric = [i for i, name in enumerate(header) if kinds[name] in (WHOLE, REAL)]

    def broken(record: list[str]) -> list[int]:
        cells = [(i, record[i] if i < len(record) else "") for i in numeric]
        return [
            i
            for i, cell in cells
            if not _NUMBER.fullmatch(cell) or abs(float(cell)) >= _INT64_LIMIT
        ]

    found = _first(path, form, lambda record: bool(broken(record)))
    if found is None:
        return UserError(f"{path} cannot be parsed ({error}); check its numeric columns.")
    line, record = found
    column = broken(record)[0]
    if column >= len(record) or not record[column].strip():
        return _fault(path, line, header[column], "is empty; fill it in or remove the row")
    return _fault(path, line, header[column], f"{record[column]!r} is not a number; mend the cell")
