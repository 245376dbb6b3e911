"""The style sheet of a page: light and dark, on screens and on paper."""

from __future__ import annotations

_LIGHT = """
--paper:#fbfbf9;--card:#ffffff;--ink:#1c2024;--soft:#60666d;--rule:#e3e4e0;--accent:#2456c8;
--c0:#2456c8;--c1:#d1541c;--c2:#13805a;--c3:#8a3ccf;--c4:#a8780b;--c5:#0c7792;--c6:#b92767;--c7:#5b7420;
"""
_DARK = """
--paper:#14171b;--card:#1b1f24;--ink:#e8eaed;--soft:#9aa3ad;--rule:#2d333b;--accent:#8ab4ff;
--c0:#8ab4ff;--c1:#ff9d66;--c2:#5fd3a4;--c3:#c99bff;--c4:#e7c15a;--c5:#62cde4;--c6:#ff8cb8;--c7:#b5d36a;
"""
_COLOURS = "".join(
    f".c{number}{{--of:var(--c{number})}}" for number in range(8)
)  # which lines, dots, bars and swatches take up

STYLE = f"""
:root{{{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
{_COLOURS}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}}
header,main,footer{{max-width:1180px;margin:0 auto;padding:0 28px}}
header{{padding-top:44px}}
.brand{{margin:0;color:var(--accent);font-weight:700;letter-spacing:.08em;text-transform:uppercase;
font-size:.8rem}}
h1{{margin:.1em 0 .15em;font-size:2.3rem;line-height:1.15;letter-spacing:-.02em;
overflow-wrap:anywhere}}
h2{{margin:0 0 .7em;font-size:1.35rem;letter-spacing:-.01em}}
h3{{margin:1.8em 0 .5em;font-size:1.02rem}}
section{{margin:52px 0 0}}
.chip{{display:inline-block;vertical-align:middle;margin-left:.35em;padding:.25em .75em;
border:1px solid var(--rule);border-radius:99px;background:var(--card);color:var(--soft);
font-size:.8rem;font-weight:600;letter-spacing:0;line-height:1.3}}
.lead{{margin:0;color:var(--soft);font-size:1.06rem}}
.note,.protocol,figcaption,footer{{color:var(--soft);font-size:.875rem}}
.note{{margin:.8em 0;max-width:78ch}}
.protocol{{margin:0 0 .8em;overflow-wrap:anywhere}}
figure{{margin:0}}
figcaption{{margin:.6em 0 0}}
.card figcaption{{margin:0 0 .6em}}
figcaption strong,.legend strong{{color:var(--ink);font-weight:600}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;
margin:30px 0 0}}
.tile{{display:flex;flex-direction:column;justify-content:space-between;
padding:14px 16px 12px;border:1px solid var(--rule);border-radius:12px;
background:var(--card)}}
.tile dt{{color:var(--soft);font-size:.78rem;line-height:1.3}}
.tile dd{{margin:.2em 0 0;font-size:1.38rem;font-weight:600;letter-spacing:-.02em;
white-space:nowrap}}
.card{{padding:16px 18px;border:1px solid var(--rule);border-radius:12px;background:var(--card);
margin-bottom:18px}}
.charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:18px}}
.charts .card{{margin:0}}
.protocol-part .card{{max-width:680px;margin-top:18px}}
svg.chart,svg.bars{{display:block;width:100%;height:auto;overflow:visible}}
svg.bars{{height:34px;border-radius:6px;overflow:hidden}}
.grid{{stroke:var(--rule);stroke-width:1}}
.axis{{stroke:var(--soft);stroke-width:1}}
.level{{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:5 4}}
.tick{{fill:var(--soft);font-size:12px;text-anchor:middle}}
.left{{text-anchor:end}}
.value{{fill:var(--ink);font-size:13px}}
.line{{fill:none;stroke:var(--of);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
.thin{{stroke-width:1;opacity:.45}}
.dot,.bar{{fill:var(--of)}}
.band{{fill:var(--of);opacity:.16}}
.swatch{{display:inline-block;width:.72em;height:.72em;margin-right:.5em;border-radius:3px;
background:var(--of)}}
.legend{{display:flex;flex-wrap:wrap;gap:.3em 1.4em;margin:.2em 0 .6em;padding:0;list-style:none;
color:var(--soft);font-size:.85rem}}
svg+.legend{{margin:.9em 0 0}}
.wide{{overflow-x:auto;margin:.4em 0 0}}
table{{border-collapse:collapse;width:100%;font-size:.875rem}}
th,td{{padding:.48em .9em .48em 0;border-bottom:1px solid var(--rule);text-align:left;
vertical-align:top;font-weight:400}}
thead th{{color:var(--soft);font-size:.8rem;line-height:1.3;vertical-align:bottom}}
tbody th,tfoot th{{font-weight:600;white-space:nowrap}}
tfoot td,tfoot th{{font-weight:600}}
.number{{text-align:right;padding:.48em 0 .48em .9em}}
tbody .number,tfoot .number{{white-space:nowrap}}
.pairs th{{width:19em;color:var(--soft);font-weight:400;overflow-wrap:anywhere}}
.pairs td{{overflow-wrap:anywhere}}
pre{{margin:1.2em 0 .6em;padding:14px 16px;border:1px solid var(--rule);border-radius:10px;
background:var(--card);font-size:.84rem;white-space:pre-wrap;overflow-wrap:anywhere}}
code{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
summary{{cursor:pointer;padding:.35em 0;font-weight:600}}
img{{display:block;max-width:100%;height:auto;border-radius:8px}}
.pixels{{image-rendering:pixelated;width:100%}}
.hero{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:28px;
align-items:start}}
.hero img{{width:100%}}
.grids{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr));gap:18px}}
.grids .grid-picture,.strip .grid-picture{{width:100%}}
.strip{{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:14px}}
.strip figcaption{{margin-top:.35em}}
.film{{background:#fff;padding:8px;border:1px solid var(--rule)}}
footer{{margin-top:64px;padding-bottom:40px}}
footer p{{margin:0;padding-top:16px;border-top:1px solid var(--rule)}}
@media (max-width:640px){{header,main,footer{{padding:0 16px}}header{{padding-top:26px}}
h1{{font-size:1.8rem}}}}
@page{{margin:14mm}}
@media print{{
:root{{{_LIGHT}--paper:#fff}}
body{{font-size:10pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}}
header,main,footer{{max-width:none;padding:0}}
section{{margin-top:26px}}
figure,.tile,tr,pre{{break-inside:avoid}}
h2,h3{{break-after:avoid}}
.charts,.hero{{grid-template-columns:1fr 1fr;gap:10px}}
.wide{{overflow:visible}}
table{{font-size:7.6pt}}
thead th{{font-size:6.8pt}}
th,td{{padding:.3em .6em .3em 0}}
.number{{padding:.3em 0 .3em .6em}}
details::details-content{{content-visibility:visible;block-size:auto}}
}}
""".replace("\n", "")
