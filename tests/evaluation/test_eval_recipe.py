"""Evaluation recipes: what is refused and in what words, keys shared with the data recipe, and the shipped ones."""

import re
import shlex

import pytest
import yaml
from conftest import ROOT
from evaluate import main
from override_table import runs, runs_of_header

from solopo_plugin.evaluation.items import MAIN_METRIC
from solopo_plugin.evaluation.recipe import FIELDS, load_recipe, make_recipe, sources
from solopo_plugin.evaluation.report.tables import Table
from solopo_plugin.qa.files import DataError
from solopo_plugin.qa.recipe import SHARED as KEYS
from solopo_plugin.synthesis.recipe import FIELDS as DATA

BASE = dict(models=["a"], template="qwen", benchmarks=["plain"], plain_data="x.jsonl", output_dir="out")
RULER, NEEDLES = (dict(benchmarks="ruler_qa", ruler_data={"a": "f"}), dict(benchmarks="niah_plus", niah_needles="f"))
REFUSED = {
    "Unknown key `benchmark` in the evaluation recipe. Did you mean `benchmarks`? Allowed: models, checkpoints,": dict(
        benchmark=["plain"]
    ),
    "The evaluation recipe lacks `output_dir`: Folder of questions,": dict(output_dir=" "),
    "The evaluation recipe lacks `template`: The host's chat template": dict(template=""),
    "The evaluation recipe lacks `models` or `checkpoints`: which models": dict(models=None),
    "The evaluation recipe lacks `benchmarks`: What is asked: longbench_qa,": dict(benchmarks=[]),
    "`longbench` is no benchmark; there are longbench_qa, ruler_qa,": dict(benchmarks="plain,longbench"),
    "`rouge` is no benchmark": dict(select_by="rouge"),
    "`select_by: validation` is not among `benchmarks: plain`; name it there and give `validation_data`, or choose": (
        dict(select_by="validation")
    ),
    "`select_by: longbench_qa` is not among `benchmarks: plain`; name it there, or choose": dict(
        select_by="longbench_qa"
    ),
    "`benchmarks` names one twice: plain, plain.": dict(benchmarks=["plain", "plain"]),
    "`benchmarks: plain` needs `plain_data`: Your own questions": dict(plain_data=None),
    "`benchmarks: ruler_qa` needs `ruler_data`: ": dict(benchmarks="ruler_qa"),
    "`benchmarks: niah_plus` needs `niah_data` or `niah_needles`: ": dict(benchmarks="niah_plus"),
    "`benchmarks: validation` needs `validation_data`: ": dict(benchmarks="validation"),
    "`models` must be a text, got 3;": dict(models=[3]),
    "`ruler_data` must be keys with values, {a: 1, b: 2}; got 'squad.json'.": dict(ruler_data="squad.json"),
    "`ruler_lengths` must be a whole number > 0, got '4k'.": dict(ruler_lengths=[4096, "4k"]),
    "`niah_depths` must be a number from 0 to 100, got 101.": dict(niah_depths=[0, 101]),
    "`temperature` must be a number >= 0, got -1.": dict(temperature=-1),
    "`rope_factor` must be a number >= 1, got 0.5.": dict(rope_factor=0.5),
    "`max_input_tokens` must be a whole number > 0, got 0.": dict(max_input_tokens=0),
    "`backend` must be one of vllm, openai, transformers; got 'hf'.": dict(backend="hf"),
    "`with_base` must be true or false, got 'yes'.": dict(with_base="yes"),
    "`runs` must be keys with values, {a: 1, b: 2}; got ['a', 'b'].": dict(runs=["a", "b"]),
    "`prompts` must be one of ours, official; got 'theirs'.": dict(prompts="theirs"),
    "`prompts: official` is for longbench_v2, which `benchmarks` does not name; leave": dict(prompts="official"),
    "`prompts: official` cannot be had for niah_plus, whose authors publish prompts for a team of agents ": dict(
        prompts="official", benchmarks="longbench_v2, niah_plus", niah_data="x"
    ),
    "`ruler_data` must name the file of each task, {squad: FILE}, got {1: 'f'}; put numbers and such into ": dict(
        ruler_data={1: "f"}
    ),
    "`ruler_data` must name the file of each task, {squad: FILE}, got {'squad': None}; put": dict(
        ruler_data={"squad": None}
    ),
    "`ruler_data` must name the file of each task, {squad: FILE}, got {'b': ['f', 'g']}; put": dict(
        ruler_data={"a": "f", "b": ["f", "g"]}
    ),
    "`niah_needles` must name the file of each task, {squad: FILE}, got {'a': 1}; put": dict(niah_needles={"a": 1}),
    "`niah_needles` must name the file of each task, {squad: FILE}, got {' ': 'f'}; put": dict(niah_needles={" ": "f"}),
    "`ruler_lengths` is empty; give the lengths of the contexts in tokens, such as [4096, 8192].": RULER
    | dict(ruler_lengths=[]),
    "`niah_lengths` is empty; give": NEEDLES | dict(niah_lengths=[]),
    "`niah_depths` is empty; give the depths of the needles in percent, such as [0, 50, 100].": NEEDLES
    | dict(niah_depths=[]),
    "`ruler_lengths: 65536` is longer than `max_input_tokens: 31500`, so that the prompts would lose their middle; r": (
        RULER | dict(ruler_lengths=[4096, 65536, 8192])
    ),
    "`niah_lengths: 32768` is longer than `max_input_tokens: 31129`,": NEEDLES | dict(max_input_tokens=31129),
    "`with_base` is for `checkpoints`, which the recipe does not have; leave it out (`with_base=false` on the c": dict(
        with_base=True
    ),
    "`harness_args` is for `harness_tasks`, which the recipe does not have; leave": dict(harness_args={"limit": 1}),
    "`extra_body` is for `backend: openai`, which the recipe does not have; leave it out (`extra_body=null` on ": dict(
        extra_body={"top_k": 1}
    ),
    "`extra_body` is for `benchmarks`, which the recipe does not have; leave it out (`extra_body=null` on the": dict(
        extra_body={"top_k": 1}, backend="openai", benchmarks=[], harness_tasks="t"
    ),
    "`served_model` is for `backend: openai`, which": dict(served_model={"a": "b"}, backend="transformers"),
    "`extra_body` cannot hold `temperature`, which every request has: set `temperature` of the recipe.": dict(
        extra_body={"temperature": 0.7, "max_tokens": 9}, backend="openai"
    ),
}


