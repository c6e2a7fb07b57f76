"""The recipes under examples/yaml/models/ and the table of models in its README: read, planned, and trained when tiny.

Each model's recipes go through the readers and, in a fresh interpreter (this file run as a script), through the host's
parser. What a step of a model runs and how long its prompts may be is asked of the code, on the published shape.
"""

import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from conftest import ROOT, outcome
from override_table import YAML
from safetensors.torch import load_file
from test_recipes import ORIGIN, plain

from solopo_plugin.qa.recipe import read_values

FOLDER = YAML / "models"
FORM = {True: "packed", False: "two stages"}
THINKING = {  # what a thinking model's recipes change
    "data": ["enable_thinking=true", "max_new_tokens=4096", "cutoff_len=13312"],
    "train": ["enable_thinking=true", "cutoff_len=13312"],
    "eval": ["enable_thinking=true", "max_new_tokens=4096", "temperature=0.6", "top_p=0.95"],
}
BEGINS, ENDS = "| name | model |", "\n\n"


class Row(NamedTuple):
    name: str
    model: str  # its name on the hub
    template: str
    form: str
    lora_24: str  # tokens of the longest prompt
    lora_80: str
    full: str


def page() -> str:
    return (YAML / "README.md").read_text(encoding="utf-8")


def rows() -> list[Row]:
    table = BEGINS + page().split(BEGINS)[1].split(ENDS)[0]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [Row(*row) for row in cells[2:]]


MODELS = {row.name: row for row in rows()}
UNKNOWN = {"qwen3.5_4b": "qwen3_5_text", "gemma4_e4b": "gemma4_text"}  # shapes that are not known here


def config_of(row: Row):
    """The published configuration; of a shape that is not known the class's own, for what a step runs."""
    from step_cost import read_config
    from transformers import AutoConfig

    if row.name in UNKNOWN:
        return AutoConfig.for_model(UNKNOWN[row.name])
    return read_config(row.model)


def overrides(row: Row, part: str) -> list[str]:
    """As the README gives them."""
    name, chat = row.name, [f"template={row.template}"]
    return {
        "data": [f"model_name_or_path={row.model}", *chat, f"dataset_name=musique_{name}",
                 f"work_dir=saves/data/musique_{name}"],
        "lora": [f"model_name_or_path={row.model}", *chat, f"dataset=musique_{name}_solopo",
                 f"output_dir=saves/{name}/lora"],
        "full": [f"model_name_or_path={row.model}", *chat, f"dataset=musique_{name}_solopo",
                 f"output_dir=saves/{name}/full"],
        "eval": [f"models={{base: {row.model}, lora: saves/{name}/lora}}", *chat, f"output_dir=saves/eval/{name}"],
    }[part]  # fmt: skip


# ---- what the files and the page say


# Below examples/yaml, by model; then what LoRA on one GPU changes of it.
PAPERS = {"full": "{}/solo_orpo.yaml", "lora": "{}/solo_orpo.yaml", "data": "data/{}.yaml"}
LORA = dict(finetuning_type="lora", lora_rank=16, lora_target="all", quantization_bit=4, learning_rate=5e-5,
            gradient_accumulation_steps=64, solopo_detach_short=True,
            deepspeed=None, ddp_timeout=None, save_total_limit=None)  # fmt: skip


