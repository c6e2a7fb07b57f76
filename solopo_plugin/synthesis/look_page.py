"""The page of `look`."""

from ..qa.pages import HEAD, SCRIPT

PAGE = (
    HEAD
    + r"""#short, #long { height: 30rem; } #chosen, #rejected { max-height: 16rem; }
mark.here { outline: 3px solid #c06000; }
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
"""
    + SCRIPT
    + r"""const rows = JSON.parse(get("rows").textContent);
let found = rows, at = 0;

function show(place) {
  at = found.length ? (place + found.length) % found.length : 0;
  const row = found[at];
  get("place").textContent = row ? `${at + 1} of ${found.length}: ${row.id}` : "no such row";
  get("question").textContent = row ? row.question : "";
  get("facts").replaceChildren(...Object.entries(row ? row.facts : {}).map(factLine));
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

onKeys({
  ArrowLeft: () => show(at - 1), ArrowRight: () => show(at + 1),
  s: () => nextEvidence("short"), l: () => nextEvidence("long"), "/": () => get("search").focus(),
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
)
