"""Pages in Markdown that a script renews: between two markers they have its tables."""

import argparse
from collections.abc import Callable
from pathlib import Path

MARKERS = ("<!-- results -->\n", "<!-- /results -->")


def markdown(rows: list[list[str]]) -> str:
    """Return a table in Markdown; the first row has the headings."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def insert(text: str, table: str) -> str:
    """Return a text with the table between the markers.

    Raises:
      ValueError: The markers are missing.
    """
    before, first, rest = text.partition(MARKERS[0])
    _, last, after = rest.partition(MARKERS[1])
    if not (first and last):
        raise ValueError(f"the text must have a line {MARKERS[0].strip()} and, below it, a line {MARKERS[1]}")
    return before + first + table + last + after


def renew(
    description: str | None,
    folder: Path,
    collect: Callable[[Path], None],
    draw: Callable[[], None],
    tables: Callable[[], str],
) -> None:
    """Renew a page, as a script's command line says: `collect` from --runs, if given, `draw`, and write its tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of the studies")
    options = parser.parse_args()
    if options.runs:
        collect(options.runs)
    draw()
    readme = folder / "README.md"
    readme.write_text(insert(readme.read_text(), tables()))