@pytest.mark.parametrize("name", ["lora", "full", "data", "eval"])
def test_every_number_has_an_origin(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    numbers = [line for line in text.splitlines() if (m := re.match(r"(\w+): ", line))
               and type(values[m[1]]) in (int, float)]  # fmt: skip
    of_benchmarks = re.compile(r"  # (paper|ours|LongBench|RULER)( \(.+\))?([;:,] .+)?$")
    origin = of_benchmarks if name in ("data", "eval") else ORIGIN
    assert [line for line in numbers if not origin.search(line)] == []
    assert "as not been run" in text


def test_files_are_the_papers_but_for_the_model():
    """Beside the recipes of Qwen2.5-7B: the same method, batch and rates; the short side is detached."""
    for name, paper in PAPERS.items():
        own, other = (
            yaml.safe_load(path.read_text()) for path in (FOLDER / f"{name}.yaml", YAML / paper.format("qwen2.5-7b"))
        )
        if name == "lora":
            other |= LORA
        changed = {key for key in own | other if own.get(key) != other.get(key)}
        of_model = {
            "model_name_or_path",
            "template",
            "enable_thinking",
            "dataset",
            "output_dir",
            "dataset_name",
            "work_dir",
        }
        ours = {"solopo_detach_short"} if name == "full" else set()  # where we would start
        assert changed <= of_model | ours, name
        assert own.get("solopo_detach_short") is (None if name == "data" else True)
    assert own["enable_thinking"] is False and own["model_name_or_path"] == MODELS["qwen3_4b"].model


@pytest.mark.parametrize(
    "name, folder, more", [("qwen2.5_7b", "qwen2.5-7b", []), ("llama3.1_8b", "llama3.1-8b", ["solopo_alpha=4"])]
)
def test_the_papers_models_by_lora(name, folder, more):
    """By their row of the table, and a key that the page names: the paper's run, but for LoRA; and its rows."""
    assert all(f"`{word}`" in page() for word in more)
    changes = {"lora": LORA | {"output_dir": f"saves/{name}/lora"}, "data": {}}
    for part, change in changes.items():
        own = read_values(str(FOLDER / f"{part}.yaml"), overrides(MODELS[name], part) + more * (part == "lora"))
        other = yaml.safe_load((YAML / PAPERS[part].format(folder)).read_text()) | change | {"enable_thinking": False}
        assert own == {key: value for key, value in other.items() if value is not None}
    assert f"examples/yaml/data/{folder}.yaml" in page()


def test_the_page_has_the_overrides_that_are_tested():
    text = " ".join(page().split())
    row = MODELS["qwen3_8b"]
    for part in ("data", "lora", "full"):
        assert all(word in text for word in overrides(row, part)), part
    assert all(word in text for words in THINKING.values() for word in words)


def longest_prompts(row: Row) -> tuple[str, list[str]]:
    """What a step runs, and the longest prompts of LoRA at 24 and 80 GB and of full fine-tuning on four GPUs."""
    from plan import Plan, how_it_runs, read_recipe, references_of
    from step_cost import COUNTED, shape_of

    config, found = config_of(row), []
    variant, _ = how_it_runs(config, *read_recipe(FOLDER / "lora.yaml", 1))
    if row.name in UNKNOWN or config.model_type not in COUNTED:
        return FORM[variant == "S3"], ["?"] * 3
    for file, gpus, words, memory in (
        ("lora.yaml", 1, [], 24e9), ("lora.yaml", 1, ["quantization_bit=null"], 80e9), ("full.yaml", 4, [], 80e9)
    ):  # fmt: skip
        recipe, setup = read_recipe(FOLDER / file, gpus, words)
        lengths = 1024, 256, recipe["cutoff_len"] - 256
        plan = Plan(shape_of(config), config, recipe, setup, lengths, references_of(recipe), memory, 1)
        found.append(f"{min(plan.room, plan.fits) // 1000}K")
    return FORM[variant == "S3"], found


def test_table_is_what_plan_says():
    """What a step runs by the code, on the published shape; plan.py's longest prompts, rounded down to 1,000."""
    table = []
    for row in MODELS.values():
        form, prompts = longest_prompts(row)
        table.append(row._replace(form=form, lora_24=prompts[0], lora_80=prompts[1], full=prompts[2]))
    shown = "\n".join(f"| {r.name} | `{r.model}` | `{r.template}` | {' | '.join(r[3:])} |" for r in table)
    assert shown in page(), f"the table should be:\n{shown}"


# ---- readers and the host's parser


@pytest.mark.parametrize("name", MODELS)
def test_data_and_evaluation_are_read(name):
    from solopo_plugin.evaluation import recipe as evaluation
    from solopo_plugin.synthesis import recipe as synthesis

    row = MODELS[name]
    for more in ([], THINKING["data"])[: 1 + row.template.startswith("qwen3")]:
        made = synthesis.load_recipe(str(FOLDER / "data.yaml"), [*overrides(row, "data"), *more])
        assert made.model.path == row.model and made.template == row.template
        assert made.enable_thinking is bool(more) and made.dataset_name == f"musique_{name}"
        assert made.long_tokens + made.max_new_tokens <= made.cutoff_len
    for more in ([], THINKING["eval"])[: 1 + row.template.startswith("qwen3")]:
        made = evaluation.load_recipe(str(FOLDER / "eval.yaml"), [*overrides(row, "eval"), *more])
        assert made.models == {"base": row.model, "lora": f"saves/{name}/lora"} and made.template == row.template
        assert made.enable_thinking is bool(more) and made.temperature == (0.6 if more else 0)


def command_lines() -> dict[str, list[str]]:
    """Of every training run of the table, and of thinking models' with thinking."""
    lines = {}
    for name, row in MODELS.items():
        lines[f"{name} lora"] = [str(FOLDER / "lora.yaml"), *overrides(row, "lora")]
        lines[f"{name} lora 80"] = [*lines[f"{name} lora"], "quantization_bit=null"]
        lines[f"{name} full"] = [str(FOLDER / "full.yaml"), *overrides(row, "full")]
        if row.template.startswith("qwen3"):
            lines[f"{name} thinks"] = [*lines[f"{name} full"], *THINKING["train"]]
    return lines


def parse_all() -> dict:
    from llamafactory.hparams.parser import get_train_args

    results = {}
    for name, line in command_lines().items():
        sys.argv = ["llamafactory-cli", *line, "use_cpu=true"]
        groups = get_train_args()
        keys = {**yaml.safe_load(Path(line[0]).read_text()), **dict(word.split("=", 1) for word in line[1:])}
        results[name] = {k: plain(getattr(next(g for g in groups if hasattr(g, k)), k)) for k in keys}
    return results


@pytest.mark.slow
def test_the_host_takes_every_run(zygote, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    out, log = tmp_path / "parsed.json", tmp_path / "log.txt"
    code = zygote.start(__file__, out, log=log, env=dict(os.environ, **one, MASTER_PORT=str(port))).wait()
    assert code == 0, log.read_text()[-3000:]
    parsed = json.loads(out.read_text())
    for name, line in command_lines().items():
        row, own = MODELS[name.split()[0]], parsed[name]
        changed = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in line[1:])}
        for key, value in {**yaml.safe_load(Path(line[0]).read_text()), **changed}.items():
            assert own[key] == value, (name, key)
        assert own["model_name_or_path"] == row.model and own["stage"] == "solopo"
        assert own["enable_thinking"] is ("thinks" in name)


