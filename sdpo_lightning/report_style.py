"""Rank 0: the style sheet of the report: light and dark, from 400 pixels on."""

CSS = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b1f24; --soft: #5b6470; --rule: #d9dde3;
  --good: #2f8f5b; --bad: #d0632a; --c0: #2563c9; --c1: #d0632a; --c2: #2f8f5b; --c3: #8b45b5; --c4: #a67c00;
  --c5: #c2365f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2126; --text: #e7eaee; --soft: #9aa4b1;
  --rule: #363c45; --good: #4cb782; --bad: #ec8a53; --c0: #6ea3f5; --c1: #ec8a53; --c2: #5cc48e; --c3: #c08be3;
  --c4: #d9b44a; --c5: #ef7f9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
header, main { max-width: 1280px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 20px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 28px 0 10px; }
h3 { font-size: 15px; margin: 0 0 6px; font-weight: 600; }
header p, .note, .soft { color: var(--soft); }
header p { margin: 2px 0 0; overflow-wrap: anywhere; }
.note { font-size: 13px; margin: 6px 0 0; }
main { padding-bottom: 40px; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); }
figure, article, details, .wide { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
figure, article { margin: 0; padding: 12px; min-width: 0; }
figure .wide { border: 0; }
article + article, .wide + .note, .wide + h3, .wide + details { margin-top: 14px; }
h3:has(+ .wide) { margin-top: 20px; }
figure h3:first-child { margin-top: 0; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); }
svg text.soft { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--rule); }
svg .level { stroke: var(--soft); stroke-dasharray: 2 3; }
svg .boundary { stroke: var(--soft); stroke-dasharray: 5 3; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke: var(--c); }
svg .error { stroke: var(--c); stroke-width: 1.5; }
svg .dot { fill: var(--c); }
svg .bar { fill: var(--c0); }
svg .whisker { stroke: var(--text); stroke-width: 1.5; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); }
.s3 { --c: var(--c3); } .s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 4px; font-size: 13px; }
.key { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin: 0 5px 3px 0; background: var(--c); }
.wide { overflow-x: auto; width: fit-content; max-width: 100%; }
figure .wide { width: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 5px 10px; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:not(.num) { text-align: left; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
tr:last-child td { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
.heat, figure th:not(:first-child) { text-align: center; }
.heat small { display: block; color: var(--soft); }
.heat.good { background: color-mix(in srgb, var(--good) var(--strength), var(--card)); }
.heat.bad { background: color-mix(in srgb, var(--bad) var(--strength), var(--card)); }
.prompt { margin: 0 0 10px; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); }
.answers { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); }
.answer { border-left: 3px solid var(--rule); padding-left: 10px; min-width: 0; }
.answer p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { padding: 8px 12px; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: 13px; }
"""