def test_lengths_that_the_window_nearly_holds_or_nobody_asks_are_taken():
    for keys in (RULER | dict(max_input_tokens=31130), NEEDLES, dict(ruler_lengths=[65536], niah_lengths=[])):
        make_recipe(BASE | keys)
    make_recipe(BASE | dict(benchmarks="niah_plus", niah_data="f", niah_lengths=[65536], niah_depths=[]))


@pytest.mark.parametrize("keys", [
    RULER | dict(ruler_lengths=[65536]), NEEDLES | dict(niah_data="f", niah_lengths=[]), dict(extra_body={"top_k": 1}),
])  # fmt: skip
def test_kept_answers_are_reported_under_settings_that_are_refused_before_asking(keys, tmp_path, monkeypatch, caplog):
    """Since another value of them would not be that of the answers."""
    with pytest.raises(DataError) as error:
        make_recipe(BASE | keys)
    (path := tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE | keys))
    seen: list = []
    monkeypatch.setattr(
        "evaluate.evaluate",
        lambda *given: seen.append(given[1:]) or {"selection": None, "summary": [{"benchmark": "plain"}]},
    )
    monkeypatch.setattr("evaluate.benchmark_tables", lambda *_: [Table("", [], [])])
    assert main([str(path)]) == 1 and not seen
    assert main([str(path), "--rescore"]) == 0 and seen == [(True, True)]
    assert f"{error.value} The answers that are kept are reported as they are." in caplog.text


@pytest.mark.parametrize("name, value", [
    ("with_base", "false"), ("harness_args", "null"), ("extra_body", "null"), ("served_model", "null"),
    ("prompts", "ours"),
])  # fmt: skip
def test_what_the_file_has_can_be_left_out_on_the_command_line(name, value, tmp_path):
    idle = dict(with_base=True, harness_args={"limit": 1}, extra_body={"top_k": 1}, served_model="m")
    (path := tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE | {name: (idle | {"prompts": "official"})[name]}))
    with pytest.raises(DataError, match=rf"leave it out \(`{name}={value}` on the command line\)\.$"):
        load_recipe(str(path))
    load_recipe(str(path), [f"{name}={value}"])


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_refused(sentence):
    with pytest.raises(DataError) as error:
        make_recipe(BASE | REFUSED[sentence])
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_values_take_the_form_of_their_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE | {"models": {"base": "org/name"}, "niah_depths": [0, 50]}))
    made = load_recipe(str(path), ["benchmarks=plain, longbench_qa", "ruler_lengths=4096", "temperature=1"])
    assert made.benchmarks == ["plain", "longbench_qa"] and made.ruler_lengths == [4096]
    assert made.models == {"base": "org/name"} and made.niah_depths == [0.0, 50.0] and made.temperature == 1.0
    assert make_recipe(BASE | {"models": "a, b"}).models == ["a", "b"]
    assert make_recipe(BASE | {"compare": "a, b"}).compare == ["a, b"]  # one pair
    first, second = make_recipe(BASE), make_recipe(BASE)
    assert first == second and first.ruler_lengths is not second.ruler_lengths