# ---- trained, tiny


def tiny_shape(config) -> dict:
    """A tiny model of the same form: kinds of layers in turn, grouped queries, tied or not, windows, rope."""
    kinds = getattr(config, "layer_types", None)
    period = kinds.index("full_attention") + 1 if kinds else 2
    group = config.num_attention_heads // config.num_key_value_heads
    shape = dict(
        num_hidden_layers=period, hidden_size=32 * group, num_attention_heads=2 * group, num_key_value_heads=2,
        head_dim=16, tie_word_embeddings=config.tie_word_embeddings,
    )  # fmt: skip
    if kinds:
        shape["layer_types"] = kinds[:period]
    if hasattr(config, "sliding_window"):
        shape["sliding_window"] = config.sliding_window and 64  # shorter than the prompts
    if config.model_type == "qwen3_5_text":
        shape |= dict(
            linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4
        )
    if config.model_type == "gemma4_text":
        shape |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=1024, global_head_dim=32)
    if config.model_type == "llama":
        shape["rope_parameters"] = config.rope_parameters
    return shape


@pytest.mark.slow(keep=["lora-*"])
@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("qwen3_8b", "llama3.1_8b", "gemma3_4b", "qwen3.5_9b")]
)
@pytest.mark.parametrize("file", ["lora", "full"])
def test_trains_when_tiny(name, file, run, tiny_model, tmp_path, host_log):
    """Three steps of the recipe's own keys; of models with one form of architecture the first."""
    row = MODELS[name]
    config = config_of(row)
    bos = "<|begin_of_text|>" if row.template == "llama3" else None
    model = tiny_model(config.model_type, bos=bos, **tiny_shape(config))
    template = row.template if row.template in ("qwen3", "qwen3_5", "llama3") else "qwen3"  # the tokenizer's markers
    keys = yaml.safe_load((FOLDER / f"{file}.yaml").read_text()) | dict(
        model_name_or_path=model, template=template, dataset="demo_solopo", dataset_dir=str(ROOT / "data"),
        max_samples=6, gradient_accumulation_steps=2, output_dir=str(tmp_path), use_cpu=True, bf16=False,
        save_strategy="no", overwrite_output_dir=True, disable_tqdm=True, plot_loss=False,
    )  # fmt: skip
    run({key: value for key, value in keys.items() if key not in ("quantization_bit", "deepspeed", "flash_attn")})
    told = next(message for message in host_log if message.startswith("A step runs "))
    assert told.startswith("A step runs packed" if row.form == "packed" else "A step runs in two stages"), told
    result = outcome(tmp_path)
    assert len(result.losses) == 3 and all(0 < loss < 100 for loss in result.losses)
    if file == "lora":
        trained = [weight for key, weight in result.weights.items() if "lora_B" in key]  # 0 before the first step
        assert trained and all(weight.abs().sum() > 0 for weight in trained)
    else:
        before = load_file(f"{model}/model.safetensors")
        moved = [not torch.equal(weight, before[key]) for key, weight in result.weights.items()]
        assert result.weights.keys() == before.keys() and sum(moved) > 0.8 * len(moved)


