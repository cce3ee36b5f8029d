"""The style sheet of report.html: light and dark by what the reader's system prefers."""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b232d; --muted: #67717e; --line: #e3e7ec;
  --c0: #3568d4; --c1: #d07f1e; --c2: #3f9152; --c3: #9a5fb5; --c4: #2f949b;
  --rollout: #5b8def; --reward: #b07cc6; --prepare: #4fb0b5; --update: #5fad6b; --switch: #e5a13a;
  --evaluation: #98a2af; --checkpoint: #707985; --other: #cdd3da; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1317; --card: #171c22; --text: #e2e7ec; --muted: #8a95a2; --line: #29313a;
  --c0: #6f9cf5; --c1: #e5a13a; --c2: #66bd78; --c3: #c08ad6; --c4: #56bcc2; --other: #3d4650; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
header p { margin: 2px 0; color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 0 0 6px; font-weight: 650; letter-spacing: -0.01em; }
h1 span { color: var(--muted); font-weight: 450; }
h2 { font-size: 16px; font-weight: 650; margin: 36px 0 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 22px; }
.card, figure, details, .scroll { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.card { padding: 12px 16px; }
.card div, .card small { color: var(--muted); font-size: 12.5px; }
.card strong { display: block; font-size: 24px; font-weight: 620; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.empty { color: var(--muted); background: var(--card); border: 1px dashed var(--line);
  border-radius: 8px; padding: 20px; }
div.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 12px 14px 8px; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 13px;
  margin-bottom: 6px; }
figcaption b { font-weight: 600; }
.note { color: var(--muted); font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
.rule { stroke: var(--line); stroke-width: 1; }
.tick { fill: var(--muted); font-size: 11px; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.faint { opacity: 0.45; stroke-width: 1.2; }
.hit { fill: var(--text); opacity: 0; } .hit:hover { opacity: 0.07; }
.c0 { stroke: var(--c0); --key: var(--c0); } .c1 { stroke: var(--c1); --key: var(--c1); }
.c2 { stroke: var(--c2); --key: var(--c2); } .c3 { stroke: var(--c3); --key: var(--c3); }
.c4 { stroke: var(--c4); --key: var(--c4); }
.dots { fill: var(--card); stroke-width: 1.8; }
.p-rollout { fill: var(--rollout); --key: var(--rollout); }
.p-reward { fill: var(--reward); --key: var(--reward); }
.p-prepare { fill: var(--prepare); --key: var(--prepare); }
.p-update { fill: var(--update); --key: var(--update); }
.p-switch { fill: var(--switch); --key: var(--switch); }
.p-evaluation { fill: var(--evaluation); --key: var(--evaluation); }
.p-checkpoint { fill: var(--checkpoint); --key: var(--checkpoint); }
.p-other { fill: var(--other); --key: var(--other); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--muted);
  min-height: 4px; padding: 2px 0 2px; }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 6px;
  border-radius: 2px; background: var(--key); }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; margin-bottom: 14px; }
.bar i { background: var(--key); }
.scroll { overflow-x: auto; margin-bottom: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: 12px; }
td, th { padding: 5px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.numbers { font-variant-numeric: tabular-nums; }
.numbers td, .numbers th { white-space: nowrap; text-align: right; }
.numbers td:first-child, .numbers th:first-child, .wide td:nth-child(2), .wide th:nth-child(2) {
  text-align: left; }
.samples pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 46ch;
  font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
td small { display: block; color: var(--muted); white-space: nowrap; }
.samples td { font-variant-numeric: tabular-nums; }
.group td { font-weight: 600; font-size: 12.5px; background: var(--page); }
details { padding: 10px 16px; } summary { cursor: pointer; color: var(--muted); }
details pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  overflow-x: auto; }
"""
