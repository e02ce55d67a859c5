"""A self-contained HTML page: text, tables, plots and pictures in one file that needs nothing else."""

import base64
import html
import io

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

# Words that stand for a colour, wherever a cell of a table is just that.
_TONES = {"reproduced": "good", "opposite": "bad", "failed": "bad", "not distinguishable": "open"}


def page(title: str, sections: dict[str, str]) -> str:
    """The page.

    Args:
      sections: HTML, by heading; empty ones are left out.
    """
    shown = {heading: content for heading, content in sections.items() if content}
    body = "".join(
        f'<section id="{anchor(heading)}"><h2>{html.escape(heading)}</h2>{content}</section>\n'
        for heading, content in shown.items()
    )
    navigation = links({heading: anchor(heading) for heading in shown})
    return _PAGE.format(title=html.escape(title), navigation=navigation, body=body)


def links(targets: dict[str, str]) -> str:
    """A line of links within the page: what they are called, and what they lead to."""
    found = "".join(f'<a href="#{target}">{html.escape(name)}</a>' for name, target in targets.items())
    return f"<nav>{found}</nav>"


def anchor(name: str) -> str:
    """A name as the target of a link."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def text(*paragraphs: str) -> str:
    """Paragraphs."""
    return "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs if paragraph)


def part(heading: str, target: str, *paragraphs: str) -> str:
    """A part of a section, which is the target of a link."""
    return f'<h3 id="{target}">{html.escape(heading)}</h3>{text(*paragraphs)}'


def table(frame: pd.DataFrame, *, links: dict[str, str] | None = None, marked: bool = False) -> str:
    """A table; whether a column is text or numbers shows in how its first cell begins.

    Args:
      links: by the text of a cell in the first column, what it links to within the page.
      marked: whether rows are targets of links: by the text of their first two cells.
    """
    numeric = [bool(len(frame)) and str(frame.iloc[0, place])[:1] in "+-0123456789" for place in range(frame.shape[1])]

    def cell(tag: str, content: object, place: int) -> str:
        shown = html.escape(str(content))
        if tag == "td" and place == 0 and links and str(content) in links:
            shown = f'<a href="#{links[str(content)]}">{shown}</a>'
        if tone := _TONES.get(str(content)):
            shown = f'<span class="{tone}">{shown}</span>'
        return f"<{tag}{' class=number' if numeric[place] else ''}>{shown}</{tag}>"

    def row(tag: str, cells: tuple[object, ...]) -> str:
        target = f' id="{anchor(f"{cells[0]} {cells[1]}")}"' if marked and tag == "td" else ""
        return f"<tr{target}>{''.join(cell(tag, content, place) for place, content in enumerate(cells))}</tr>"

    body = "".join(row("td", cells) for cells in frame.itertuples(index=False, name=None))
    head = row("th", tuple(frame.columns))
    return f'<div class="table"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def heat(frame: pd.DataFrame) -> str:
    """A table of numbers from 0 up, in percent: the larger, the darker. The index is the first column."""
    largest = max(np.nanmax(frame.to_numpy(float), initial=0.0), 1e-9)

    def cell(value: float) -> str:
        if np.isnan(value):
            return "<td></td>"
        return f'<td class="number" style="--heat:{value / largest:.2f}">{100 * value:.1f}</td>'

    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td>{''.join(map(cell, row))}</tr>"
        for name, row in zip(frame.index, frame.to_numpy(float), strict=True)
    )
    head = "".join(f"<th class=number>{html.escape(str(column))}</th>" for column in frame.columns)
    return f'<div class="table"><table class="heat"><tr><th></th>{head}</tr>{rows}</table></div>'


def plots(*figures: Figure) -> str:
    """Plots side by side, where there is room, in the page's text colour."""
    return f'<div class="figures">{"".join(f"<figure>{_svg(figure)}</figure>" for figure in figures)}</div>'


def pictures(captioned: dict[str, np.ndarray], *, magnified: int) -> str:
    """Small pictures (height, width, 3) from 0 to 1, pixel for pixel, with their captions."""
    shown = []
    for caption, pixels in captioned.items():
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
        buffer = io.BytesIO()
        image.resize((image.width * magnified, image.height * magnified), Image.Resampling.NEAREST).save(buffer, "PNG")
        content = base64.b64encode(buffer.getvalue()).decode()
        name = html.escape(caption)
        shown.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{content}"><figcaption>{name}</figcaption></figure>'
        )
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def preformatted(content: str) -> str:
    """Text as it is."""
    return f"<pre>{html.escape(content)}</pre>" if content else ""


def _svg(figure: Figure) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alexnet_jax"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --good: #2e7d32; --bad: #c62828; --open: #8a6d00; }}
@media (prefers-color-scheme: dark) {{ :root {{ --good: #81c784; --bad: #ef9a9a; --open: #ffd54f; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; }}
p {{ max-width: 46rem; }}
nav {{ display: flex; flex-wrap: wrap; gap: .25rem 1rem; }}
.table, pre {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .75rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }}
.number {{ text-align: right; }}
.heat .number {{ background: color-mix(in srgb, #d9480f calc(var(--heat, 0) * 60%), transparent); }}
.good {{ color: var(--good); font-weight: 600; }}
.bad {{ color: var(--bad); font-weight: 600; }}
.open {{ color: var(--open); font-weight: 600; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }}
figcaption {{ font-size: .9rem; }}
svg {{ width: 100%; height: auto; }}
svg text {{ fill: currentColor; }}
img {{ max-width: 100%; image-rendering: pixelated; }}
tr:target {{ background: #fa03; }}
</style>
<h1>{title}</h1>
{navigation}
{body}</html>
"""
