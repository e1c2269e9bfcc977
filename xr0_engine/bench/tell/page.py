"""What the report's page is made of: style (as light or dark as the system, light on paper), script, blocks."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5a6675; --line: #dde2e8;
  --c0: #1267b4; --c1: #c2560c; --c2: #14795a; --c3: #8a3a8f; --c4: #836900; --c5: #5b6470; --bound: #0b1d33;
  --alarm: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #10151c; --card: #19202a; --ink: #e8ecf1; --soft: #9dabba;
  --line: #2d3743; --c0: #5aa9ee; --c1: #f0954a; --c2: #4cc39a; --c3: #d495da; --c4: #d9b53f; --c5: #a3adb8;
  --bound: #f4f8ff; --alarm: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 20px; line-height: 1.3; margin: 0; }
h3 { font-size: 15px; margin: 28px 0 8px; }
h4 { font-size: 13px; margin: 0 0 6px; color: var(--soft); font-weight: 600; }
header p, .where, .note { color: var(--soft); margin: 4px 0 0; }
.where, .note { font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 12px; }
a { color: var(--c0); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 24px; margin: 24px 0; }
.warning { border-left: 4px solid var(--alarm); color: var(--alarm); padding: 4px 12px; margin: 12px 0 0; }
.banner { border: 3px solid var(--alarm); border-radius: 10px; color: var(--alarm); padding: 12px 20px;
  margin: 20px 0 0; font-size: 17px; }
.banner strong { display: block; font-size: 34px; line-height: 1.15; letter-spacing: 0.04em; }
.badge { display: inline-block; border: 1px solid var(--b); border-radius: 20px; color: var(--b); font-size: 12px;
  line-height: 1.4; padding: 0 9px; white-space: nowrap; }
.good { --b: var(--c2); } .bad { --b: var(--alarm); } .open { --b: var(--c4); } .none { --b: var(--soft); }
.bad { font-weight: 600; }
table.steps { width: 100%; }
table.steps td, table.steps th { text-align: left; white-space: normal; vertical-align: top; }
table.steps td.time { text-align: right; white-space: nowrap; }
table.steps th[scope="row"], table.steps td:nth-child(3) { white-space: nowrap; }
table.steps th[scope="row"] { padding-right: 8px; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; margin: 6px 0 0;
  font: 12px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
ol.next { margin: 8px 0 0; padding-left: 22px; }
.next li { margin: 3px 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 0; }
.tiles div { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; flex: 1 1 100px; max-width: 190px;
  white-space: nowrap; }
.tiles dt { color: var(--soft); font-size: 12px; }
.tiles dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 24px 0 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-weight: 400; font-size: 13px; }
.key::before { content: ""; display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px;
  background: var(--c); vertical-align: -1px; }
.key.bound::before { height: 5px; vertical-align: 2px; background: var(--bound); }
.plot { overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 24px;
  align-items: end; }
svg { display: block; width: 100%; height: auto; overflow: visible; font-variant-numeric: tabular-nums; }
svg.w1040 { min-width: 700px; } svg.w500 { min-width: 400px; }
svg text { fill: var(--soft); }
svg text.strong, svg text.value { fill: var(--ink); }
svg text.strong { font-weight: 600; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); --dash: 7 3; } .s2 { --c: var(--c2); --dash: 2 3; }
.s3 { --c: var(--c3); --dash: 9 3 2 3; } .s4 { --c: var(--c4); --dash: 12 4; } .s5 { --c: var(--c5); --dash: 4 2; }
rect[class^="s"] { fill: var(--c); }
.bound { fill: var(--bound); }
.area { fill: var(--c); fill-opacity: 0.22; stroke: var(--c); stroke-width: 1.5; stroke-dasharray: var(--dash, none); }
.line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; stroke-dasharray: var(--dash, none); }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 0.8; }
.grid { stroke: var(--line); fill: none; }
.reference { stroke: var(--ink); fill: none; }
.whisker { stroke: var(--ink); fill: none; stroke-width: 1.3; }
.deadline { stroke: var(--alarm); fill: none; stroke-dasharray: 3 3; }
.hover { fill: transparent; }
.hover:hover { fill: var(--ink); fill-opacity: 0.07; }
.table { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; }
th[scope="row"] { text-align: left; font-weight: 400; padding-right: 28px; }
th[scope="rowgroup"] { text-align: left; padding-top: 12px; }
details { margin-top: 10px; font-size: 13.5px; }
summary { color: var(--c0); cursor: pointer; }
.command { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; margin: 10px 0 0; }
.command::before { content: "$ "; color: var(--soft); }
.details { margin-top: 14px; display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 20px 32px; }
.details dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0; font-size: 13px; }
.details dt { color: var(--soft); }
.details dd { margin: 0; overflow-wrap: anywhere; }
#tip { position: fixed; z-index: 1; pointer-events: none; max-width: 340px; background: var(--ink); color: var(--page);
  font-size: 13px; line-height: 1.35; padding: 6px 10px; border-radius: 6px; }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #1b2330; --soft: #5a6675; --line: #dde2e8;
    --c0: #1267b4; --c1: #c2560c; --c2: #14795a; --c3: #8a3a8f; --c4: #836900; --c5: #5b6470; --bound: #0b1d33;
    --alarm: #b3261e; }
  * { print-color-adjust: exact; }
  header, main { max-width: none; padding: 0; }
  body { font-size: 12px; }
  section { border: 0; padding: 0; }
  section + section { break-before: page; }
  figure, .tiles, .details > div, tr { break-inside: avoid; }
  h3 { break-after: avoid; }
  .pair { grid-template-columns: 1fr 1fr; }
  svg.w1040, svg.w500 { min-width: 0; }
  nav { display: none; }
  summary { list-style: none; font-weight: 600; color: var(--ink); }
  .table { overflow: visible; }
  table { font-size: 10.5px; }
  th, td { padding: 3px 9px 3px 0; }
  .details { grid-template-columns: 1fr 1fr; }
}
"""

SCRIPT = """
(() => {
  const tip = document.getElementById("tip");
  const show = (event) => {
    const text = event.target.getAttribute && event.target.getAttribute("data-tip");
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 18;
    const top = below + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = top + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
  document.addEventListener("scroll", () => { tip.hidden = true; }, true);
})();
"""


def document(title: str, header: str, main: str, style: str = STYLE, videos: bool = False) -> str:
    """A page that loads nothing, or videos beside it, and runs one script; header and main are HTML, title is text."""
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(SCRIPT)}'"
    if videos:
        policy += "; media-src 'self' file:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header>{header}</header>
<main>
{main}
</main>
<div id="tip" role="status" hidden></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def figure(caption: str, chart: str, series: Iterable[str] = (), bound: str | None = None) -> str:
    """series: names for the legend, in the order of their colours. bound: what to call the bound, if it is drawn."""
    names = list(series)
    keys = [f'<span class="key s{number}">{escape(name)}</span>' for number, name in enumerate(names)]
    keys = keys if len(names) > 1 else []
    if bound is not None:
        keys.append(f'<span class="key bound">{escape(bound)}</span>')
    legend = f'<span class="legend">{"".join(keys)}</span>' if keys else ""
    return f'<figure><figcaption>{escape(caption)}{legend}</figcaption><div class="plot">{chart}</div></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A row of one cell is a heading over the rows below it."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = []
    for row in rows:
        if len(row) == 1:
            body.append(f'<tr><th scope="rowgroup" colspan="{len(head)}">{escape(row[0])}</th></tr>')
        else:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            body.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def definitions(title: str, items: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items)
    return f"<div><h4>{escape(title)}</h4><dl>{rows}</dl></div>"


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