TEXTS = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             vocab_size=300, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2)  # fmt: skip
SEES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
WHOLE = {  # model_type -> its language model's changes, the rest
    "gemma3": (dict(num_hidden_layers=6, sliding_window=32), SEES | dict(image_size=28, patch_size=14)),
    "gemma4": (dict(num_hidden_layers=6, sliding_window=32, hidden_size_per_layer_input=8,
                    vocab_size_per_layer_input=300, global_head_dim=32), SEES),
    "qwen3_5": (dict(num_hidden_layers=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
                     linear_num_value_heads=4),
                dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)),
}  # fmt: skip


@pytest.mark.parametrize("model_type", WHOLE)
def test_the_text_part_says_what_the_whole_says(model_type, tiny_model, tmp_path):
    from text_part import save_text_part
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    text, rest = WHOLE[model_type]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, text_config=TEXTS | text, vision_config=rest)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in whole.parameters():  # away from the start, where whole tensors are equal
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    whole.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path / "whole")
    save_text_part(str(tmp_path / "whole"), str(tmp_path / "text"))
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert part.config.model_type == f"{model_type}_text" and part.config.get_text_config() is part.config
    ids = torch.arange(3, 90)[None]
    with torch.inference_mode():
        assert torch.equal(part(input_ids=ids).logits, whole(input_ids=ids).logits)
    ids = [AutoTokenizer.from_pretrained(path).encode("a b") for path in (tmp_path / "text", tiny_model())]
    assert ids[0] == ids[1]
    with pytest.raises(ValueError, match=r"is a text model \(`"):
        save_text_part(str(tmp_path / "text"), str(tmp_path / "again"))
    for target in ("whole", "text", "elsewhere/../whole"):  # itself, and another model
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        with pytest.raises(
            ValueError, match=r"^\S+ holds a model or other files \(\S+\); give a folder that is new\.$"
        ):
            save_text_part(str(tmp_path / "whole"), str(tmp_path / target))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_whose_text_part_is_of_another_form_is_refused(tiny_model, tmp_path, monkeypatch):
    import text_part
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    model_type = next(iter(WHOLE))
    text, rest = WHOLE[model_type]
    config = AutoConfig.for_model(model_type, text_config=TEXTS | text, vision_config=rest)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    other = AutoModelForCausalLM.from_pretrained(tiny_model())
    monkeypatch.setattr(text_part.AutoModelForCausalLM, "from_config", lambda *_, **__: other)
    with pytest.raises(
        ValueError, match=rf"^`{model_type}` has another language model than `\w+`, which loads alone: "
    ) as caught:
        text_part.save_text_part(str(tmp_path / "whole"), str(tmp_path / "text"))
    assert "\n" not in str(caught.value) and not (tmp_path / "text").exists()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(parse_all()), encoding="utf-8")
