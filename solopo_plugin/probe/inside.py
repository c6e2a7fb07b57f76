"""Look inside a model: where a response's attention goes, and what the long context does to its log-probs.

For a model and rows that build_data.py exported. The prompt but its last token runs with the model's usual attention
into a cache, then what predicts the response, that token and the response but its last, with eager attention over that
cache: the weights of their rows alone exist, a block of them and one layer at a time, and are those of a whole eager
forward.

Shape suffixes: H heads, R response tokens or a block of them, each with the query that predicts it, T tokens of prompt
and response but the last, L layers, G regions.
"""

import gc
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from ..attention import base_of
from ..data import RowError, check_text
from ..evaluation.intervals import mean_interval
from ..host.template import encode_turn
from ..logps import token_logps
from ..qa.files import DataError, as_data_error, excerpt, replacing, write_json
from ..qa.generate.calls import Model, load_chat
from ..qa.generate.local import load_network
from ..qa.pages import png
from ..qa.prompts import BETWEEN, document_spans
from ..qa.recipe import Chat
from ..qa.rows import rows_of_file
from ..qa.window import window_of
from .page import as_html, draw_shares

# evidence: documents of the row's evidence, label, title and text; question: that and the instruction;
# template: system prompt and markers of the chat template; response: its tokens before the one that is predicted
REGIONS = ("evidence", "distractors", "question", "template", "response")
SIDES = {"short": "prompt", "long": "long_prompt"}
RECURRENT = {"linear_attention", "conv", "mamba", "hybrid", "recurrent"}  # of a configuration: these keep a state
BLOCK = 64  # response tokens whose weights exist at a time: 28 heads x 64 x 8,192 keys in fp32 are 59 MB; ours
PER_TOKEN = 2048  # prompt tokens up to which the page colours single tokens, and paragraphs beyond; ours
SAMPLES = 10000  # bootstrap resamples of rows


class Recorder:
    """Wrap a tokenizer, and note each text it encodes with the characters of every token."""

    def __init__(self, tokenizer):
        """Listen to a tokenizer."""
        self.tokenizer, self.pieces = tokenizer, []

    def __getattr__(self, name: str):
        """Be the tokenizer in all else."""
        return getattr(self.tokenizer, name)

    def encode(self, text: str, **settings) -> list[int]:
        """Encode a text and note it."""
        found = self.tokenizer(text, return_offsets_mapping=True, **settings)
        self.pieces.append((text, found["input_ids"], found["offset_mapping"]))
        return found["input_ids"]


def encode_row(tokenizer, template, prompt: str, response: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Put a prompt and a response into the chat template, with the ids of training.

    Returns:
        Ids of the prompt, ids of the response, and for each id of the prompt its first character in `prompt` and the
        one after its last; (0, 0) for what the template adds.

    Raises:
        DataError: The tokenizer does not say which characters a token stands for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets; looking inside needs a fast tokenizer."
        )
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    recorder = Recorder(tokenizer)
    prompt_ids, response_ids = encode_turn(recorder, template, messages)
    if (prompt_ids, response_ids) != encode_turn(tokenizer, template, messages):
        raise DataError(f"{type(tokenizer).__name__} gives other token ids with character offsets than without.")
    for text, ids, offsets in recorder.pieces:
        first = next((i for i in range(len(prompt_ids)) if prompt_ids[i : i + len(ids)] == ids), None)
        if prompt in text and first is not None:
            at, places = text.index(prompt), [(0, 0)] * len(prompt_ids)
            for i, (start, end) in enumerate(offsets, first):
                start, end = max(start - at, 0), min(end - at, len(prompt))
                places[i] = (start, end) if start < end else (0, 0)
            return prompt_ids, response_ids, places
    raise DataError(f"The chat template changes the prompt's text {prompt[:40]!r}; its tokens cannot be told apart.")


