"""Looking inside: weights of a whole eager forward, shares that are known beforehand, texts that are whole."""

import html
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "tests" / "qa"))
import look_inside
from small_work import make_row

from solopo_plugin.host.template import encode_prompt, load_template
from solopo_plugin.logps import IGNORE, predicting_positions, response_logps
from solopo_plugin.probe import inside
from solopo_plugin.probe.inside import REGIONS, attend, encode_row, look, token_texts, unit_of_tokens, units_of
from solopo_plugin.probe.page import as_html, draw_shares
from solopo_plugin.qa.files import DataError, write_jsonl
from solopo_plugin.qa.rows import write_parquet
from solopo_plugin.qa.window import window_of

TEMPLATES = {"qwen2": "qwen", "llama": "llama3", "mistral": "qwen", "gemma2": "qwen"}
SHAPES = {  # what attends in another way: a window shorter than the prompt, a soft cap on the scores
    "llama": {"bos": "<|begin_of_text|>"},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "head_dim": 16, "query_pre_attn_scalar": 16},
}
# float32. A weight is exp of a score below 8 in size, known to 2^-23 of that: 1e-6 relative, and so is a share, at
# most 1, from either kernel. A log-prob near 7 nats comes of logits below 10: 4e-6 (test_losses.py) from either kernel,
# and as much again for each of the two layers before them.
SHARES, LOGPS = 2e-6, 2e-5
OF_DOCUMENTS, RATIO = "evidence's share of what falls on documents", "attention per token, evidence / distractors"


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """Factory: model, tokenizer and template of an architecture."""

    def make(architecture: str = "qwen2", **changes):
        path = tiny_model(architecture, **SHAPES.get(architecture, {}), **changes)
        return inside.load(path)[0], *load_template(path, TEMPLATES[architecture])

    return make


def member(regions: list[str], n: int) -> torch.Tensor:
    return torch.tensor([[g == name for g in REGIONS] for name in (*regions, *["response"] * n)])


# ---- numbers


