"""How things show in a notebook."""

from collections.abc import Mapping
from html import escape


def table(title: str, rows: Mapping[str, object]) -> str:
    """Return a heading, and a row for each name and value."""
    left = "style='text-align: left'"
    cells = "".join(
        f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<b>{escape(title)}</b><table>{cells}</table>"


def text(content: str, note: str) -> str:
    """Return text with its lines as they are, and a note below it."""
    return f"<div style='white-space: pre-wrap'>{escape(content)}</div><small>{escape(note)}</small>"
