const rows = JSON.parse(get("rows").textContent);
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
