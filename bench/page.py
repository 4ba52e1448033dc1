"""Texts and numbers enter, escaped HTML leaves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

LONG = 60  # characters of a cell that may be wrapped


class Number(str):
    """A formatted number: a table sorts it by its value and sets it flush right."""

    value: float

    def __new__(cls, text: str, value: float) -> Number:
        number = super().__new__(cls, text)
        number.value = value
        return number


def count(number: int) -> Number:
    """A number that needs no format."""
    return Number(str(number), number)


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def part(title: str, body: str, folded: bool = False) -> str:
    """A part of a section that can be folded."""
    state = "" if folded else " open"
    return f"<details{state}><summary>{escape(title)}</summary>\n{body}</details>"


def paragraph(text: str) -> str:
    """A note."""
    return f'<p class="soft">{escape(text)}</p>'


def code(text: str) -> str:
    """Commands."""
    return f"<pre>{escape(text)}</pre>"


def card(number: str, text: str, style: str = "") -> str:
    """One summary number with its meaning."""
    return f'<div class="card"><b class="{style}">{escape(number)}</b><span>{escape(text)}</span></div>'


def table(
    headers: Sequence[str],
    lines: Sequence[Sequence[str]],
    failed: Sequence[bool] = (),
    sortable: bool = False,
) -> str:
    """A table; `failed` says per line whether it is set in red."""
    first = lines[0] if lines else headers
    head = "".join(_cell("th", header, isinstance(cell, Number)) for header, cell in zip(headers, first))
    body = "".join(_line(line, index < len(failed) and failed[index]) for index, line in enumerate(lines))
    style = ' class="sortable"' if sortable else ""
    return (
        f'<div class="wide"><table{style}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def _line(cells: Sequence[str], failed: bool) -> str:
    style = ' class="failed"' if failed else ""
    return f"<tr{style}>{''.join(_cell('td', cell, isinstance(cell, Number)) for cell in cells)}</tr>\n"


def _cell(tag: str, text: str, right: bool) -> str:
    style = "n" if right else "long" if len(text) > LONG else ""
    attributes = f' class="{style}"' if style else ""
    if isinstance(text, Number):
        attributes += f' data-value="{text.value:.6g}"'
    return f"<{tag}{attributes}>{escape(text)}</{tag}>"
