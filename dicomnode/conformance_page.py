"""A document of sections and tables, and its Markdown. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_ESCAPED = str.maketrans(
    {"|": "\\|", "*": "\\*", "`": "\\`", "<": "&lt;", ">": "&gt;", "[": "\\[", "\n": " ", "\r": " "}
)


@dataclass(frozen=True, slots=True)
class Table:
    """``rows`` have as many cells as ``columns``. Raises ValueError for one that has not."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table '{self.title}' has a row with other than {len(self.columns)} cells")


@dataclass(frozen=True, slots=True)
class Section:
    """``key`` names it for programs; ``blocks`` come before the ``sections`` inside it."""

    key: str
    title: str
    blocks: tuple[str | Table, ...] = ()
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    cover: Table
    sections: tuple[Section, ...]

    def find(self, key: str) -> Section | None:
        """The section of this key, at any depth."""
        return next((s for _, s in _numbered(self.sections, ()) if s.key == key), None)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    return Table(title, tuple(columns), tuple(tuple(str(cell) for cell in row) for row in rows))


def markdown(document: Document) -> str:
    """GitHub-flavoured Markdown with numbered sections, a table of contents and numbered tables."""
    lines = [f"# {_text(document.title)}", "", *_table(document.cover, "Cover")]
    lines += ["## Contents", ""]
    found = list(_numbered(document.sections, ()))
    lines += [f"{'  ' * (len(number) - 1)}- {_dotted(number)} {_text(section.title)}" for number, section in found]
    count = 0
    for number, section in found:
        lines += ["", f"{'#' * min(len(number) + 1, 6)} {_dotted(number)} {_text(section.title)}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                count += 1
                lines += _table(block, f"Table {count}. {block.title}")
            else:
                lines += [_text(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def as_data(document: Document) -> dict[str, Any]:
    """The same for programs: tables as lists of objects."""
    return {
        "title": document.title,
        "cover": {item: value for item, value in document.cover.rows},
        "sections": [_section_data(s) for s in document.sections],
    }


def _section_data(section: Section) -> dict[str, Any]:
    return {
        "key": section.key,
        "title": section.title,
        "text": [block for block in section.blocks if isinstance(block, str)],
        "tables": [
            {"title": b.title, "rows": [dict(zip(b.columns, row, strict=True)) for row in b.rows]}
            for b in section.blocks
            if isinstance(b, Table)
        ],
        "sections": [_section_data(s) for s in section.sections],
    }


def _numbered(sections: Sequence[Section], above: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Section]]:
    for place, section in enumerate(sections, start=1):
        number = (*above, place)
        yield number, section
        yield from _numbered(section.sections, number)


def _dotted(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number)) + ("." if len(number) == 1 else "")


def _table(block: Table, caption: str) -> list[str]:
    lines = [f"**{_text(caption)}**", "", _row(block.columns), _row(["---"] * len(block.columns))]
    return [*lines, *(_row([_text(cell) for cell in row]) for row in block.rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    return text.translate(_ESCAPED)
