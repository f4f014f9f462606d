"""The style sheet of the HTML report: light and dark as the reader's system is."""

CSS = """
:root {
  color-scheme: light dark;
  --bg: #f7f8fa; --card: #ffffff; --fg: #16181d; --muted: #667085; --line: #e4e7ec; --bad: #d92d20;
  --c0: #2563eb; --c1: #e8590c; --c2: #0d9488; --c3: #7c3aed; --c4: #ca8a04; --c5: #db2777; --c6: #4d7c0f;
  --c7: #475569;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0e1116; --card: #161b22; --fg: #e6e9ef; --muted: #8b95a5; --line: #29303b; --bad: #f97066;
    --c0: #60a5fa; --c1: #fb923c; --c2: #2dd4bf; --c3: #a78bfa; --c4: #facc15; --c5: #f472b6; --c6: #a3e635;
    --c7: #94a3b8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-font-smoothing: antialiased;
}
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px; font-weight: 650; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 44px 0 14px; font-weight: 620; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
h3.figures { margin: 28px 0 12px; font-size: 16px; }
p { margin: 0; }
.lead { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 28px; }
.card, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 14px 16px; }
.card .name { color: var(--muted); font-size: 13px; }
.card .value { font-size: 26px; font-weight: 640; letter-spacing: -0.02em; line-height: 1.3; }
.card .value small { font-size: 13px; font-weight: 450; color: var(--muted); letter-spacing: 0;
  margin-left: 5px; }
.card .more { color: var(--muted); font-size: 12px; }
.card.bad .value { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 14px; }
.wide { grid-column: 1 / -1; }
figure { margin: 0; padding: 16px 16px 8px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; margin-bottom: 8px; }
figcaption p { color: var(--muted); font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 0 auto; padding: 0; list-style: none;
  font-size: 13px; color: var(--muted); }
.legend li::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 6px; background: var(--c, var(--muted)); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--muted); font-size: 12px; }
svg .label { font-size: 12px; }
svg .note { font-size: 12px; fill: var(--fg); paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--muted); stroke-width: 1; }
.level { stroke: var(--fg); stroke-width: 1; stroke-dasharray: 4 4; opacity: 0.6; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.area { fill: var(--c); opacity: 0.16; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1; }
.box { fill: var(--c); }
.box.wait { opacity: 0.38; }
.box:hover, .dot:hover { stroke: var(--fg); stroke-width: 1.5; opacity: 1; }
.c0, .answer, .wait { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
.c7 { --c: var(--c7); }
.bad { --c: var(--bad); }
li.wait::before { opacity: 0.38; }
.table { overflow-x: auto; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 14px;
  align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 8px 14px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; }
tbody th { font-weight: 500; }
th:first-child { text-align: left; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts th { color: var(--muted); width: 38%; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; background: var(--c);
  margin-right: 8px; }
.problem { color: var(--bad); margin-top: 10px; }
details { margin-top: 20px; }
details h2 { display: inline; }
summary { cursor: pointer; margin-bottom: 14px; }
@media print { body { background: none; } figure, .table, .card { break-inside: avoid; } }
"""
