"""The report's style sheet: one column of text, quiet tables, the reader's own fonts; light, dark,
paper and phone.
"""

# Series colours after Okabe and Ito, darkened (or, on dark, lightened) to a contrast of 3:1 with
# the page.
_LIGHT = ("#5c5c5c", "#8a8276", "#c44e00", "#a87200", "#00805d", "#0063a6", "#2f8cc4", "#a8487c")
_DARK = ("#b4b4b4", "#8f8a80", "#ff8a4a", "#e3ae3a", "#37c79a", "#5eb3f2", "#9ad6f7", "#e094bd")


def _series(colours: tuple[str, ...]) -> str:
    return " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours))


_LIGHT_PAGE = (
    "--paper: #fdfcfa; --ink: #1c2126; --soft: #586069; --faint: #e4e0d8; --band: #f4f1ea; --shade: #0002; "
    "--accent: #0063a6; " + _series(_LIGHT)
)
_DARK_PAGE = (
    "--paper: #15181b; --ink: #e6e4df; --soft: #a4a9ae; --faint: #343a40; --band: #1e2327; --shade: #000a; "
    "--accent: #7cc0f5; " + _series(_DARK)
)
_SERIES_RULES = "\n".join(
    f"svg .s{i} {{ stroke: var(--s{i}); fill: var(--s{i}); }} svg .t{i} {{ fill: var(--s{i}); }}"
    for i in range(len(_LIGHT))
)

STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT_PAGE} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK_PAGE} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Liberation Sans", sans-serif;
}}
main {{ max-width: 57rem; margin: 0 auto; padding: 4rem 1.25rem 6rem; }}
h1, h2, h3 {{
  font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Charter, Georgia, "Liberation Serif", serif;
  font-weight: 600; line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere;
}}
h1 {{ font-size: 2.5rem; margin: 0 0 1.25rem; letter-spacing: -0.01em; }}
h2 {{ font-size: 1.65rem; margin: 4.5rem 0 1rem; }}
h3 {{ font-size: 1.2rem; margin: 2.75rem 0 .5rem; }}
p {{ margin: 0 0 1rem; overflow-wrap: break-word; }}
p, ul, h1, pre, figure {{ max-width: 43rem; }}
.lead {{ font-size: 1.25rem; line-height: 1.5; color: var(--soft); margin-bottom: 2rem; }}
.note {{ font-size: .94rem; color: var(--soft); }}
ul {{ padding-left: 1.2rem; margin: 0 0 1rem; }}
li {{ margin-bottom: .5rem; overflow-wrap: break-word; }}
li::marker {{ color: var(--soft); }}
a {{ color: var(--accent); text-underline-offset: .15em; }}
nav ol {{
  list-style: none; padding: 1.1rem 0; margin: 2rem 0 0; columns: 2; column-gap: 2rem; font-size: .94rem;
  border-block: 1px solid var(--faint);
}}
nav li {{ break-inside: avoid; margin: 0 0 .25rem; }}
nav a {{ text-decoration: none; }} nav a:hover {{ text-decoration: underline; }}
code, pre {{ font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }}
pre {{
  background: var(--band); padding: .9rem 1rem; border-radius: 4px; margin: 0 0 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
}}
/* Its right edge is shaded for as long as there is more to the right. */
.box {{
  overflow-x: auto; margin: 1.5rem 0;
  background: linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / .9rem 100% no-repeat scroll;
}}
.box:focus-visible {{ outline: 2px solid var(--accent); outline-offset: 3px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.4; }}
table {{ font-variant-numeric: tabular-nums; }}
caption {{ caption-side: top; text-align: left; font-weight: 600; padding: 0 0 .5rem; }}
th, td {{ padding: .42rem .6rem; text-align: right; vertical-align: baseline; border-bottom: 1px solid var(--faint); }}
th:first-child, td:first-child {{ padding-left: 0; }} th:last-child, td:last-child {{ padding-right: 0; }}
th {{ font-weight: 500; }} thead th {{ color: var(--soft); vertical-align: bottom; border-bottom-color: var(--soft); }}
th.w, td.w {{ text-align: left; }} td.n {{ white-space: nowrap; }} tbody th {{ min-width: 9rem; }}
td.w {{ min-width: 9rem; overflow-wrap: anywhere; }}
tr.strong > * {{ font-weight: 700; background: var(--band); }}
figure {{ margin: 1.75rem 0 2rem; }}
figcaption {{ font-size: .94rem; margin-bottom: 1rem; color: var(--soft); }}
figcaption b {{ font-weight: 600; color: var(--ink); }}
svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
img {{ display: block; width: 100%; height: auto; background: #fff; }}
figure:has(> img) {{ max-width: none; overflow-x: auto; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }}
.grid {{ gap: 1.75rem 2rem; margin-bottom: 2.5rem; }}
.grid figure {{ margin: 0; max-width: 22rem; }}
.grid figcaption {{ margin-bottom: .5rem; }} .grid figcaption b {{ font-weight: 500; }}
svg text {{ font-size: 14px; line-height: 1; fill: var(--ink); }}
svg .tick, svg .axis {{ fill: var(--soft); font-variant-numeric: tabular-nums; }}
svg .label {{ font-weight: 600; }}
{_SERIES_RULES}
svg .line {{ fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }}
svg .bold {{ stroke-width: 3; }}
svg .thick {{ stroke-width: 5; stroke-linecap: butt; opacity: .55; }}
svg .dashed {{ stroke-dasharray: 5 4; }}
svg .solid {{ stroke: var(--paper); stroke-width: 1; }}
svg .hollow {{ fill: var(--paper); stroke-width: 2; }}
svg .rule {{ stroke: var(--faint); stroke-width: 1; }}
svg .zero {{ stroke: var(--soft); stroke-width: 1.5; }}
svg .leader, svg .trail {{ fill: none; stroke: var(--soft); stroke-width: 1; }}
svg .leader {{ opacity: .6; }}
svg .seed {{ fill: var(--soft); }}
svg .cell {{ font-weight: 600; font-variant-numeric: tabular-nums; }}
svg .on-light {{ fill: #000; }} svg .on-dark {{ fill: #fff; }}
@media (max-width: 34rem) {{
  main {{ padding: 2rem 1rem 4rem; }}
  h1 {{ font-size: 1.9rem; }} h2 {{ font-size: 1.4rem; margin-top: 3.25rem; }}
  .lead {{ font-size: 1.1rem; }} nav ol {{ columns: 1; }}
  figure > svg text {{ font-size: 18px; }} figure > svg .label {{ font-size: 16.5px; }}
  .grid svg text {{ font-size: 15px; }}
  td.w {{ min-width: 6rem; }} tbody th {{ min-width: 7.5rem; max-width: 9rem; }}
  /* A row keeps its name while its figures are scrolled, and the caption stays in view. */
  caption span {{ display: block; position: sticky; left: 0; width: fit-content; max-width: calc(100vw - 2rem); }}
  tbody th, thead th:first-child {{ position: sticky; left: 0; background: var(--paper); }}
  tbody tr.strong th {{ background: var(--band); }}
  figure > img {{ width: 46rem; }}
}}
@media print {{
  :root {{ color-scheme: light; {_LIGHT_PAGE} --paper: #fff; }}
  @page {{ margin: 16mm 14mm; }}
  html {{ font-size: 9.5pt; }} body {{ font-size: 1rem; line-height: 1.45; }}
  main {{ max-width: none; padding: 0; }}
  nav {{ display: none; }}
  h1 {{ font-size: 22pt; }} h2 {{ font-size: 15pt; margin-top: 24pt; }} h3 {{ font-size: 11.5pt; margin-top: 16pt; }}
  h2, h3, caption, figcaption, p:has(+ .grid) {{ break-after: avoid; }}
  p, li {{ orphans: 3; widows: 3; }}
  figure, tr {{ break-inside: avoid; }}
  p, ul, figure, pre {{ max-width: 150mm; }}
  figure > svg {{ max-width: 125mm; }}
  .grid {{ grid-template-columns: repeat(3, 1fr); gap: 10pt; }}
  .box {{ overflow: visible; background: none; }}
  thead {{ display: table-header-group; }}
  table {{ font-size: 7.6pt; }} th, td {{ padding: 2.5pt 4pt; }}
  td.n {{ white-space: normal; }} tbody th, td.w {{ min-width: 0; }}
  tr.strong > * {{ background: none; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