def units_of(name: str, prompt: str, evidence: list[dict], n: int) -> list[tuple[int, str]]:
    """Return a prompt's parts in reading order, as (first character, region); a part ends where the next one begins.

    Args:
        name: Of the prompt, for messages.
        prompt: Its text.
        evidence: {"paragraph" from 1, "start", "end"} of each paragraph of the evidence.
        n: Number of documents.

    Raises:
        DataError: The documents cannot be told apart, or the evidence is not in those that it names.
    """
    try:
        numbers = [n, *(place[key] for place in evidence for key in ("paragraph", "start", "end"))]
    except (TypeError, KeyError):
        numbers = [None]
    spans = document_spans(prompt, n) if all(isinstance(number, int) for number in numbers) else None
    if not spans:
        raise DataError(f"{name}: the {n} documents of the prompt cannot be told apart; export the rows once more.")
    for place in evidence:
        number = place["paragraph"]
        if not (0 < number <= n and spans[number - 1][0] <= place["start"] < place["end"] <= spans[number - 1][1]):
            raise DataError(f"{name}: the evidence {place} is not within document {number} of the prompt.")
    shown = {place["paragraph"]: place["end"] for place in evidence}
    start, end = spans[-1]
    if end == len(prompt):  # not our prompt: its question begins behind the next blank line
        end = prompt.find(BETWEEN, shown.get(n, start))
    documents = [(start, "evidence" if i in shown else "distractors") for i, (start, _) in enumerate(spans, 1)]
    return [(0, "question"), *documents, *([(end, "question")] if 0 <= end < len(prompt) else [])]


def unit_of_tokens(prompt: str, places: Sequence[tuple[int, int]], units: list[tuple[int, str]]) -> list[int | None]:
    """Return which part of the prompt each token is in, by its first character that is not blank; None: template."""
    starts = [start for start, _ in units]

    def unit(start: int, end: int) -> int | None:
        if start == end:
            return None
        blank = end - start - len(prompt[start:end].lstrip())
        return bisect_right(starts, start + blank if start + blank < end else start) - 1

    return [unit(*place) for place in places]


@contextmanager
def attention_rows(model: nn.Module, take: Callable[[int, Tensor, Tensor], None]):
    """Let `model` attend eagerly within the context, and give each layer's weights, mean over heads, to `take`.

    Args:
        model: The network, or a LoRA adapter on it.
        take: Called with the layer's index, weights of shape (R, T), fp32, and which of them its mask lets be seen;
            nothing else of them is kept.
    """
    model = base_of(model)
    before = model.config._attn_implementation

    def hook(module, args, keys, output):
        weights_1HRT = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights_1HRT, Tensor) and weights_1HRT.ndim == 4:
            weights_RT, mask = weights_1HRT[0].float().mean(0), keys.get("attention_mask")
            seen_RT = torch.ones_like(weights_RT, dtype=torch.bool).tril(weights_RT.shape[1] - weights_RT.shape[0])
            if isinstance(mask, Tensor) and mask.ndim == 4:  # bool, or what is added to the scores
                mask_RT = mask[0, 0, :, : weights_RT.shape[1]]
                seen_RT = mask_RT if mask.dtype == torch.bool else mask_RT > torch.finfo(mask.dtype).min / 2
                seen_RT = seen_RT ^ ~seen_RT[-1, -1]  # MPT's mask tells what is not seen; a query sees itself
            take(module.layer_idx, weights_RT, seen_RT)
            return (output[0], None, *output[2:])

    found = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in found]
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


def check_attends(base: PreTrainedModel) -> None:
    """Refuse a network with layers that keep a state and have no attention weights.

    Raises:
        DataError: One of its layers is recurrent.
    """
    config = base.config.get_text_config()
    kinds = {kind for key in ("layer_types", "block_types") for kind in getattr(config, key, None) or ()}
    if found := RECURRENT & kinds:
        raise DataError(
            f"{type(base).__name__} has layers without attention weights (`{min(found)}`); give a model that attends "
            "in all layers."
        )


