"""What the parts of the demo's page share."""

import html

SIDE = 256
"""Of pictures of scenes on the page, in pixels; a model sees its own size."""

STYLE = """
:root { --ink: #1c1f23; --soft: #667079; --line: #e3e6e9; --paper: #fbfbfa; --accent: #0b6e99; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaec; --soft: #98a2ab; --line: #30363b; --paper: #15181b; --accent: #6cc3e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 3rem 0 .2rem; text-transform: capitalize; }
p { margin: .2rem 0 1rem; max-width: 48rem; color: var(--soft); }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: 1rem; align-items: start; }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; border-radius: 4px; }
figcaption { font-size: .85rem; color: var(--soft); padding-top: .35rem; font-variant-numeric: tabular-nums; }
figcaption b { color: var(--ink); }
.none { border: 1px dashed var(--line); border-radius: 4px; display: grid; place-items: center; padding: 1rem;
  color: var(--soft); font-size: .85rem; text-align: center; }
table { border-collapse: collapse; margin-top: 1rem; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .9rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; text-transform: capitalize; }
th { color: var(--soft); font-weight: 500; }
"""


def picture(file: str, caption: str) -> str:
    """A picture of a scene with a caption, which is HTML."""
    name = html.escape(file)
    image = f'<img src="{name}" width="{SIDE}" height="{SIDE}" alt="{name}" loading="lazy" style="max-width: {SIDE}px">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
