"""One document of many tables and figures: report.md beside the files, report.html on its own."""

from __future__ import annotations

import base64
import html as _html
from pathlib import Path
from typing import NamedTuple

from experiments import tables
from experiments.tables import Table
from util import atomic_path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums;
        border-top: 2px solid #000; border-bottom: 2px solid #000; }
caption { text-align: left; padding: .4em 0; color: #333; font-size: .92em; }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #000; } tr.rule td { border-top: 1px solid #000; }
.std, figcaption { color: #555; font-size: .85em; }
figure { margin: 1em 0; } figure img { max-width: 100%; height: auto; }
nav li { margin: .1em 0; } code { background: #f2f2f2; padding: 0 .2em; }
"""


class Section(NamedTuple):
    """A heading, what is said below it, its tables, and figures as (path of the PNG, caption)."""

    title: str
    text: list[str]
    tables: list[Table] = []
    figures: list[tuple[Path, str]] = []


def write_document(folder: Path, title: str, sections: list[Section]) -> None:
    """`report.md` and `report.html` in `folder`; sections without content are left out."""
    kept = [s for s in sections if s.text or s.tables or any(p.exists() for p, _ in s.figures)]
    for name, content in (
        ("report.md", _markdown(folder, title, kept)),
        ("report.html", _page(title, kept)),
    ):
        with atomic_path(folder / name) as path:
            path.write_text(content, encoding="utf-8")


def _markdown(folder: Path, title: str, sections: list[Section]) -> str:
    parts = [f"# {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        parts += [f"{paragraph}\n" for paragraph in section.text]
        parts += [tables.markdown(table) for table in section.tables]
        parts += [
            f"![{caption}]({path.relative_to(folder).as_posix()})\n\n*{caption}*\n"
            for path, caption in section.figures
            if path.exists()
        ]
    return "\n".join(parts)


def _page(title: str, sections: list[Section]) -> str:
    """One file with everything in it: pictures are data, there is no link to anywhere."""
    head = _html.escape(title)
    contents = "".join(
        f'<li><a href="#s{i}">{_html.escape(s.title)}</a></li>' for i, s in enumerate(sections)
    )
    body = "".join(_section(i, section) for i, section in enumerate(sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{head}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{head}</h1>\n<nav><ol>{contents}</ol></nav>\n"
        f"{body}</body></html>\n"
    )


def _section(index: int, section: Section) -> str:
    parts = [f'<section id="s{index}"><h2>{_html.escape(section.title)}</h2>']
    parts += [f"<p>{_html.escape(paragraph)}</p>" for paragraph in section.text]
    parts += [f'<div class="scroll">{tables.html(table)}</div>' for table in section.tables]
    for path, caption in section.figures:
        if path.exists():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            said = _html.escape(caption)
            parts.append(
                f'<figure><img alt="{said}" src="data:image/png;base64,{data}">'
                f"<figcaption>{said}</figcaption></figure>"
            )
    return "\n".join([*parts, "</section>\n"])