@pytest.mark.parametrize("architecture", TEMPLATES)
@pytest.mark.parametrize("side", ["short", "long"])
def test_equal_to_a_whole_eager_forward(tiny, monkeypatch, architecture, side):
    """In blocks of 5 rows over a cache, against all weights of one eager forward and `response_logps` of its logits."""
    monkeypatch.setattr(inside, "BLOCK", 5)
    model, tokenizer, template = tiny(architecture)
    row = make_row(3)
    prompt_ids, response_ids, _ = encode_row(tokenizer, template, row[inside.SIDES[side]], row["chosen"])
    n_prompt, n = len(prompt_ids), len(response_ids)
    assert n > 2 * inside.BLOCK and n % inside.BLOCK
    regions = [REGIONS[i * 4 // n_prompt] for i in range(n_prompt)]
    before = model.config._attn_implementation
    found = attend(model, prompt_ids, response_ids, regions)
    assert model.config._attn_implementation == before and not any(m._forward_hooks for m in model.modules())

    whole = AutoModelForCausalLM.from_pretrained(model.name_or_path, attn_implementation="eager").eval()
    ids = torch.tensor([prompt_ids + response_ids])
    with torch.inference_mode():
        output = whole(ids, output_attentions=True)
    predicting = slice(n_prompt - 1, -1)  # each token of the response is predicted by the one before it
    weights_LRT = torch.stack([layer[0].double().mean(0)[predicting, :-1] for layer in output.attentions])
    shares_LRG = weights_LRT @ member(regions, n - 1).double()
    assert torch.allclose(found["shares_LRG"].double(), shares_LRG, rtol=0, atol=SHARES)
    assert torch.allclose(found["shares_LRG"].sum(-1), torch.ones(()), rtol=0, atol=SHARES)
    assert torch.allclose(found["attention_T"].double(), weights_LRT.mean((0, 1)), rtol=0, atol=SHARES)
    labels = torch.full_like(ids, IGNORE)
    labels[:, n_prompt:] = ids[:, n_prompt:]
    positions = predicting_positions(labels)
    total, count = response_logps(output.logits[:, positions], labels, positions)
    assert count.item() == n == len(found["logps_R"])
    assert found["logps_R"].sum().item() == pytest.approx(total.item(), rel=0, abs=n * LOGPS)
    each = output.logits[0, positions].double().log_softmax(-1).gather(-1, ids[0, n_prompt:, None])[:, 0]
    assert torch.allclose(found["logps_R"].double(), each, rtol=0, atol=LOGPS)


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gemma2"])
def test_uniform_attention_gives_counts_of_tokens(tiny, architecture):
    """Without queries all scores are 0: the share of a region is its share of the tokens that a layer lets be seen."""
    model, tokenizer, template = tiny(architecture)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name:
                weight.zero_()
    numbers, texts = look(model, tokenizer, template, make_row(1))
    for side in ("short", "long"):
        found = numbers[side]
        far = architecture == "mistral"  # all of its layers have a window, which ends before the documents
        assert {value for _, _, value in texts[side]} == ({0.0, 1.0} if far else {1.0}), "the page has the same measure"
        seen = {region: value for region, value in found["per_token"].items() if value is not None}
        assert seen == pytest.approx(dict.fromkeys(seen, 1.0), abs=1e-4) and ("evidence" in seen) != far
        assert found["share"] == pytest.approx(found["uniform"], abs=SHARES)
        assert inside.MEASURES[RATIO](found) == (None if far else pytest.approx(1, abs=1e-4))
        if architecture != "qwen2":
            continue
        tokens = found["tokens"]
        n = tokens.pop("response")
        for region, count in tokens.items():
            want = sum(count / (sum(tokens.values()) + i) for i in range(n)) / n
            assert found["share"][region] == pytest.approx(want, abs=SHARES)
        want = tokens["evidence"] / (tokens["evidence"] + tokens["distractors"])
        assert inside.MEASURES[OF_DOCUMENTS](found) == pytest.approx(want, abs=SHARES)


def test_attention_on_chosen_tokens_gives_its_softmax(tiny):
    """One layer whose score is log 100 for one token of the vocabulary and 0 for all others.

    Token 7's normed embedding is sqrt(H) in dimension 0, all others' in dimension 1. The key's last dimension is the
    first of these; rope turns it by less than 1e-9 with so slow a base. The query's last dimension is a constant bias.
    """
    model, *_ = tiny(num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 1e14})
    attention, d = model.model.layers[0].self_attn, model.config.hidden_size
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj):
            part.weight.zero_()
            part.bias.zero_()
        model.model.embed_tokens.weight.zero_()[:, 1] = 1
        model.model.embed_tokens.weight[7, :2] = torch.tensor([1.0, 0.0])
        head = attention.head_dim
        attention.k_proj.weight[head - 1 :: head, 0] = d**-0.5
        attention.q_proj.bias[head - 1 :: head] = math.log(100) / attention.scaling
    prompt = [7 if i in (3, 4, 20) else 9 for i in range(30)]
    regions = ["evidence" if token == 7 else "distractors" for token in prompt]
    found = attend(model, prompt, [11, 12, 13], regions)
    want = [300 / (300 + 27 + i) for i in (0, 1, 2)]
    assert found["shares_LRG"][0, :, 0].tolist() == pytest.approx(want, abs=1e-4)


def test_a_mask_of_what_is_not_seen():
    config = AutoConfig.for_model("mpt", d_model=32, n_heads=2, n_layers=2, vocab_size=30, max_seq_len=64)
    found = attend(AutoModelForCausalLM.from_config(config).eval(), [3, 4, 5], [6, 7], ["evidence", *["template"] * 2])
    assert found["uniform_LRG"][:, :, 0].tolist() == [pytest.approx([1 / 3, 1 / 4])] * 2


HYBRID = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)


