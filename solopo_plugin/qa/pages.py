"""Pages that need nothing but themselves: style, script, and what is filled in at `{{name}}`, escaped.

`PAGE` is inspect.py's; the report of an evaluation begins with the same `HEAD` and `SCRIPT`.
"""

import base64
import html
import io
import json
import re

from matplotlib.figure import Figure

# up to the style that is a page's own; nothing is loaded from anywhere
HEAD = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 78rem; margin: 1rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
th, td { padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
td { overflow-wrap: anywhere; } tr.fails td { font-weight: 600; color: light-dark(#a02020, #ff9090); }
figure { display: inline-block; margin: .5rem; max-width: 44rem; } img { max-width: 100%; background: white; }
.panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: .8rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; margin: 0; padding: .5rem; }
pre, kbd { border: 1px solid #8888; } kbd { padding: 0 .3em; } button, input, select { font: inherit; }
mark { background: #ffe08a; color: black; } :focus-visible { outline: 3px solid #2060c0; }
"""

# for pages whose texts come from data or models: only textContent is ever set
SCRIPT = r""""use strict";
const get = (id) => document.getElementById(id);

function element(tag, text, ...parts) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (parts.length) made.append(...parts);
  return made;
}

function factLine([name, value]) {
  const cell = element("td", value === null ? "-" : String(value));
  return element("tr", "", element("th", name.replaceAll("_", " ")), cell);
}

function onKeys(keys) {
  document.addEventListener("keydown", (event) => {
    const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
}
"""


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with each `{{name}}` replaced, once: what is filled in is not searched."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)


def embed(value: object) -> str:
    """JSON that can stand in a script element whatever its texts are."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def png(figure: Figure) -> bytes:
    """A figure as a PNG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def image(picture: bytes, caption: str) -> str:
    """A PNG and the sentence that says what it shows, in the page itself."""
    caption = html.escape(caption)
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def facts_table(facts: dict[str, str]) -> str:
    """Names and values, one a line."""
    lines = (f"<tr><th scope=row>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return f"<table>{''.join(lines)}</table>"
