"""Tables on the terminal."""

from rich.console import Console


def console(width: int = 0) -> Console:
    """Return a console of at least this width that interprets no markup: a class may be called [bold]."""
    return Console(width=max(Console().width, width), markup=False, emoji=False, highlight=False)