@pytest.mark.parametrize(
    "architecture, kind",
    [
        ("qwen3_5_text", "linear_attention"),
        ("falcon_h1", "hybrid"),
        ("jamba", "mamba"),
        ("recurrent_gemma", "recurrent"),
    ],
)
def test_layers_without_attention_are_refused(architecture, kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, vocab_size=30, **HYBRID))
    with pytest.raises(DataError, match=rf"has layers without attention weights \(`{kind}`\); give a model that"):
        attend(model, [3, 4], [5], ["template", "template"])


def test_the_same_context_twice_changes_nothing(tiny):
    row = make_row(2)
    row |= {"long_prompt": row["prompt"], "long_evidence": row["short_evidence"], "long_paragraphs": 4}
    numbers, _ = look(*tiny(), row)
    assert numbers["difference"] == [0.0] * len(numbers["difference"])
    assert numbers["short"] == numbers["long"]
    other, _ = look(*tiny(), make_row(2))
    assert any(other["difference"])


# ---- texts


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(min_size=1, max_size=60).filter(str.strip), response=st.text(min_size=1, max_size=40).filter(str.strip)
)
def test_offsets_are_of_the_ids_of_training(tiny_chat, text, response):
    """For any text: ids of `encode_prompt`, offsets in reading order, and what they leave out is not of the prompt."""
    tokenizer, template = tiny_chat
    prompt_ids, response_ids, places = encode_row(tokenizer, template, text, response)
    assert prompt_ids == encode_prompt(tokenizer, template, text) and len(places) == len(prompt_ids)
    own = [place for place in places if place != (0, 0)]
    assert own == sorted(own) and own[0][0] == 0 and own[-1][1] == len(text)
    assert {i for start, end in own for i in range(start, end)} == set(range(len(text)))
    assert "".join(token_texts(tokenizer, response_ids)) == tokenizer.decode(response_ids)


@pytest.fixture(scope="module")
def tiny_chat(tiny_model):
    return load_template(tiny_model(), "qwen")


def test_tokens_of_each_part(tiny_chat):
    """Tokens of the evidence are those that tokenising its documents by hand gives, to the token at either edge."""
    row = make_row(5)
    prompt = row["long_prompt"]
    units = units_of("row", prompt, row["long_evidence"], 12)
    true = {place["paragraph"] for place in row["long_evidence"]}
    regions = ["evidence" if i in true else "distractors" for i in range(1, 13)]
    assert [region for _, region in units] == ["question", *regions, "question"]
    texts = [prompt[a:b] for (a, _), (b, _) in zip(units, [*units[1:], (len(prompt), "")], strict=True)]
    assert texts[0] == "Read.\n\n" and texts[-1].lstrip().startswith("Question: ")
    assert all(text.startswith(f"Document {i}: ") for i, text in enumerate(texts[1:-1], 1))
    _, _, places = encode_row(*tiny_chat, prompt, row["chosen"])
    of_token = unit_of_tokens(prompt, places, units)
    for u, text in enumerate(texts):
        shown = "".join(prompt[a:b] for (a, b), v in zip(places, of_token, strict=True) if v == u)
        assert shown.strip() == text.strip()


def test_a_token_across_an_edge_goes_with_its_first_letter():
    """`\n\nc` belongs to what begins with `c`, a blank token to what it begins in, and (0, 0) to the template."""
    places = [(0, 2), (2, 4), (2, 5), (1, 3), (4, 6), (0, 0)]
    assert unit_of_tokens("ab\n\ncd", places, [(0, "question"), (4, "evidence")]) == [0, 0, 1, 0, 1, None]


def test_a_question_behind_another_prompt_is_no_document():
    prompt = "Document 1: A\nText one.\n\nDocument 2: B\nText two.\n\nNow tell: why?"
    start = prompt.index("Text two")
    for evidence in ([], [{"paragraph": 2, "start": start, "end": start + 9}]):
        units = units_of("row", prompt, evidence, 2)
        assert units[-1] == (prompt.index("\n\nNow"), "question") and len(units) == 4


