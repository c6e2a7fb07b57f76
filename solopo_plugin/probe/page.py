"""Pictures of inside.py's findings: shares of attention by layer as a PNG, and a page with the texts as heat maps."""

import html

import numpy as np
from matplotlib.figure import Figure

from ..qa.pages import HEAD, SCRIPT, embed, fill, image, png

__all__ = ["figure", "page", "png"]
CAPTION = (
    "Top: share of the response tokens' attention by layer, mean over heads, tokens and rows. Bottom: the same per "
    "token, 1 being attention that falls on all tokens alike. A second model is dashed."
)
LIMIT = 2.0  # nats: a token's log-prob difference that is coloured fully; ours


def figure(looks: dict[str, list[dict]]) -> Figure:
    """Shares by layer, and evidence against distractors per token; short context left, long context right."""
    made = Figure(figsize=(10, 6.4), layout="constrained")
    panels = made.subplots(2, 2, sharex=True, sharey="row")
    for style, rows in zip(("-", "--"), looks.values(), strict=False):
        for column, side in enumerate(("short", "long")):
            for i, region in enumerate(rows[0][side]["share_by_layer"]):
                line = dict(linestyle=style, color=f"C{i}", label=region if (style, column) == ("-", 0) else None)
                layers = [np.array(row[side]["share_by_layer"][region]) for row in rows]
                uniform = [row[side]["uniform"][region] for row in rows]
                per_token = [values / alike for values, alike in zip(layers, uniform, strict=True) if alike]
                panels[0, column].plot(np.mean(layers, 0), **line)
                if region in ("evidence", "distractors") and per_token:
                    panels[1, column].plot(np.mean(per_token, 0), **line | {"label": None})
            panels[0, column].set(title=f"{side} context", ylim=(0, 1))
            panels[1, column].axhline(1, color="grey", linewidth=0.8)
            panels[1, column].set(xlabel="layer", ylim=(0, None))
            panels[1, column].xaxis.get_major_locator().set_params(integer=True)
    panels[0, 0].set(ylabel="share of attention")
    panels[1, 0].set(ylabel="attention per token / uniform")
    made.legend(loc="outside right upper")
    return made


def summary_table(lines: list[dict]) -> str:
    """Measures by context, one line per model and measure; 95 % intervals in brackets."""
    sides = ("short", "long", "long - short")
    cells = {(line["measure"], line["model"], line["side"]): line for line in lines}
    head = "".join(f"<th scope=col>{name}</th>" for name in ("measure", "model", *sides))
    made, before = [], None
    for measure, model in dict.fromkeys((line["measure"], line["model"]) for line in lines):
        found = (cells.get((measure, model, side)) for side in sides)
        shown = (f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" if c else "-" for c in found)
        names = f"<th scope=row>{html.escape(measure) if measure != before else ''}</th><td>{html.escape(model)}</td>"
        made.append(f"<tr>{names}{''.join(f'<td class=number>{text}</td>' for text in shown)}</tr>")
        before = measure
    return f"<div class=wide><table><tr>{head}</tr>{''.join(made)}</table></div>"


def page(result: dict, shown: dict[str, list[dict]], picture: bytes) -> str:
    """The HTML page; everything that comes from the data is escaped."""
    names = ", ".join(f"{name}: {path}" for name, path in result["models"].items())
    return fill(PAGE, {
        "models": html.escape(names), "n": str(len(next(iter(shown.values())))), "limit": f"{LIMIT:g}",
        "summary": summary_table(result["summary"]), "picture": image(picture, CAPTION), "looks": embed(shown),
    })  # fmt: skip


PAGE = (
    HEAD.replace("{{title}}", "Looking inside")
    + r"""#short, #long { height: 34rem; } #response { max-height: 22rem; }
.wide { overflow-x: auto; } .number { white-space: nowrap; }
.evidence { border-bottom: 3px solid #0a7d28; } pre span { border-radius: 2px; }
</style>
</head>
<body>
<h1>Looking inside</h1>
<p>{{models}}. Rows: {{n}}. Means over rows, 95 % bootstrap intervals in brackets.</p>
{{summary}}
{{picture}}
<h2 id="reader">Rows</h2>
<noscript><p>The texts need JavaScript; the figures above do not.</p></noscript>
<p>
<label>Model <select id="model"></select></label>
<button id="before" type="button">Previous</button> <button id="after" type="button">Next</button>
<output id="place" aria-live="polite"></output>
<kbd>&larr;</kbd> <kbd>&rarr;</kbd> row before and after. Point at a piece of text for its numbers.
</p>
<h3 id="question"></h3>
<h4>Chosen response: log-prob in the long context minus log-prob in the short one</h4>
<p>Red: less likely in the long context; blue: more likely; full colour from {{limit}} nats.</p>
<pre id="response" tabindex="0" aria-label="Chosen response"></pre>
<p>Contexts: the darker, the more attention a piece gets per token, in full colour where it gets twice the context's
mean or belongs to its highest 2 %. Evidence is underlined in green.</p>
<div class="panes">
<section><h4>Short context</h4><pre id="short" tabindex="0" aria-label="Short context"></pre></section>
<section><h4>Long context</h4><pre id="long" tabindex="0" aria-label="Long context"></pre></section>
</div>
<script type="application/json" id="looks">{{looks}}</script>
<script>
"""
    + SCRIPT
    + r"""const looks = JSON.parse(get("looks").textContent), limit = {{limit}};
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
</script>
</body>
</html>
"""
)
