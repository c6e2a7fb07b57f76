"""The page of a report: one HTML file with its style and script; `{{name}}` is filled in by write_report, escaped."""

from ...qa.pages import HEAD, SCRIPT

PAGE = (
    HEAD
    + r"""h2 { margin-top: 2rem; border-bottom: 2px solid #8888; } h1, h2, h3, p { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } small { display: block; opacity: .8; white-space: nowrap; } .note { opacity: .85; }
.wide td { overflow-wrap: normal; min-width: 4rem; } .wide th[scope=row] { min-width: 8rem; max-width: 18rem; }
.wide thead th { vertical-align: bottom; } th[scope=rowgroup] { padding-top: .6rem; font-style: italic; }
.published { background: #8882; font-style: italic; } .published [scope=row] { font-weight: normal; }
.warning { border-left: 4px solid #c06000; padding: .2rem .6rem; font-weight: 600; }
#filters { display: flex; flex-wrap: wrap; gap: .4rem 1rem; } #filters select, #filters input { max-width: 15rem; }
#explorer { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1rem; margin-top: .6rem; }
#list { width: 100%; align-self: start; position: sticky; top: .5rem; } #answers small { white-space: normal; }
#bar { position: relative; height: 1.2rem; border: 1px solid #8888; background: #8883; }
#bar i { position: absolute; top: 0; bottom: 0; min-width: 3px; background: #d55e00; }
#passages pre, #answers pre { max-height: 14rem; margin: .2rem 0 .6rem; }
.ends { display: flex; justify-content: space-between; }
figure { max-width: min(56rem, 100%); overflow-x: auto; margin: .5rem 0; }
@media (max-width: 50rem) {
  figure img { max-width: 42rem; }
  #explorer { grid-template-columns: minmax(0, 1fr); } #list { height: 12rem; position: static; }
}
</style>
</head>
<body>
<h1>{{title}}</h1>
{{head}}
<nav aria-label="Sections"><p>{{links}}</p></nav>
{{sections}}
<h2 id="questions">Questions</h2>
<noscript><p>The reader needs JavaScript; tables and figures do not.</p></noscript>
<p>{{n_shown}} Long texts are shortened; the prompt itself is in <code>items.jsonl</code>, the whole answer in
<code>answers/</code>. Scores are of the benchmark's main metric.
Keys: <kbd>&larr;</kbd> <kbd>&rarr;</kbd> question before and after, <kbd>w</kbd> <kbd>l</kbd> wins and losses of the
second model, <kbd>a</kbd> all, <kbd>/</kbd> search.</p>
<div id="filters">
<label>Benchmark <select id="benchmark"></select></label>
<label>Task <select id="task"></select></label>
<label>Model <select id="model"></select></label>
<label>against <select id="other"></select></label>
<label>Result <select id="result"></select></label>
<label>Search <input id="search" type="search" placeholder="id, question or answer"></label>
</div>
<p><button id="before" type="button">Previous</button> <button id="after" type="button">Next</button>
<output id="place" aria-live="polite"></output> <output id="tally"></output></p>
<div id="explorer">
<select id="list" size="24" aria-label="Questions, with the scores of both models"></select>
<article aria-label="Question">
<h3 id="question"></h3>
<table id="facts"></table>
<div id="where"><h4>Where the evidence stands in the prompt</h4>
<div id="bar" role="img"></div><div class="ends"><small>start of the uncut prompt</small><small>end</small></div></div>
<div id="passages"></div>
<div id="answers"></div>
</article>
</div>
<script type="application/json" id="rows">{{rows}}</script>
<script>
"""
    + SCRIPT
    + r"""const {models, rows} = JSON.parse(get("rows").textContent);
let found = rows;

function offer(id, names, labels = names) {
  const before = get(id).value;
  get(id).replaceChildren(...names.map((name, i) => Object.assign(element("option", labels[i]), {value: name})));
  get(id).value = names.includes(before) ? before : names[0];
}

const score = (row, model) => row.by[model] ? row.by[model].score : null;

function result(row) {
  const a = score(row, get("model").value), b = score(row, get("other").value);
  if (a === null) return "none";
  if (!get("other").value) return a >= 100 ? "right" : a > 0 ? "partly" : "wrong";
  if (b === null) return "none";
  return b > a ? "won" : b < a ? "lost" : "tied";
}

function refresh() {
  const pick = (id) => get(id).value;
  const asked = rows.filter((row) => ["", row.benchmark].includes(pick("benchmark")));
  const tasks = new Set(asked.map((row) => row.task));
  offer("task", ["", ...tasks], ["all", ...tasks]);
  const kinds = pick("other")
    ? {all: "all", won: `${pick("other")} wins`, lost: `${pick("other")} loses`, tied: "tied"}
    : {all: "all", right: "full score", partly: "in between", wrong: "score 0"};
  offer("result", Object.keys(kinds), Object.values(kinds));
  const words = pick("search").toLowerCase();
  const said = (row) => Object.values(row.by).map((by) => by.text);
  const text = (row) => [row.id, row.question, ...row.answers, ...said(row)].join("\n").toLowerCase();
  const before = asked.filter((row) => ["", row.task].includes(pick("task")) && text(row).includes(words));
  const count = ([kind, label]) => `${label}: ${before.filter((row) => result(row) === kind).length}`;
  get("tally").textContent = Object.entries(kinds).slice(1).map(count).join(", ");
  found = before.filter((row) => pick("result") === "all" || result(row) === pick("result"));
  const number = (row, model) => score(row, model) === null ? "-" : score(row, model).toFixed(0);
  get("list").replaceChildren(...found.map((row, i) => {
    const both = [pick("model"), pick("other")].filter(Boolean).map((model) => number(row, model)).join(" | ");
    const sign = {won: "+", lost: "\u2212", tied: "="}[result(row)] ?? "";
    const line = element("option", `${sign} ${both}  ${row.task}: ${row.question.slice(0, 120)}`);
    return Object.assign(line, {value: String(i)});
  }));
  show(0);
}

function pane(name, by) {
  const head = element("h4", name);
  if (!by) return element("section", "", head, element("p", "no answer"));
  const facts = Object.entries({...by.scores, prediction: by.prediction ?? "-", ...by.facts});
  const said = facts.map(([name, value]) => `${name.replaceAll("_", " ")}: ${value}`).join(" \u00b7 ");
  const answer = Object.assign(element("pre", by.text), {tabIndex: 0, ariaLabel: `Answer of ${name}`});
  return element("section", "", head, answer, element("small", said));
}

function mark([start, end]) {
  const made = element("i", "");
  made.style.left = `${100 * start}%`;
  made.style.width = `${100 * (end - start)}%`;
  return made;
}

function show(at) {
  const row = found[at = found.length ? (at + found.length) % found.length : 0];
  get("list").selectedIndex = row ? at : -1;
  const name = row ? [row.benchmark, row.task, row.id].join(", ") : "";
  get("place").textContent = row ? `${at + 1} of ${found.length}: ${name}.` : "no such question.";
  get("question").textContent = row ? row.question : "";
  const facts = row ? {"gold answers": row.answers.join(" | "), ...row.facts} : {};
  get("facts").replaceChildren(...Object.entries(facts).map(factLine));
  const marks = row ? row.marks : [];
  get("where").hidden = !marks.length;
  get("bar").replaceChildren(...marks.map(mark));
  const percent = ([start]) => `${(100 * start).toFixed(1)} % of the prompt`;
  get("bar").ariaLabel = `Evidence at ${marks.map(percent).join(", ")}`;
  get("passages").replaceChildren(...(row ? row.evidence : []).map((passage, i) => {
    const place = `${passage.paragraph ? `paragraph ${passage.paragraph}, ` : ""}at ${percent(marks[i])}`;
    const text = element("pre", "", `... ${passage.before}`, element("mark", passage.text), `${passage.after} ...`);
    return element("div", "", element("small", place), Object.assign(text, {tabIndex: 0, ariaLabel: place}));
  }));
  const order = [...new Set([get("model").value, get("other").value, ...models])].filter(Boolean);
  get("answers").replaceChildren(...(row ? order.map((model) => pane(model, row.by[model])) : []));
}

const step = (by) => show(Math.max(0, get("list").selectedIndex) + by);
function only(kind) {
  if (![...get("result").options].some((option) => option.value === kind)) return;
  get("result").value = kind;
  refresh();
}
const benchmarks = [...new Set(rows.map((row) => row.benchmark))];
offer("benchmark", ["", ...benchmarks], ["all", ...benchmarks]);
offer("model", models);
offer("other", ["", ...models], ["no other", ...models]);
if (models.length > 1) get("other").value = models[1];
for (const id of ["benchmark", "task", "model", "other", "result"]) get(id).addEventListener("change", refresh);
get("search").addEventListener("input", refresh);
get("list").addEventListener("change", () => show(get("list").selectedIndex));
get("before").addEventListener("click", () => step(-1));
get("after").addEventListener("click", () => step(1));
onKeys({ArrowLeft: () => step(-1), ArrowRight: () => step(1), w: () => only("won"), l: () => only("lost"),
  a: () => only("all"), "/": () => get("search").focus()});
refresh();
</script>
</body>
</html>
"""
)