@pytest.mark.parametrize("per_token", [0, 10**6])
def test_the_page_shows_the_whole_prompt(tiny, monkeypatch, per_token):
    monkeypatch.setattr(inside, "PER_TOKEN", per_token)
    row = make_row(4, chosen="Größe \U0001f600 zählt. The answer is: 東京")
    _, shown = look(*tiny(), row)
    assert len(shown["short"]) == 6 if per_token == 0 else len(shown["short"]) > 40
    for side, column in inside.SIDES.items():
        assert "".join(text for text, *_ in shown[side]) == row[column]
        marked = "".join(text for text, evidence, _ in shown[side] if evidence)
        assert all(row[column][p["start"] : p["end"]] in marked for p in row[f"{side}_evidence"])
    assert "".join(text for text, *_ in shown["response"]) == row["chosen"] + "<|im_end|>\n"


# ---- the command

KEYS = {"share", "uniform", "uniform_by_layer", "per_token", "tokens", "share_by_layer", "logps", "evidence_by_token"}


def command(rows, out, model, *words) -> int:
    return look_inside.main(
        [str(model), "--template", "qwen", "--rows", str(rows), "--out", str(out), *map(str, words)]
    )


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "toy_solopo.jsonl"
    write_jsonl(path, [make_row(i) for i in range(5)] + [make_row(5, question="</script><b id=bad>why?")])
    return path


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """A LoRA adapter that changes much."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def test_the_picture_shows_every_line_whole():
    """Draw the highest line last, on the long context."""
    alike = {"evidence": [0.2, 0.2], "distractors": [0.0, 0.2]}  # no distractor is seen in the first layer
    sides = {
        side: {"share_by_layer": {"evidence": [0.1, share], "distractors": [0.0, 0.1]}, "uniform_by_layer": alike}
        for side, share in (("short", 0.1), ("long", 0.9))
    }
    panel = draw_shares({"base": [sides]}).axes[3]
    highest = max(max(line.get_ydata()) for line in panel.lines)
    assert highest == pytest.approx(4.5) and panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > highest


def test_base_and_adapter_side_by_side(rows_file, tiny_model, adapter, tmp_path, capsys):
    assert command(rows_file, tmp_path, tiny_model(), "--n", 3, "--compare", adapter) == 0
    said = capsys.readouterr().out
    assert f"The page is {tmp_path / 'index.html'}; every number: {tmp_path / 'look.json'}" in said
    found = json.loads((tmp_path / "look.json").read_text())
    base, trained = (found["rows"][Path(name).name] for name in (tiny_model(), adapter))
    assert [row["id"] for row in base] == [row["id"] for row in trained] == ["q0", "q2", "q4"]
    for a, b in zip(base, trained, strict=True):
        assert KEYS <= a["short"].keys() and a["short"]["tokens"] == b["short"]["tokens"]
        assert a["short"]["logps"] != pytest.approx(b["short"]["logps"], abs=1e-3)
        assert a["difference"] == pytest.approx(
            [y - x for x, y in zip(a["short"]["logps"], a["long"]["logps"], strict=True)]
        )
        assert sum(a["long"]["share"].values()) == pytest.approx(1, abs=SHARES)
    lines = {(line["model"], line["measure"], line["side"]): line for line in found["summary"]}

    def mean(rows: list[dict], side: str) -> float:
        return sum(inside.MEASURES[OF_DOCUMENTS](row[side]) for row in rows) / 3

    shown = [line for line in found["summary"] if f"{line['mean']:.4f}" in said and line["measure"] in said]
    table = [line for line in said.splitlines() if not line.startswith("[")]  # without what the host logs, if it does
    assert len(shown) >= len(table) - 2 >= 9
    pair = lines[f"{adapter.name} - {Path(tiny_model()).name}", OF_DOCUMENTS, "long"]
    assert pair["mean"] == pytest.approx(mean(trained, "long") - mean(base, "long"))
    assert pair["low"] <= pair["mean"] <= pair["high"] and pair["n"] == 3
    change = lines[Path(tiny_model()).name, OF_DOCUMENTS, "long - short"]["mean"]
    assert change == pytest.approx(mean(base, "long") - mean(base, "short"))
    assert (tmp_path / "shares_by_layer.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_by_name_and_nothing_of_them_is_run(rows_file, tiny_model, tmp_path):
    assert command(rows_file, tmp_path, tiny_model(), "--row", "q5", "--row", "q1") == 0
    text = (tmp_path / "index.html").read_text()
    assert "</script><b" not in text and "\\u003c/script\\u003e\\u003cb id=bad\\u003ewhy?" in text
    assert html.escape(tiny_model()) in text and "default-src 'none'" in text and "{{" not in text
    assert [row["id"] for row in json.loads((tmp_path / "look.json").read_text())["rows"][Path(tiny_model()).name]] == [
        "q1",
        "q5",
    ]


@pytest.mark.parametrize("rows, n", [(39, 20), (40, 20), (40, 3), (3, 20), (5, 1)])
def test_rows_are_spread_evenly(rows, n, tmp_path):
    """As many as asked for, where there are so many, from the first to the last part of the file."""
    write_jsonl(tmp_path / "rows.jsonl", [make_row(i) for i in range(rows)])
    found = [int(row["id"][1:]) for row in inside.read_rows(tmp_path / "rows.jsonl", (), n)]
    gaps = {after - before for before, after in zip(found, [*found[1:], rows], strict=True)}
    assert len(found) == min(n, rows) and found[0] == 0 and max(gaps) - min(gaps) <= 1


def test_a_cell_of_fewer_rows_says_so():
    """A ratio of two rows of three, in the page's table."""
    lines = [
        {"model": "m", "measure": measure, "side": "short", "n": n, "mean": 2.0, "low": 1.0, "high": 3.0}
        for measure, n in (("ratio", 2), ("share", 3))
    ]
    page = as_html({"models": {"m": "x"}, "summary": lines}, {"m": [{}, {}, {}]}, b"")
    assert "Rows: 3." in page and ">2.000 [1.000, 3.000], n=2</td>" in page and ">2.000 [1.000, 3.000]</td>" in page


