const {models, rows} = JSON.parse(get("rows").textContent);
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
