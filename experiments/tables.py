"""One table, written as CSV, LaTeX (booktabs), Markdown and HTML with the same marks."""

from __future__ import annotations

import html as _html
import math
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from util import atomic_path

P_VALUE = "p"  # form of a column: three decimals, and no 0, which no p is
LONG = 40  # characters; a column with longer text gets lines of its own width


class Column(NamedTuple):
    """One column as printed; the frame may hold more, which only the CSV shows."""

    key: str  # of the frame; `key + " std"` is printed behind a ±, `key + " mark"` as a superscript
    title: str
    form: str = ".4f"
    best: int = 0  # +1: the largest is bold and the second underlined, -1: the smallest, 0: neither


class Table(NamedTuple):
    """Rows in the order they are printed; the first column is text."""

    name: str  # of the files
    title: str
    caption: str  # data set, split, masking, ties, seeds, and what marks mean
    columns: list[Column]
    frame: pd.DataFrame
    rule: str = ""  # column of the frame: a line is drawn where it changes
    apart: str = ""  # column of the frame: rows where it is true are not among the best


class Cell(NamedTuple):
    """What is printed: a value, its deviation, its superscript, and 1 = best, 2 = second."""

    text: str
    deviation: str = ""
    mark: str = ""
    place: int = 0


def write_table(table: Table, *places: Path) -> None:
    """`name.csv`, `name.tex` and `name.md` into each folder."""
    for place in places:
        for ending, content in (("tex", latex(table)), ("md", markdown(table))):
            with atomic_path(place / f"{table.name}.{ending}") as path:
                path.write_text(content, encoding="utf-8")
        with atomic_path(place / f"{table.name}.csv") as path:
            table.frame.to_csv(path, index=False)


# --------------------------------------------------------------------------- cells


def cells(table: Table) -> list[list[Cell]]:
    """The printed cells, row by row."""
    frame = table.frame
    apart = frame[table.apart].tolist() if table.apart else [False] * len(frame)
    columns = [_column_cells(frame, column, apart) for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _column_cells(frame: pd.DataFrame, column: Column, apart: list[bool]) -> list[Cell]:
    values = frame[column.key].tolist()
    empty = [None] * len(values)
    deviations = frame[f"{column.key} std"].tolist() if f"{column.key} std" in frame else empty
    marks = frame[f"{column.key} mark"].tolist() if f"{column.key} mark" in frame else empty
    texts = [_shown(value, column.form) for value in values]
    compared = [t if not alone else "–" for t, alone in zip(texts, apart, strict=True)]
    places = _places(compared, values, column.best)
    return [
        Cell(text, _shown(deviation, column.form, ""), mark if isinstance(mark, str) else "", place)
        for text, deviation, mark, place in zip(texts, deviations, marks, places, strict=True)
    ]


def _shown(value: Any, form: str, nothing: str = "–") -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return nothing
    if form == P_VALUE:
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    return value if isinstance(value, str) else format(value, form)


def _places(texts: list[str], values: list[Any], best: int) -> list[int]:
    """1 and 2 for the best two values as printed: what reads the same is marked the same."""
    if not best:
        return [0] * len(texts)
    printed = {t: v for t, v in zip(texts, values, strict=True) if t != "–"}
    order = sorted(printed, key=lambda text: -best * printed[text])[:2]
    if order and texts.count(order[0]) > 1:
        order = order[:1]  # behind several best ones nobody is second
    return [order.index(text) + 1 if text in order else 0 for text in texts]


# --------------------------------------------------------------------------- three ways to print


def latex(table: Table) -> str:
    """A booktabs table, shrunk to the line if it is wider; needs booktabs and graphicx."""
    rows = cells(table)
    shapes = [
        "p{6cm}" if any(len(r[c].text) > LONG for r in rows) else "lr"[c > 0]
        for c in range(len(table.columns))
    ]
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        r"\small",
        rf"\caption{{{escape(table.title)}. {escape(table.caption)}}}",
        rf"\label{{tab:{table.name.replace('_', '-')}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{''.join(shapes)}}}",
        r"\toprule",
        " & ".join(escape(column.title) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    for row, rule in zip(rows, _rules(table), strict=True):
        lines += [r"\midrule"] if rule else []
        lines.append(" & ".join(map(_latex_cell, row)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""]
    return "\n".join(lines)


def _latex_cell(cell: Cell) -> str:
    text = {1: r"\textbf{%s}", 2: r"\underline{%s}"}.get(cell.place, "%s") % escape(cell.text)
    deviation = rf"{{\scriptsize $\pm$ {cell.deviation}}}" if cell.deviation else ""
    mark = cell.mark.replace("†", r"\dagger")
    return text + (f"$^{{{mark}}}$" if mark else "") + deviation


def escape(text: str) -> str:
    """Text as LaTeX takes it."""
    for character, replacement in _LATEX.items():
        text = text.replace(character, replacement)
    return text


_LATEX = {
    "\\": r"\textbackslash ", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde ", "^": r"\textasciicircum ", "±": r"$\pm$",
    "–": "--", "α": r"$\alpha$", "Δ": r"$\Delta$", "≤": r"$\le$", "≥": r"$\ge$", "<": "$<$",
    ">": "$>$", "−": "$-$", "†": r"$\dagger$", "×": r"$\times$", "·": r"$\cdot$",
}  # fmt: skip


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown under its caption."""
    lines = [
        f"**{table.title}.** {table.caption}",
        "",
        "| " + " | ".join(column.title for column in table.columns) + " |",
        "|---" + "|---:" * (len(table.columns) - 1) + "|",
    ]
    for row in cells(table):
        lines.append("| " + " | ".join(map(_markdown_cell, row)) + " |")
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell) -> str:
    text = " ".join(cell.text.split())  # a title may have lines, and signs that mean something
    for sign in "\\`*|":
        text = text.replace(sign, f"\\{sign}")
    text = text.replace("<", "&lt;")
    text = {1: "**%s**", 2: "<u>%s</u>"}.get(cell.place, "%s") % text
    deviation = f" ± {cell.deviation}" if cell.deviation else ""
    return text + (f"<sup>{cell.mark}</sup>" if cell.mark else "") + deviation


def html(table: Table) -> str:
    """A `<table>` with its caption."""
    head = "".join(f"<th>{_html.escape(column.title)}</th>" for column in table.columns)
    lines = [
        f'<table id="{table.name}">',
        f"<caption><b>{_html.escape(table.title)}.</b> {_html.escape(table.caption)}</caption>",
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
    ]
    for row, rule in zip(cells(table), _rules(table), strict=True):
        line = "".join(f"<td>{_html_cell(cell)}</td>" for cell in row)
        lines.append(f'<tr class="rule">{line}</tr>' if rule else f"<tr>{line}</tr>")
    return "\n".join([*lines, "</tbody>", "</table>", ""])


def _html_cell(cell: Cell) -> str:
    text = {1: "<b>%s</b>", 2: "<u>%s</u>"}.get(cell.place, "%s") % _html.escape(cell.text)
    deviation = f' <span class="std">± {cell.deviation}</span>' if cell.deviation else ""
    return text + (f"<sup>{cell.mark}</sup>" if cell.mark else "") + deviation


def _rules(table: Table) -> list[bool]:
    """Before which rows a line is drawn."""
    if not table.rule or table.frame.empty:
        return [False] * len(table.frame)
    changed = table.frame[table.rule].ne(table.frame[table.rule].shift())
    changed.iloc[0] = False
    return changed.tolist()
