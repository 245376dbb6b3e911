"""Tables of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.page.markup import Html, tag


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    last: Sequence[Sequence[str]] = (),
    numbers_from: int | None = None,
) -> Html:
    """Return a table that scrolls where it is wider than the page.

    Args:
        head: Names of the columns.
        rows: Cells of each row, of which the first names it.
        last: Rows that sum up those before.
        numbers_from: From which column on cells are numbers, which stand right; None is no column.
    """
    parts = [
        tag(
            "thead",
            tag(
                "tr",
                *(
                    _cell("th", name, number, numbers_from, "col")
                    for number, name in enumerate(head)
                ),
            ),
        ),
        tag("tbody", *(_row(row, numbers_from) for row in rows)),
    ]
    if last:
        parts.append(tag("tfoot", *(_row(row, numbers_from) for row in last)))
    return tag("div", tag("table", *parts), class_="wide")


def pairs(values: Mapping[str, str]) -> Html:
    """Return names with their values, one below the other."""
    rows = [[name, value] for name, value in values.items()]
    body = tag("tbody", *(_row(row, None) for row in rows))
    return tag("div", tag("table", body, class_="pairs"), class_="wide")


def _row(row: Sequence[str], numbers_from: int | None) -> Html:
    first, *others = row
    cells = [_cell("td", cell, number, numbers_from) for number, cell in enumerate(others, 1)]
    return tag("tr", tag("th", first, scope="row"), *cells)


def _cell(
    name: str, cell: str, number: int, numbers_from: int | None, scope: str | None = None
) -> Html:
    is_number = numbers_from is not None and number >= numbers_from
    return tag(name, cell, scope=scope, class_="number" if is_number else None)
