"""Pieces of an HTML page that needs nothing beside itself: style, tables, charts, pictures as data URIs.

What these functions take as text is escaped; what they give is HTML.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from sam3.engine.report_charts import Series, line_chart

JPEG_QUALITY, WEBP_QUALITY = 82, 60
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #5b6570; --line: #d9dee3; --card: #f5f7f9;
  --s1: #1f66d1; --s2: #c2541b; --s3: #23804f; --good: #1d7a43; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e8ebee; --soft: #9aa5b1; --line: #323940;
  --card: #1d2226; --s1: #74a9ff; --s2: #ff9f6e; --s3: #6fce98; --good: #6fce98; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
.note, figcaption, .seconds { color: var(--soft); font-size: .875rem; }
.missing { border-left: 3px solid var(--s2); padding: .3rem .8rem; color: var(--soft); overflow-wrap: anywhere; }
code, pre { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem;
  margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; } thead th { color: var(--soft); font-size: .8rem; white-space: normal; }
tbody th, thead th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
ul.claims { list-style: none; padding: 0; margin: 1rem 0; } ul.claims li { padding-left: 1.6rem; text-indent: -1.6rem; }
.mark { display: inline-block; width: 1.6rem; text-indent: 0; font-weight: 700; }
.yes .mark { color: var(--good); } .no .mark { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem; }
.charts figure { max-width: 34rem; }
figure { margin: 1rem 0; } figure strong { color: var(--ink); }
svg { display: block; width: 100%; height: auto; } svg .axis { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .pale { stroke-width: 1; opacity: .3; } svg circle { stroke: none; }
polyline.s1 { stroke: var(--s1); } polyline.s2 { stroke: var(--s2); stroke-dasharray: 6 4; }
polyline.s3 { stroke: var(--s3); }
circle.s1 { fill: var(--s1); } circle.s2 { fill: var(--s2); } circle.s3 { fill: var(--s3); }
.key { white-space: nowrap; margin-right: .8rem; } .key i { display: inline-block; width: 1.1rem; height: 0;
  border-top: 3px solid; vertical-align: .25rem; margin-right: .3rem; }
.key i.s1 { color: var(--s1); } .key i.s2 { color: var(--s2); border-top-style: dashed; }
.key i.s3 { color: var(--s3); }
.panels { display: grid; gap: .4rem; }
.panels span { font-size: .8rem; color: var(--soft); align-self: end; }
.panels img { display: block; width: 100%; height: auto; border-radius: .25rem; }
.panels img.all { grid-column: 1 / -1; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n<main>\n{body}\n</main>\n</body></html>\n'


def element(tag: str, text: str, style: str = "") -> str:
    """`<tag class="style">text</tag>`"""
    return f"<{tag}{_style(style)}>{escape(text)}</{tag}>"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first cell of a row is its heading, all others are figures."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def claims(found: Sequence[tuple[bool, str]]) -> str:
    """A list of statements, each with whether it holds."""
    items = (
        f'<li class="{"yes" if holds else "no"}"><span class="mark">{"✓" if holds else "✗"}</span>{escape(text)}</li>'
        for holds, text in found
    )
    return f'<ul class="claims">{"".join(items)}</ul>'


def chart(title: str, series: Sequence[Series], x_label: str) -> str:
    """A figure of lines, with a key that tells the last value of each."""
    keys = "".join(
        f'<span class="key"><i class="s{index}"></i>{escape(line.name)}, at the end {line.points[-1][1]:.3g}</span>'
        for index, line in enumerate(series, 1)
    )
    drawing = line_chart(series, title, x_label)
    return f"<figure><figcaption><strong>{escape(title)}</strong><br>{keys}</figcaption>{drawing}</figure>"


def charts(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="charts">{"".join(figures)}</div>'


def panels(titles: Sequence[str], rows: Sequence[Sequence[Image.Image]], width: int) -> str:
    """Pictures in columns of at most `width` pixels, each with a title, that scroll sideways on a small screen."""
    cells = [element("span", title) for title in titles]
    for row in rows:
        cells += [picture(panel, title) for panel, title in zip(row, titles, strict=True)]
    return _grid(len(titles), f"{width}px", cells)


def film(titles: Sequence[str], frames: Sequence[Image.Image], frame_ms: int, caption: str) -> str:
    """A moving picture over the whole width that begins anew at its end, its equal columns below titles."""
    cells = [*(element("span", title) for title in titles), animation(frames, frame_ms, caption, "all")]
    return f"<figure>{_grid(len(titles), '1fr', cells)}{element('figcaption', caption)}</figure>"


def picture(image: Image.Image, text: str) -> str:
    """A still picture. text: what screen readers say."""
    stored = io.BytesIO()
    image.convert("RGB").save(stored, "JPEG", quality=JPEG_QUALITY)
    return _image("jpeg", stored, text)


def animation(frames: Sequence[Image.Image], frame_ms: int, text: str, style: str = "") -> str:
    """A moving picture that begins anew at its end."""
    stored = io.BytesIO()
    first, *others = [frame.convert("RGB") for frame in frames]
    first.save(
        stored, "WEBP", save_all=True, append_images=others, duration=frame_ms, loop=0, quality=WEBP_QUALITY, method=2
    )
    return _image("webp", stored, text, style)


def _grid(columns: int, widest: str, cells: Sequence[str]) -> str:
    style = f"grid-template-columns: repeat({columns}, minmax(7rem, {widest}))"
    return f'<div class="scroll"><div class="panels" style="{style}">{"".join(cells)}</div></div>'


def _image(kind: str, stored: io.BytesIO, text: str, style: str = "") -> str:
    data = base64.b64encode(stored.getvalue()).decode()
    return f'<img{_style(style)} alt="{escape(text)}" src="data:image/{kind};base64,{data}">'


def _style(style: str) -> str:
    return f' class="{escape(style)}"' if style else ""