@pytest.mark.parametrize("words, wanted", [
    (["models={before: A, after: B}"], {"models": {"before": "A", "after": "B"}}),
    (["models.base=A"], {"models": {"base": "A", "lora": "L"}}),
    (["models={a: A}", "models.b=B"], {"models": {"a": "A", "b": "B"}}),
    (["models=A,B"], {"models": ["A", "B"]}),
    (["models=[A]"], {"models": ["A"]}),
    (["ruler_data={musique: F}"], {"ruler_data": {"musique": "F"}}),
    (["niah_needles={mine: F}"], {"niah_needles": {"mine": "F"}}),
    (["runs={}"], {"runs": {}}),
    (["runs={x: [a]}", "models={a: '${output_dir}/a'}"], {"runs": {"x": ["a"]}, "models": {"a": "out/a"}}),
    (["harness_args.limit=20"], {"harness_args": {"limit": 20, "model_args": {"dtype": "auto"}}}),
    (["harness_args={limit: 20}"], {"harness_args": {"limit": 20}}),
    (["harness_args.model_args={device: cpu}"], {"harness_args": {"limit": 1, "model_args": {"device": "cpu"}}}),
    (["server_urls={a: http://a/v1}"], {"server_urls": {"a": "http://a/v1"}}),
])  # fmt: skip
def test_a_key_of_the_command_line_replaces_the_recipes_and_a_part_of_one_that_part(words, wanted, tmp_path):
    path, dicts = tmp_path / "r.yaml", {
        "models": {"base": "org/base", "lora": "L"}, "ruler_data": {"squad": "hub/squad"}, "niah_needles": {"s": "S"},
        "runs": {"row": ["base", "lora"]}, "harness_args": {"limit": 1, "model_args": {"dtype": "auto"}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(BASE | dicts | {"harness_tasks": ["ifeval"], "output_dir": "out"}))
    made = load_recipe(str(path), words)
    assert {name: getattr(made, name) for name in {**dicts, **wanted}} == dicts | wanted


@pytest.mark.parametrize("select, given, chosen", [
    (None, None, None), ("plain", None, "plain"), ("", None, "validation"), ("", "plain", "plain"),
    (None, "plain", "plain"),
])  # fmt: skip
def test_select_chooses_a_benchmark(tmp_path, select, given, chosen):
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(BASE | dict(benchmarks=["plain", "validation"], validation_data="v", select_by=given))
    )
    assert load_recipe(str(path), [], select).select_by == chosen


SHARED = ("template", "default_system", "enable_thinking", "trust_remote_code", "prompt", "top_p", "backend", "timeout",
          "api_key_env", "openai_endpoint", "extra_body", "concurrency", "retries", "tensor_parallel_size",
          "max_new_tokens", "seed")  # fmt: skip
OWN = {"temperature", "server_urls", "served_model", "model_name_or_path"}  # with another default or type


def test_shared_keys_are_those_of_the_data_recipe():
    """And of the groups that both take them from, whose keys each recipe declares again with its stages."""
    assert set(FIELDS) & set(DATA) == set(SHARED) | OWN
    for name in SHARED:
        assert (FIELDS[name].type, FIELDS[name].default) == (DATA[name].type, DATA[name].default), name
    for name, spec in KEYS.items():
        assert spec.type == DATA[name].type == FIELDS.get(name, spec).type and spec.default == DATA[name].default, name


def test_every_key_is_explained_and_names_known_stages():
    for name, field in FIELDS.items():
        assert set(field.metadata["stages"]) <= {"items", "answers", "results", *MAIN_METRIC}, name
        assert len(field.metadata["help"]) > 10 and field.metadata["help"].endswith("."), name