@torch.inference_mode()
def attend(model: nn.Module, prompt_ids: list[int], response_ids: list[int], regions: list[str]) -> dict[str, Tensor]:
    """Measure the attention and the log-probs of a response.

    Args:
        model: The network.
        prompt_ids: The templated prompt.
        response_ids: The response.
        regions: Region of each token of the prompt.

    Returns:
        `shares_LRG`: of the attention of the query that predicts each response token, mean over heads; sums to 1 over
        G, in the order of `REGIONS`, or to less in models with attention sinks, on which the rest falls.
        `uniform_LRG`: the same if it looked at all that the layer lets it see alike. `attention_T`, `uniform_T`: both
        for each token, means over layers, heads and queries. `logps_R`: log-prob of each response token, nats, fp32, as
        solopo_plugin.logps has it.

    Raises:
        DataError: The model shows no attention weights, or has layers without.
    """
    base, n = base_of(model), len(response_ids)
    check_attends(base)
    device = base.device
    region_T = torch.tensor([REGIONS.index(name) for name in (*regions, *["response"] * (n - 1))], device=device)
    member_TG = nn.functional.one_hot(region_T, len(REGIONS)).float()
    attention_T, uniform_T = torch.zeros(2, len(region_T), device=device)
    shares: dict[int, list[Tensor]] = {}
    uniform: dict[int, list[Tensor]] = {}

    def take(layer: int, weights_RT: Tensor, seen_RT: Tensor) -> None:
        alike_RT, width = seen_RT / seen_RT.sum(-1, keepdim=True), weights_RT.shape[1]
        for x_RT, total_T, parts in ((weights_RT, attention_T, shares), (alike_RT, uniform_T, uniform)):
            total_T[:width] += x_RT.sum(0)
            parts.setdefault(layer, []).append(x_RT @ member_TG[:width])

    cache, logits = DynamicCache(), []  # which keeps all positions
    model(torch.tensor([prompt_ids[:-1]], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    queries_R = torch.tensor([prompt_ids[-1], *response_ids[:-1]], device=device)
    with attention_rows(model, take):
        for block_R in queries_R.split(BLOCK):
            logits.append(model(block_R[None], past_key_values=cache, use_cache=True).logits[0])
    if not shares:
        raise DataError(f"{type(base).__name__} shows no attention weights, so there is nothing to look at.")
    by_layer = (torch.stack([torch.cat(parts[layer]) for layer in sorted(parts)]) for parts in (shares, uniform))
    return {
        **dict(zip(("shares_LRG", "uniform_LRG"), by_layer, strict=True)),
        "attention_T": attention_T / len(shares) / n,
        "uniform_T": uniform_T / len(shares) / n,
        "logps_R": token_logps(torch.cat(logits), torch.tensor(response_ids, device=device)),
    }


def look_at_side(model, tokenizer, template, row: dict, side: str) -> tuple[dict, list[int], list[tuple]]:
    """Return what JSON says of one context of a row, the ids of the response, and the prompt's text in `pieces`."""
    prompt, name = row[SIDES[side]], f"row {row['id']!r}, {side} context"
    try:
        for column in (SIDES[side], "chosen"):
            check_text(f"row {row['id']!r}", column, row[column])
    except RowError as error:
        raise DataError(str(error)) from None
    units = units_of(name, prompt, row[f"{side}_evidence"], row[f"{side}_paragraphs"])
    prompt_ids, response_ids, places = encode_row(tokenizer, template, prompt, row["chosen"])
    n, window = len(prompt_ids + response_ids), window_of(base_of(model).config.get_text_config())
    if n > window:
        raise DataError(f"{name}: {n} tokens, and the model's window is {window:g}; choose shorter rows with `--row`.")
    of_token = unit_of_tokens(prompt, places, units)
    regions = ["template" if unit is None else units[unit][1] for unit in of_token]
    found = {key: value.double().cpu() for key, value in attend(model, prompt_ids, response_ids, regions).items()}
    if not all(found[key].isfinite().all() for key in ("logps_R", "shares_LRG")):
        path = getattr(model, "name_or_path", "") or type(model).__name__
        raise DataError(
            f"{name}: {path} gives NaN or infinity as log-probs or attention; are its weights whole, and does its "
            "dtype hold its values?"
        )
    shares_LG, uniform_LG = found["shares_LRG"].mean(1), found["uniform_LRG"].mean(1)
    share, uniform = (dict(zip(REGIONS, x_LG.mean(0).tolist(), strict=True)) for x_LG in (shares_LG, uniform_LG))
    numbers = {
        "tokens": {region: regions.count(region) for region in REGIONS[:-1]} | {"response": len(response_ids)},
        "share": share,
        "uniform": uniform,
        "per_token": {region: share[region] / uniform[region] if uniform[region] else None for region in REGIONS},
        "share_by_layer": dict(zip(REGIONS, shares_LG.T.tolist(), strict=True)),
        "uniform_by_layer": dict(zip(REGIONS, uniform_LG.T.tolist(), strict=True)),
        "evidence_by_token": found["shares_LRG"][:, :, 0].mean(0).tolist(),
        "logps": found["logps_R"].tolist(),
    }
    relative_T = found["attention_T"] / found["uniform_T"]
    return numbers, response_ids, pieces(prompt, places, units, of_token, relative_T.nan_to_num(0))  # 0 / 0: not seen


def pieces(prompt: str, places: list, units: list, of_token: list, relative_T: Tensor) -> list[tuple[str, bool, float]]:
    """Cut a prompt's text into (text, whether evidence, attention per token / uniform), in order.

    A piece is a token, or in prompts of more than `PER_TOKEN` tokens a part of `units_of`.
    """
    own = [i for i, unit in enumerate(of_token) if unit is not None]
    groups = [[i] for i in own]
    if len(own) > PER_TOKEN:
        groups = [group for u in range(len(units)) if (group := [i for i in own if of_token[i] == u])]
    starts = [0, *(places[group[0]][0] for group in groups[1:]), len(prompt)]  # blanks stay with what is before them
    return [
        (prompt[a:b], units[of_token[i[0]]][1] == "evidence", round(float(relative_T[i].mean()), 3))
        for i, a, b in zip(groups, starts, starts[1:], strict=False)
    ]


def look(model, tokenizer, template, row: dict) -> tuple[dict, dict]:
    """Return a row's numbers for JSON and its texts for the page.

    `difference` is log-prob in the long context minus log-prob in the short one, nats per response token.
    """
    found = [look_at_side(model, tokenizer, template, row, side) for side in SIDES]
    (short, ids, short_pieces), (long, long_ids, long_pieces) = found
    if ids != long_ids:
        raise DataError(f"row {row['id']!r}: `chosen` tokenises differently behind the two prompts; check `template`.")
    difference = [after - before for before, after in zip(short["logps"], long["logps"], strict=True)]
    columns = [side[name] for name in ("logps", "evidence_by_token") for side in (short, long)]
    response = [
        (text, *(round(value, 4) for value in values))
        for text, *values in zip(token_texts(tokenizer, ids), *columns, strict=True)
    ]
    numbers = {"id": row["id"], "short": short, "long": long, "difference": difference}
    texts = {"response": response, "short": short_pieces, "long": long_pieces}
    return numbers, {"id": row["id"], "question": row["question"]} | texts


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each token adds; of the tokens of one character the last has it."""
    texts, done = [], 0
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        texts.append("" if whole.endswith("\ufffd") and end < len(ids) else whole[done:])
        done += len(texts[-1])
    return texts


def _number(name: str, region: str, side: dict) -> float | None:
    return side[name][region]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


MEASURES: dict[str, Callable[[dict], float | None]] = {
    **{f"share of attention: {region}": partial(_number, "share", region) for region in REGIONS},
    **{f"attention per token / uniform: {region}": partial(_number, "per_token", region) for region in REGIONS[:3]},
    "evidence's share of what falls on documents": lambda side: _ratio(
        side["share"]["evidence"], side["share"]["evidence"] + side["share"]["distractors"]
    ),
    "attention per token, evidence / distractors": lambda side: _ratio(
        side["per_token"]["evidence"], side["per_token"]["distractors"]
    ),
    "log-prob per response token": lambda side: float(np.mean(side["logps"])),
}


def values_of(looks: dict[str, list[dict]], measures: Sequence[str] = tuple(MEASURES)) -> dict:
    """Measure every row: measure -> model -> side -> a value for each row, None where a row has no number.

    Args:
        looks: By model, the numbers of its rows; all models have the same rows.
        measures: Of `MEASURES`.
    """
    return {
        measure: {
            name: {side: [MEASURES[measure](row[side]) for row in rows] for side in SIDES}
            for name, rows in looks.items()
        }
        for measure in measures
    }


def summarise(values: dict, differences: Sequence[tuple[str, str]] = (), seed: int = 0) -> list[dict]:
    """Average over rows, with 95 % bootstrap intervals.

    Args:
        values: Of `values_of`.
        differences: Pairs of models; of (b, a) the first minus the second, row by row, is a model `b - a`, too.
        seed: Of the resamples.

    Returns:
        {"model", "measure", "side": short, long or long - short, "n", "mean", "low", "high"}. Rows without a number,
        such as a ratio to no distractors, are left out.
    """
    lines = []
    for measure, by_model in values.items():
        series = {}
        for name, sides in by_model.items():
            short, long = (np.array(sides[side], dtype=float) for side in SIDES)
            series[name] = {"short": short, "long": long, "long - short": long - short}
        for b, a in differences:
            series[f"{b} - {a}"] = {side: series[b][side] - series[a][side] for side in series[a]}
        for name, side, of_rows in ((name, *pair) for name, sides in series.items() for pair in sides.items()):
            if len(kept := of_rows[~np.isnan(of_rows)]):
                mean, low, high = mean_interval([kept], SAMPLES, np.random.default_rng(seed))
                line = {"model": name, "measure": measure, "side": side, "n": len(kept)}
                lines.append(line | {"mean": mean, "low": low, "high": high})
    return lines


def read_rows(path: Path, names: Sequence[str], n: int) -> list[dict]:
    """Read the rows of those questions, or else `n` rows spread evenly over the file.

    Raises:
        DataError: No such file, no export of ours, no such row, or no row at all.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path} is no .jsonl or .parquet file; give one that scripts/build_data.py exported.")
    ids = [row["id"] for row in rows_of_file(path)]
    if missing := set(names) - set(ids):
        raise DataError(f"{path} has no row {min(missing)!r}; its first is {ids[0] if ids else None!r}.")
    spread = {i * len(ids) // n for i in range(n)}
    chosen = {i for i, name in enumerate(ids) if name in names} if names else spread
    rows = [row for i, row in enumerate(rows_of_file(path)) if i in chosen]
    if not rows:
        raise DataError(f"{path} gives no row; `--n` must be 1 or more, and the file must hold rows.")
    return rows


def load(path: str, below: str | None = None, trust_remote_code: bool = False) -> tuple[nn.Module, str]:
    """Load a model by hub name or folder, or a LoRA adapter's folder on its base; also return the name of the base.

    Args:
        path: Hub name or folder.
        below: The model below an adapter, in place of the one that it names.
        trust_remote_code: The host's key.

    Raises:
        DataError: There is no such model.
    """
    adapter, base = Path(path) / "adapter_config.json", path
    try:
        if adapter.is_file():
            base = below or json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = load_network(Model(base, path if adapter.is_file() else None), trust_remote_code)
    except DataError:
        raise
    except Exception as error:  # whatever the hub, the disk or the model's own code raised: the name is what helps
        raise DataError(f"No model can be loaded from {path}: {type(error).__name__} {excerpt(error)}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), base


def run(
    models: dict[str, str], rows: list[dict], output: Path, template: str, below: str | None = None, **chat
) -> dict:
    """Look at all rows with all models, and write look.json, shares_by_layer.png and index.html.

    Args:
        models: Name -> hub name or folder; one, or two to be compared.
        rows: As `read_rows` gives them.
        output: Folder to write to.
        template: The host's chat template, as in training.
        below: See `load`.
        **chat: Other arguments of `load_template`, as in training.

    Returns:
        What look.json holds.

    Raises:
        DataError: `output` cannot be written to, a model cannot be loaded or looked into.
    """
    with as_data_error(output, "write"):  # before the work, not behind it
        output.mkdir(parents=True, exist_ok=True)
    looks, shown = {}, {}
    for name, path in models.items():
        model, base = load(path, below, chat.get("trust_remote_code", False))
        tokenizer, chat_template = load_chat(base, Chat(template=template, **chat))
        with tqdm(rows, name, unit="row") as bar:
            found = [look(model, tokenizer, chat_template, row) for row in bar]
        looks[name], shown[name] = map(list, zip(*found, strict=True))
        del model
        gc.collect()
        torch.cuda.empty_cache()  # the next model needs the memory
    first, *others = models
    summary = summarise(values_of(looks), [(name, first) for name in others])
    result = {"models": models, "template": template, "summary": summary, "rows": looks}
    picture = png(draw_shares(looks))
    write_json(output / "look.json", result)
    text = as_html(result, shown, picture).encode("utf-8", "replace")
    for file_name, content in (("shares_by_layer.png", picture), ("index.html", text)):
        with replacing(output / file_name) as file:
            file.write(content)
    return result