def test_parquet_rows_and_rows_without_distractors(tiny_model, tmp_path):
    """No distractor in the short context: no ratio of it, and none is counted."""
    row = make_row(0)
    prompt = "Document 1: Person 0\nPerson 0 works for firm 0.\n\nQuestion: where?"
    start = prompt.index("Person 0 works")
    row |= {
        "prompt": prompt,
        "short_paragraphs": 1,
        "short_evidence": [{"paragraph": 1, "start": start, "end": start + 26}],
    }
    write_parquet(tmp_path / "rows.parquet", [row])
    assert command(tmp_path / "rows.parquet", tmp_path, tiny_model()) == 0
    found = json.loads((tmp_path / "look.json").read_text())
    side = found["rows"][Path(tiny_model()).name][0]["short"]
    assert side["per_token"]["distractors"] is None
    assert inside.MEASURES[RATIO](side) is None and inside.MEASURES[OF_DOCUMENTS](side) == 1
    sides = {line["side"] for line in found["summary"] if line["measure"] == RATIO}
    assert sides == {"long"}


def bad_rows(folder: Path, **changes) -> Path:
    path = folder / "bad.jsonl"
    write_jsonl(path, [make_row(0, **changes)])
    return path


def not_parquet(folder: Path) -> Path:
    (folder / "x.parquet").write_text("x")
    return folder / "x.parquet"