def test_sources_are_the_files_that_are_there(tmp_path):
    for name in ("squad.json", "a.jsonl", "b.jsonl", "c,d.jsonl"):
        (tmp_path / name).touch()
    recipe = make_recipe(BASE | dict(
        ruler_data={"squad": str(tmp_path / "squad.json"), "musique": str(tmp_path / "none.json")},
        niah_needles=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", longbench_data=str(tmp_path),
    ))  # fmt: skip
    assert sources(recipe, "ruler_qa") == [tmp_path / "squad.json"]
    assert sources(recipe, "niah_plus") == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert sources(recipe, "longbench_qa") == [tmp_path] and sources(recipe, "longbench_v2") == []
    commas = make_recipe(
        BASE | dict(niah_needles=f"{tmp_path}/c,d.jsonl,{tmp_path}/a.jsonl", niah_data=f"{tmp_path}/c,d.jsonl")
    )
    assert commas.niah_needles == [f"{tmp_path}/c,d.jsonl", f"{tmp_path}/a.jsonl"]
    assert sources(commas, "niah_plus") == [tmp_path / "c,d.jsonl", tmp_path / "c,d.jsonl", tmp_path / "a.jsonl"]


EVAL_RECIPES = sorted((ROOT / "examples/yaml/eval").glob("*.yaml"))
SHIPPED = (
    "llama3.1-8b", "niah", "plain", "qwen2.5-7b", "qwen2.5-7b_longbench_v2", "select_checkpoint", "tiny",
)  # fmt: skip
LLAMA = {"instruct": "meta-llama/Llama-3.1-8B-Instruct", "solo_orpo": "saves/llama3.1-8b/solo_orpo"}
RUNS = {  # of headers, by output_dir: the recipe, and all keys of it that are others
    "llama3.1-8b_128k": ("llama3.1-8b", dict(
        models=LLAMA | {"solo_orpo": "saves/long/llama3.1-8b_128k"}, max_input_tokens=130048,
        ruler_lengths=[8192, 16384, 32768, 65536, 131072],
    )),
    "qwen2.5-7b_64k": ("qwen2.5-7b", dict(
        models={"instruct": "saves/models/qwen2.5-7b_64k", "solo_orpo": "saves/long/qwen2.5-7b_64k"},
        ruler_lengths=[8192, 16384, 32768, 65536], max_input_tokens=64512,
    )),
    "llama3.1-8b_longbench_v2": (
        "qwen2.5-7b_longbench_v2", dict(models=LLAMA, template="llama3", rope_factor=None)
    ),
    "llama3.1-8b_select_checkpoint": ("select_checkpoint", dict(
        template="llama3", model_name_or_path=LLAMA["instruct"], checkpoints=[LLAMA["solo_orpo"]],
        validation_data="data/musique_llama3.1_8b_solopo_val.jsonl",
    )),
    "llama3.1-8b_niah": ("niah", dict(models=LLAMA, template="llama3")),
    "llama3.1-8b_leaderboard": ("leaderboard", dict(models=[*LLAMA.values()], template="llama3")),
    "select_checkpoint_longbench": ("select_checkpoint", dict(
        benchmarks=["longbench_qa"], longbench_data="data/longbench", max_input_tokens=31500, select_by="longbench_qa",
    )),
}  # fmt: skip


def read(name: str):
    """A recipe that is a file, or a run that its header gives."""
    file = RUNS[name][0] if name in RUNS else name
    words = runs_of_header(f"eval/{file}.yaml")[name] if name in RUNS else []
    select = words.pop(1) if words[:1] == ["--select"] else None
    return load_recipe(str(ROOT / f"examples/yaml/eval/{file}.yaml"), [w for w in words if w != "--select"], select)


def test_shipped_recipes_are_all_looked_at():
    names = [path.stem for path in EVAL_RECIPES if path.stem != "leaderboard"]  # whose test is with the harness
    assert tuple(names) == SHIPPED and len(SHIPPED) == 7
    of_headers = [name for path in EVAL_RECIPES for name in runs_of_header(f"eval/{path.name}")]
    assert sorted(of_headers) == sorted(RUNS) and len(RUNS) == 7


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_header_is_the_recipe_with_other_keys(name):
    file, keys = RUNS[name]
    before, made = vars(read(file)), vars(read(name))
    assert made == before | keys | {"output_dir": f"saves/eval/{name}"}
    assert all(before[key] != value for key, value in keys.items())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe(name):
    """It loads, and says how it is started and where its numbers come from."""
    path = ROOT / f"examples/yaml/eval/{name}.yaml"
    text, made, values = path.read_text(encoding="utf-8"), load_recipe(str(path)), yaml.safe_load(path.read_text())
    assert f"evaluate.py examples/yaml/eval/{name}.yaml" in text and "\n# Hardware: " in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert made.output_dir == f"saves/eval/{name}"
    if name == "tiny":
        return
    assert "Not run at 7B by this project." in text
    numbers = [line for line in text.splitlines() if re.match(r"\w+: \[?-?[\d.]+\b", line)]
    assert len(numbers) >= 5 and all(re.search(r"  # (paper|ours|LongBench|RULER)\b", line) for line in numbers)
    assert sum(type(v) in (int, float) for v in values.values()) >= 5  # none hides as text


