"""Building blocks of a self-contained HTML page: escaped text, tables with bars, pictures inside the page."""

import base64
import html
import io
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template

from PIL import Image

PICTURE_WIDTH = 1800  # pixels: sharp at the width of the page on dense screens too

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --tint: #f3f5f8;
  --accent: #0b57a4; --heat: #0b57a4; --mark: #fff1b8; --bar: #b5d3f2; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6e9ed; --soft: #a3adb8;
  --line: #3a424c; --tint: #1e242b; --accent: #7db7f5; --heat: #7db7f5; --mark: #5a4708; --bar: #274f7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
h1 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.8rem; padding-top: .6rem; border-top: 2px solid var(--line); }
h3 { margin-top: 1.8rem; overflow-wrap: anywhere; }
p, li { max-width: 48rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
nav ol { columns: 16rem; padding-left: 1.4rem; }
code { overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.note { border-left: 4px solid var(--accent); background: var(--tint); padding: .6rem .9rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: right; vertical-align: middle; }
th { background: var(--tint); font-weight: 600; }
th:first-child { text-align: left; }
th[scope=row] { position: sticky; left: 0; max-width: 16rem; overflow-wrap: break-word; }
.words th, .words td, .pairs :nth-child(2) { text-align: left; }
.words td { min-width: 9rem; max-width: 28rem; overflow-wrap: anywhere; }
td.best { font-weight: 700; white-space: nowrap; }
td.differs { background: var(--mark); }
td.bar, td.soft { text-align: left; }
td.bar { min-width: 14.5em;
  background: linear-gradient(var(--bar), var(--bar)) no-repeat 6.5em 50% / calc(7em * var(--share)) 1.1em; }
.matrix th, .matrix td { padding: .2rem .3rem; font-size: .85em; text-align: center; min-width: 2.2rem; }
.matrix th:first-child { text-align: left; padding-left: .6rem; }
.matrix th[scope=col] { vertical-align: bottom; }
.matrix th[scope=col] + th span { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg);
  max-height: 14rem; overflow: hidden; }
.matrix td { background: color-mix(in srgb, var(--heat) calc(100% * var(--share)), var(--paper)); }
.matrix td.strong { color: var(--paper); }
.matrix td.right { outline: 2px solid var(--ink); outline-offset: -2px; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
figcaption { color: var(--soft); max-width: 48rem; }
summary { cursor: pointer; font-weight: 600; color: var(--accent); }
@media screen and (max-width: 40rem) { body { padding: .9rem; } figure img { max-width: none; width: 50rem; }
  table { font-size: .875rem; } th[scope=row] { min-width: 7rem; max-width: 9rem; } .words td { min-width: 14rem; } }
@media print { body { max-width: none; padding: 0; font-size: 9.5pt; } h2, h3, figcaption { break-after: avoid; }
  p, li { max-width: none; } tr, img { break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th[scope=row] { position: static; } figure img { max-height: 23cm; }
  figure:has(.matrix), figcaption { break-inside: avoid; } .matrix th, .matrix td { min-width: 0; padding: .1rem; }
  .words td:not(.bar) { min-width: 0; }
  details::details-content { content-visibility: visible; block-size: auto; } }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="soft">Made on $date from $folders.</p>
$lead
</header>
<nav aria-label="Contents"><h2>Contents</h2><ol>$contents</ol></nav>
<main>$sections</main>
</body>
</html>
""")


class Html(str):
    """What is HTML already. Any other text is escaped where it enters the page."""


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def markup(template: str, *values: object) -> Html:
    """`template` with each {} replaced by a value, escaped."""
    return Html(template.format(*map(escape, values)))


def join(parts: Iterable[object], separator: str = "\n") -> Html:
    return Html(separator.join(map(escape, parts)))


def td(value: object, css: str = "", share: float | None = None) -> Html:
    """A cell; `share` in 0..1 is the length of its bar or the strength of its colour."""
    style = Html("" if share is None else f' style="--share: {share:.3f}"')
    return markup('<td class="{}"{}>{}</td>', css, style, value)


def note(text: str) -> Html:
    return markup('<p class="note">{}</p>', text)


def table(caption: str, header: list[str], rows: Iterable[list], css: str = "") -> Html:
    """A table that scrolls in a box of its own; the first cell of a row names it."""
    head = join((markup('<th scope="col"><span>{}</span></th>', breakable(name)) for name in header), "")
    lines = []
    for name, *cells in rows:
        cells = [cell if isinstance(cell, Html) else td(cell) for cell in cells]
        lines.append(markup('<tr><th scope="row">{}</th>{}</tr>', breakable(name), join(cells, "")))
    return markup(
        '<figure><figcaption>{}</figcaption><div class="scroll" role="region" tabindex="0" aria-label="{}">'
        '<table class="{}">\n<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody></table></div></figure>',
        *(caption, caption, css, head, join(lines)),
    )


def breakable(name: str) -> Html:
    """A name that may go on in the next line after an underscore."""
    return Html(escape(name).replace("_", "_<wbr>"))


def figure(caption: str, alt: str, draw: Callable[..., None], *arguments: object, **keywords: object) -> Html:
    """The picture that `draw(*arguments, path=path, **keywords)` writes, inside the page."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(*arguments, path=path, **keywords)
        with Image.open(path) as file:
            picture = file.convert("RGB")
    if picture.width > PICTURE_WIDTH:
        picture = picture.resize((PICTURE_WIDTH, round(picture.height * PICTURE_WIDTH / picture.width)))
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    picture.save(jpeg, "JPEG", quality=85, subsampling=0)
    # A photograph; of a drawing the exact colours are worth the bytes.
    kind, data = ("jpeg", jpeg) if jpeg.tell() < 0.6 * png.tell() else ("png", png)
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return markup(
        '<figure><div class="scroll" role="region" tabindex="0" aria-label="{}">'
        '<img src="{}" alt="{}" width="{}" height="{}"></div><figcaption>{}</figcaption></figure>',
        *(caption, source, alt, *picture.size, caption),
    )


def number(value: float, form: str = ".4f") -> str:
    """A dash for NaN: a class in neither target nor prediction, memory that could not be measured."""
    return "-" if math.isnan(value) else format(value, form)
