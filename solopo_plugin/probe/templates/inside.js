const {looks, limit} = JSON.parse(get("rows").textContent);
let at = 0;

function coloured(text, colour, note) {
  const made = element("span", text);
  made.style.background = colour;
  made.title = note;
  return made;
}

function show(place) {
  const rows = looks[get("model").value];
  at = (place + rows.length) % rows.length;
  const row = rows[at];
  get("place").textContent = `${at + 1} of ${rows.length}: ${row.id}`;
  get("question").textContent = row.question;
  get("response").replaceChildren(...row.response.map(([text, short, long, inShort, inLong]) => {
    const change = long - short, strength = Math.min(1, Math.abs(change) / limit);
    const note = `log-prob ${short.toFixed(3)} short, ${long.toFixed(3)} long (${change.toFixed(3)}); `
      + `on evidence ${(100 * inShort).toFixed(1)} % short, ${(100 * inLong).toFixed(1)} % long`;
    return coloured(text, `rgb(${change < 0 ? "220 40 40" : "40 90 220"} / ${(0.8 * strength).toFixed(3)})`, note);
  }));
  for (const side of ["short", "long"]) {
    const values = row[side].map((piece) => piece[2]).sort((a, b) => a - b);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const full = Math.max(2 * mean, values[Math.floor(0.98 * (values.length - 1))], 1e-9);
    get(side).replaceChildren(...row[side].map(([text, evidence, value]) => {
      const strength = 0.85 * Math.min(1, value / full);
      const made = coloured(text, `rgb(240 140 0 / ${strength.toFixed(3)})`, `${value} times uniform`);
      made.className = evidence ? "evidence" : "";
      return made;
    }));
    get(side).scrollTop = 0;
  }
}

get("model").append(...Object.keys(looks).map((name) => element("option", name)));
get("model").addEventListener("change", () => show(at));
get("before").addEventListener("click", () => show(at - 1));
get("after").addEventListener("click", () => show(at + 1));
onKeys({ArrowLeft: () => show(at - 1), ArrowRight: () => show(at + 1)});
show(0);