@pytest.mark.parametrize(
    "name", [name for name in (*SHIPPED, *RUNS) if name not in ("tiny", "llama3.1-8b_leaderboard")]
)
def test_what_is_asked_belongs_to_the_training_recipes(name):
    made = read(name)
    model = "llama3.1-8b" if "llama" in name else "qwen2.5-7b"
    longer = re.fullmatch(r".+_(\d+)k", name)  # trained on rows that several GPUs share
    training = f"examples/yaml/{f'long/{name}' if longer else f'{model}/solo_orpo'}.yaml"
    training = yaml.safe_load((ROOT / training).read_text())
    assert made.template == training["template"] and training["model_name_or_path"] in str(vars(made))
    trained = made.checkpoints or (list(made.models.values())[1:] if isinstance(made.models, dict) else [])
    assert all(folder == training["output_dir"] for folder in trained) and (trained or name == "plain")
    # an answer fits behind the longest prompt: Qwen2.5 has a window of 32K, and four times as much with YaRN
    window = 131072 if "llama" in name else 32768 * int(made.rope_factor or 1)
    if longer:  # of Qwen2.5 its folder's YaRN, that of training: no `rope_factor` on top
        window = training["cutoff_len"]
        assert made.rope_factor is None and made.ruler_lengths[-1] == window == 1024 * int(longer[1])
        assert made.max_input_tokens + made.max_new_tokens == window
    assert made.max_input_tokens + made.max_new_tokens <= window
    assert made.max_new_tokens == load_data_recipe(model).max_new_tokens


def load_data_recipe(model: str, overrides: list[str] | None = None):
    from solopo_plugin.synthesis.recipe import load_recipe

    return load_recipe(str(ROOT / f"examples/yaml/data/{model}.yaml"), overrides)


def test_how_a_checkpoint_is_chosen():
    """By default on rows that were held out; by the paper's way it is said that this is a test set."""
    for name, model in {"select_checkpoint": "qwen2.5-7b", "llama3.1-8b_select_checkpoint": "llama3.1-8b"}.items():
        made = read(name)
        assert (made.select_by, made.benchmarks, made.with_base) == ("validation", ["validation"], True)
        assert made.validation_data == f"data/{load_data_recipe(model).dataset_name}_solopo_val.jsonl"
        assert made.max_input_tokens == load_data_recipe(model).long_tokens
    header = (ROOT / "examples/yaml/eval/select_checkpoint.yaml").read_text(encoding="utf-8")
    assert read("select_checkpoint_longbench").select_by == "longbench_qa"
    assert "The paper's way is by LongBench v1 QA, a selection on a test set that is also reported" in header


def test_commands_of_longer_contexts_go_on_from_row_to_checkpoint():
    """Follow the commands of examples/yaml/README.md from one row of the table to a checkpoint."""
    page = (ROOT / "examples/yaml/README.md").read_text(encoding="utf-8")
    block = page.split("## Rows with longer contexts")[1].split("```")[1].replace("\\\n", "")
    data, training, choice = ([w for w in shlex.split(line) if "=" in w] for line in block.splitlines()[1:])
    (run,) = [run for run in runs() if run.overrides == data]
    made = load_data_recipe(run.recipe.removeprefix("data/").removesuffix(".yaml"), data)
    training, own = dict(word.split("=") for word in training), ROOT / "examples/yaml/qwen2.5-7b/solo_orpo.yaml"
    assert training["dataset"] == f"{made.dataset_name}_solopo" and training["cutoff_len"] == str(made.cutoff_len)
    assert training["output_dir"] != yaml.safe_load(own.read_text())["output_dir"]
    chosen = load_recipe(str(ROOT / "examples/yaml/eval/select_checkpoint.yaml"), choice, "")
    assert (chosen.checkpoints, chosen.max_input_tokens) == ([training["output_dir"]], made.long_tokens)
    assert chosen.validation_data == f"{made.dataset_dir}/{training['dataset']}_val.jsonl"