OUTSIDE = [{"paragraph": 1, "start": 0, "end": 9999}]
NO_FILE = "Cannot read {f}/none.jsonl: there is no such file or folder; check the path."
BAD = {  # the file, more words of the command, and how the sentence begins
    "no file": (lambda f: f / "none.jsonl", "", NO_FILE),
    "no rows of ours": (
        lambda f: ROOT / "data/demo_solopo.jsonl",
        "",
        "{root}/data/demo_solopo.jsonl lacks the column",
    ),
    "another kind": (lambda f: ROOT / "README.md", "", "{root}/README.md is no .jsonl or .parquet file; give one"),
    "no parquet": (not_parquet, "", "{f}/x.parquet is no parquet file that can be read ("),
    "no such row": (bad_rows, "--row q9", "{f}/bad.jsonl has no row 'q9'; its first is 'q0'."),
    "no row": (bad_rows, "--n 0", "{f}/bad.jsonl gives no row; `--n` must be 1 or more, and"),
    "no model": (bad_rows, "--compare /no/model", "No model can be loaded from /no/model: "),
    "no template": (bad_rows, "--template qwem", "`template: qwem` is no template of the host; did you mean `qwen`?"),
    "no such template": (bad_rows, "--template x", "`template: x` is no template of the host; LLaMA-Factory's README"),
    "wrong place": (lambda f: bad_rows(f, long_evidence=OUTSIDE), "", "row 'q0', long context: the evidence {{"),
    "no text": (
        lambda f: bad_rows(f, chosen=None),
        "",
        "row 'q0': column `chosen` must be a string, got NoneType",
    ),
    "no numbers": (lambda f: bad_rows(f, short_evidence=[{}]), "", "row 'q0', short context: the 4 documents of the"),
    "no evidence": (lambda f: bad_rows(f, short_evidence=None), "", "row 'q0', short context: the 4 documents of the"),
    "no documents": (lambda f: bad_rows(f, prompt="Why?"), "", "row 'q0', short context: the 4 documents of the"),
    "too long": (lambda f: bad_rows(f, chosen="word and " * 9000), "", "row 'q0', short context: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, tiny_model, tmp_path, capsys):
    make, words, sentence = BAD[case]
    assert command(make(tmp_path), tmp_path / "out", tiny_model(), *words.split()) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert line.startswith("Error: " + sentence.format(f=tmp_path, root=ROOT)), line


@pytest.mark.parametrize(
    "given, sentence",
    [
        (("",), "A model's name is empty, got ''; give a folder or a hub name."),
        (("a/b", " "), "A model's name is empty, got ' '; give a folder or a hub name."),
        (("saves/x", "saves/x/"), "`--compare saves/x/` is the first model itself; give another one, or leave it out."),
        (("a/b", "./saves/x"), "No model can be loaded from ./saves/x: there is no such folder; check the path."),
    ],
)
def test_names_that_are_refused(given, sentence):
    with pytest.raises(DataError) as error:
        look_inside.name_models(*given)
    assert str(error.value) == sentence


def test_names_of_models():
    assert look_inside.name_models("a/b", None) == {"b": "a/b"}
    assert look_inside.name_models("a/b", "c/b") == {"a/b": "a/b", "c/b": "c/b"}
    assert look_inside.name_models(".") == {Path.cwd().name: "."}


def test_a_place_that_cannot_be_written_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "load", lambda *given: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="^Cannot write .*/file: File exists"):
        inside.run({"m": "m"}, [], tmp_path / "file", "qwen")


@pytest.mark.parametrize(
    "window, rope, tokens",
    [
        (32768, {"rope_type": "default"}, 32768),
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen2.5
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        (131072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        (None, None, math.inf),
    ],
)
def test_window_of_a_model(window, rope, tokens):
    config = SimpleNamespace(max_position_embeddings=window, rope_parameters=rope)
    assert window_of(config) == tokens


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(DataError, match="needs a fast tokenizer"):
        encode_row(object(), None, "a", "b")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_numbers_are_none_is_refused(tiny, value):
    """As an overflow in fp16 gives them: its lines went missing, and NaN in the page's JSON left the reader empty."""
    model, tokenizer, template = tiny()
    model.model.norm.weight.data.fill_(value)
    path = re.escape(model.name_or_path)
    with pytest.raises(DataError, match=f"^row 'q0', short context: {path} gives NaN or infinity as log-probs or att"):
        look(model, tokenizer, template, make_row(0))
