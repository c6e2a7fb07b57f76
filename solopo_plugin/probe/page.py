"""Show what inside.py finds: shares of attention by layer as a figure, and a page with the texts as heat maps."""

import numpy as np
from matplotlib.figure import Figure

from ..qa.pages import render

CAPTION = (
    "Top: share of attention by layer, of what predicts the response, mean over heads, tokens and rows. Bottom: the "
    "same per token, 1 being attention that falls alike on all tokens that a layer sees. A second model is dashed."
)
LIMIT = 2.0  # nats: a token's log-prob difference that is coloured fully; ours


def draw_shares(looks: dict[str, list[dict]]) -> Figure:
    """Draw shares by layer above evidence against distractors per token; short context left, long context right."""
    made = Figure(figsize=(10, 6.4), layout="constrained")
    panels = made.subplots(2, 2, sharex=True, sharey="row")
    for style, rows in zip(("-", "--"), looks.values(), strict=False):
        for column, side in enumerate(("short", "long")):
            for i, region in enumerate(rows[0][side]["share_by_layer"]):
                line = dict(linestyle=style, color=f"C{i}", label=region if (style, column) == ("-", 0) else None)
                layers, alike = (
                    np.array([row[side][f"{name}_by_layer"][region] for row in rows]) for name in ("share", "uniform")
                )
                panels[0, column].plot(np.mean(layers, 0), **line)
                if region in ("evidence", "distractors") and alike.any():
                    per_token = layers / np.ma.masked_equal(alike, 0)  # of rows and layers that see such a token
                    panels[1, column].plot(per_token.mean(0), **line | {"label": None})
            panels[0, column].set(title=f"{side} context", ylim=(0, 1))
            panels[1, column].axhline(1, color="grey", linewidth=0.8)
            panels[1, column].set(xlabel="layer")
            panels[1, column].xaxis.get_major_locator().set_params(integer=True)
    panels[0, 0].set(ylabel="share of attention")
    panels[1, 0].set(ylabel="attention per token / uniform", ylim=(0, None))  # when all is drawn: it ends the scaling
    made.legend(loc="outside right upper")
    return made


def as_html(result: dict, shown: dict[str, list[dict]], picture: bytes) -> str:
    """Return the page.

    Args:
        result: What look.json holds.
        shown: By model, the texts of its rows.
        picture: The figure of `draw_shares` as a PNG.
    """
    summary: dict[str, dict] = {}  # measure -> model -> side -> the line
    for line in result["summary"]:
        summary.setdefault(line["measure"], {}).setdefault(line["model"], {})[line["side"]] = line
    return render(
        "probe/templates/inside", title="Looking inside", models=result["models"], summary=summary,
        sides=("short", "long", "long - short"), picture=picture, caption=CAPTION,
        rows={"looks": shown, "limit": LIMIT},
    )  # fmt: skip
