"""The page of inspect.py: one HTML file with its style and script; `{{name}}` is filled in there, escaped."""

PAGE = r"""<!doctype html>
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
pre, kbd { border: 1px solid #8888; } kbd { padding: 0 .3em; } button, input { font: inherit; }
#short, #long { height: 30rem; } #chosen, #rejected { max-height: 16rem; }
mark { background: #ffe08a; color: black; } mark.here { outline: 3px solid #c06000; }
:focus-visible { outline: 3px solid #2060c0; }
</style>
</head>
<body>
<h1>{{title}}</h1>
<h2>Summary</h2>
{{summary}}
<h2>Figures</h2>
{{pictures}}
<h2>Leak checks</h2>
{{checks}}
<h2 id="reader">Rows</h2>
<noscript><p>The reader needs JavaScript; the figures above do not.</p></noscript>
<p>{{n_shown}}, evidence marked.
<kbd>&larr;</kbd> <kbd>&rarr;</kbd> row before and after, <kbd>s</kbd> <kbd>l</kbd> next evidence in the short and the
long context, <kbd>/</kbd> search.</p>
<p>
<button id="before" type="button">Previous</button> <button id="after" type="button">Next</button>
<label>Search <input id="search" type="search" placeholder="id, question or answer"></label>
<output id="place" aria-live="polite"></output>
</p>
<h3 id="question"></h3>
<table id="facts"></table>
<div class="panes">
<section><h4>Short context</h4><pre id="short" tabindex="0" aria-label="Short context"></pre></section>
<section><h4>Long context</h4><pre id="long" tabindex="0" aria-label="Long context"></pre></section>
<section><h4>Chosen</h4><pre id="chosen" tabindex="0" aria-label="Chosen answer"></pre></section>
<section><h4>Rejected</h4><pre id="rejected" tabindex="0" aria-label="Rejected answer"></pre></section>
</div>
<script type="application/json" id="rows">{{rows}}</script>
<script>
"use strict";
const get = (id) => document.getElementById(id);
const rows = JSON.parse(get("rows").textContent);
let found = rows, at = 0;

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function show(place) {
  at = found.length ? (place + found.length) % found.length : 0;
  const row = found[at];
  get("place").textContent = row ? `${at + 1} of ${found.length}: ${row.id}` : "no such row";
  get("question").textContent = row ? row.question : "";
  get("facts").replaceChildren(...Object.entries(row ? row.facts : {}).map(([name, value]) => {
    const line = document.createElement("tr");
    line.append(element("th", name.replaceAll("_", " ")), element("td", value === null ? "-" : String(value)));
    return line;
  }));
  for (const side of ["short", "long"]) {
    const pieces = row ? row[side] : [];
    get(side).replaceChildren(...pieces.map(([text, evidence]) => element(evidence ? "mark" : "span", text)));
    get(side).scrollTop = 0;
  }
  for (const part of ["chosen", "rejected"]) get(part).textContent = row ? row[part] : "";
}

function search() {
  const words = get("search").value.toLowerCase();
  const text = (row) => [row.id, row.question, row.facts.answers].join("\n").toLowerCase();
  found = rows.filter((row) => text(row).includes(words));
  show(0);
}

function nextEvidence(side) {
  const marks = [...get(side).querySelectorAll("mark")];
  const here = marks.findIndex((mark) => mark.classList.contains("here"));
  marks.forEach((mark) => mark.classList.remove("here"));
  if (!marks.length) return;
  const mark = marks[(here + 1) % marks.length];
  mark.classList.add("here");
  mark.scrollIntoView({block: "nearest"});
}

function follow() {
  const match = /^#row=(.*)$/.exec(location.hash);
  if (!match) return;
  get("search").value = "";
  search();
  const place = rows.findIndex((row) => row.id === decodeURIComponent(match[1]));
  if (place >= 0) show(place);
  get("reader").scrollIntoView();
}

const keys = {
  ArrowLeft: () => show(at - 1), ArrowRight: () => show(at + 1),
  s: () => nextEvidence("short"), l: () => nextEvidence("long"), "/": () => get("search").focus(),
};
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in keys) {
    event.preventDefault();
    keys[event.key]();
  }
});
get("before").addEventListener("click", () => show(at - 1));
get("after").addEventListener("click", () => show(at + 1));
get("search").addEventListener("input", search);
addEventListener("hashchange", follow);
show(0);
follow();
</script>
</body>
</html>
"""
