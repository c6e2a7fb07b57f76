"""Run tasks of lm-evaluation-harness, such as the Open LLM Leaderboard: its own program asks and scores.

It runs as a process of its own (harness_process.py), so that it can neither change nor be changed by what is loaded
here. In `<output_dir>/harness/<model>/` stand its configuration (config.json), its log, its results and, while it runs,
the answers so far: a run that was stopped continues. rows.json says what they are made from, and has the finished ones.
"""

import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import httpx

from ..qa.files import DataError, as_data_error, excerpt, write_json
from ..qa.generate.addresses import addresses, api_key, is_local
from ..qa.generate.servers import served_name
from ..qa.generate.vllm import max_lora_rank
from ..qa.provenance import ADAPTER, TOKENIZER, WEIGHTS, differences, installed, model_hash
from ..qa.recipe import Sampling, pick
from ..qa.window import window_of

log = logging.getLogger(__name__)

ERROR = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")  # last line of a traceback
CUT = re.compile(rb"WARNING .*\btruncat(ing|ion applied)", re.IGNORECASE)  # its log of a prompt beyond the window
HINTS = {
    "Tasks not found": "`python -m lm_eval ls tasks` lists them; ",
    "chat_template": "for a model without one `harness_args: {apply_chat_template: false}`; ",
}
LOG, CACHE = "log.txt", "cache_rank*.db*"  # the latter holds its answers so far
OURS = ("tasks", "output_path", "use_cache", "config")  # keys of its configuration that `harness_args` may not set
MADE = frozenset(  # its `model_args` that come from the model and the machine; the others are the recipe's
    "pretrained peft lora_local_path trust_remote_code tensor_parallel_size max_lora_rank model base_url "
    "num_concurrent tokenizer tokenizer_backend max_length".split()
)
TEMPLATES = (*TOKENIZER, "*.jinja")  # it takes chats in the tokenizer's own template


def run_harness(model: Any, recipe: Any, output_dir: Path) -> list[dict]:
    """Return results of `harness_tasks` for a model; what is there of the same model and settings is not run again.

    The harness asks in its own way. Of the recipe count the model, backend, `default_system`, `enable_thinking: false`
    (not of a server; nor do `rope_factor` and `extra_body`), and `harness_args`: keys of its configuration file
    (batch_size, limit, num_fewshot, ...), whose `model_args` are added to those made here. Prompts are chats, as the
    leaderboard has them for instruct models, in the tokenizer's own chat template; `harness_args: {apply_chat_template:
    false}` for a base model.

    Args:
        model: One of `find_models`.
        recipe: An EvalRecipe.
        output_dir: Of the evaluation; see above.

    Returns:
        {"model", "task", "metric", "value", "stderr", "n", "version"} for every task named, or its parts where it has
        no number of its own. Value and standard error in the harness' units: accuracies are shares from 0 to 1. The
        version is that of the harness which finished the run; kept results of before it was noted have none. Where
        prompts of the model were longer than its window and were cut, "cut": how often the log says so, over all tasks.

    Raises:
        DataError: lm-evaluation-harness is not installed, or its run ended with an error.
    """
    folder = Path(output_dir) / "harness" / model.name
    made_from, rows = _begun(model, recipe, folder)
    if rows is not None:
        log.info(f"{model.name}: results of lm-evaluation-harness: made before, kept.")
        return rows
    _check_installed()
    started: dict[str, Any] = {"made_from": made_from, "asked": None}
    config = made_from["config"]
    args = dict(config["model_args"])
    if args.get("model") == model.place:  # which the servers may call otherwise
        started["asked"] = args["model"] = served_name(pick(recipe, Sampling), model)
    _begin(folder, started)
    # a results path that ends in .json: its files then stand beside it, and not in a folder named after the model
    paths = {"output_path": str(folder / "results.json"), "use_cache": str(folder / "cache")}
    write_json(folder / "config.json", config | {"model_args": args} | paths)
    _run(model, recipe, folder, args.get("base_url"))
    results = read_results(max(folder.glob("results_*.json")), model.name, config["tasks"])
    cut = _prompts_cut(folder / LOG, model.name)
    ran = {"version": installed("lm_eval")} | ({"cut": cut} if cut else {})
    results = [result | ran for result in results]
    write_json(folder / "rows.json", started | {"rows": results})
    _remove(folder, CACHE)
    return results


def check_harness(model: Any, recipe: Any, output_dir: Path, resume: bool = True) -> bool:
    """Refuse what `run_harness` would refuse, before any model is asked; return whether it is to run.

    Raises:
        DataError: A key that cannot be, or lm-evaluation-harness is to run and is not installed.
    """
    _, rows = _begun(model, recipe, Path(output_dir) / "harness" / model.name)
    if to_run := rows is None or not resume:
        _check_installed()
    return to_run


def check_thoughts(models: list[Any], recipe: Any) -> None:
    """Warn once where models may think in answers that the harness scores whole, or though the recipe says not to.

    Raises:
        DataError: `enable_thinking: false`, where the harness makes the prompts for a server and does not heed it.
    """
    told, server = settings_of(recipe), recipe.backend == "openai"
    chat, args, key = server and recipe.openai_endpoint == "chat", told["model_args"], "enable_thinking"
    if not told["apply_chat_template"] or (chat and f"'{key}': False" in str(told.get("gen_kwargs"))):
        return  # the latter stands in each request
    templates = {model.name: _chat_template(model.tokenizer, recipe) for model in models}
    thinking = {name: text for name, text in templates.items() if "</think>" in text}
    if not server and args.get(key) is False:  # which templates of models that always think do not read
        thinking = {name: text for name, text in thinking.items() if key not in text}
    if not thinking:
        return
    names, reads = ", ".join(thinking), any(key in text for text in thinking.values())
    off = f"`harness_args: {{gen_kwargs: {{chat_template_kwargs: {{{key}: false}}}}}}`" if chat else f"`{key}: false`"
    local = "`backend: vllm` or `transformers`"
    if server and reads and not recipe.enable_thinking:
        if not chat:
            raise DataError(
                f"`{key}: false` does not reach lm-evaluation-harness with `openai_endpoint: completions`, and the "
                f"chat template of {names} knows thoughts; use {local}."
            )
        said, advice = f"`{key}: false` does not reach a server from lm-evaluation-harness", [off, local]
    else:
        said = "the chat template knows thoughts, and lm-evaluation-harness scores them with the answer"
        advice = ["`harness_args: {model_args: {think_end_token: </think>}}`"] + [off] * reads
        if server and not chat:  # where it knows no `think_end_token`
            advice = [local]
        elif "think_end_token" in args:
            return
    log.warning("%s: %s; use %s.", names, said, ", or ".join(advice))


def _chat_template(tokenizer: str, recipe: Any) -> str:
    """Return a tokenizer's own chat template; for an unknown one, if thoughts are unwanted, the words of one with them.

    A name that only a server may know is not looked up on the hub.
    """
    from transformers import AutoTokenizer

    only_served = recipe.backend == "openai" and recipe.openai_endpoint == "chat" and not Path(tokenizer).is_dir()
    if not only_served or tokenizer == recipe.model_name_or_path:
        with suppress(Exception):  # what the harness itself will tell of
            found = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=recipe.trust_remote_code)
            return str(found.chat_template)
    return "" if recipe.enable_thinking else "</think>, enable_thinking"


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError("`harness_tasks` needs lm-evaluation-harness, which is not installed: pip install '.[eval]'.")


def _begun(model: Any, recipe: Any, folder: Path) -> tuple[dict, list[dict] | None]:
    """Return what a run is made from, and the results of a finished one that was made from the same."""
    config, kept = configuration(model, recipe), _read(folder / "rows.json")
    made_from = {"config": config, "files": _files(model, config), "settings": settings_of(recipe)}
    return made_from, kept.get("rows") if _same(kept.get("made_from"), made_from) else None


def _same(kept: dict | None, made_from: dict) -> bool:
    """Return whether both are one run's; earlier versions did not note the recipe's own settings."""
    return {"settings": made_from["settings"]} | (kept or {}) == made_from


def _begin(folder: Path, started: dict) -> None:
    """Let a run that was stopped go on; one of another model or other settings begins anew.

    Args:
        folder: Of the harness' files for a model.
        started: What this run is made from, and what a server is asked for, where it was asked what it has.
    """
    kept, before = _read(folder / "rows.json"), folder / "made_from.json"  # where an earlier version had it
    asked = kept.get("asked", started["asked"])
    if not _same(kept.get("made_from") or _read(before), started["made_from"]) or asked != started["asked"]:
        _remove(folder, before.name, LOG, CACHE, "results_*.json")
        write_json(folder / "rows.json", started)


def _remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def _prompts_cut(path: Path, model: str) -> int:
    """Count in the harness' log the prompts that it cut, and say so."""
    with open(path, "rb") as file:
        cut = sum(bool(CUT.search(line)) for line in file)
    if cut:
        log.warning(
            f"{model}: lm-evaluation-harness cut prompts that were longer than the model's window; {path} says so "
            f"{cut} times."
        )
    return cut


def kept_results(model: Any, output_dir: Path) -> list[dict]:
    """Return the results of the last finished run, whatever its settings were; none where there was none."""
    return _read(Path(output_dir) / "harness" / model.name / "rows.json").get("rows", [])


def check_kept(model: Any, recipe: Any, output_dir: Path) -> None:
    """Refuse to report kept results under settings that they were not made with.

    Raises:
        DataError: What differs; the model's files and its servers are not looked at, since they may be gone.
    """
    folder, new = Path(output_dir) / "harness" / model.name, settings_of(recipe)
    kept = _read(folder / "rows.json")
    if "rows" not in kept:
        return
    old, args = kept["made_from"]["config"], new["model_args"]
    args = {name: value for name, value in old["model_args"].items() if name in args or name not in MADE}
    old = kept["made_from"].get("settings", old | {"model_args": args})
    if words := ", ".join(differences(old, new)):
        raise DataError(f"`--rescore` keeps what {folder} was made with, but {words}; leave `--rescore` out.")


def configuration(model: Any, recipe: Any) -> dict[str, Any]:
    """Return what the harness is told, as its configuration file has it; see `run_harness` of names at servers."""
    found = settings_of(recipe)
    return found | {"model_args": BACKENDS[recipe.backend](model, recipe) | found["model_args"]}


def settings_of(recipe: Any) -> dict[str, Any]:
    """Return what of the configuration the recipe alone decides."""
    args = dict(recipe.harness_args or {})
    for name in OURS:
        if name in args:
            raise DataError(f"`harness_args` cannot set `{name}`; use `harness_tasks` and `output_dir`.")
    own = args.pop("model_args", None) or {}
    if not isinstance(own, dict):
        kind = type(own).__name__  # the harness' own form is a text, in which a token may stand
        raise DataError(f"`model_args` of `harness_args` must be keys with values, {{dtype: bfloat16}}; got a {kind}.")
    kind = {"transformers": "hf"}.get(recipe.backend, recipe.backend)
    here: dict[str, Any] = {"dtype": "auto"}
    if recipe.backend == "openai":  # a chat gives no log-probs of given answers, which multiple choice needs
        kind, here = "local-chat-completions" if recipe.openai_endpoint == "chat" else "local-completions", {}
    elif not recipe.enable_thinking:
        here["enable_thinking"] = False
    system = {"system_instruction": recipe.default_system} if recipe.default_system else {}
    config = {"model": kind, "apply_chat_template": True} | system | args
    return config | {"model_args": here | own, "tasks": list(recipe.harness_tasks)}


def _hf(model: Any, recipe: Any, adapter: str = "peft") -> dict[str, Any]:
    found = {"pretrained": model.path, "trust_remote_code": recipe.trust_remote_code}
    return found | ({adapter: model.adapter} if model.adapter else {})


def _vllm(model: Any, recipe: Any) -> dict[str, Any]:
    found = _hf(model, recipe, "lora_local_path") | {"tensor_parallel_size": recipe.tensor_parallel_size}
    if model.adapter:
        found["max_lora_rank"] = max_lora_rank(model.adapter)
    return found


def _server(model: Any, recipe: Any) -> dict[str, Any]:
    """One server: the first address."""
    if not model.server_urls:
        raise DataError(f"`backend: openai` needs `server_urls` for {model.name}, such as http://localhost:8000/v1.")
    place = addresses(model.server_urls)[0]
    if place.auth:
        raise DataError(
            f"`server_urls` has a password for {place.url}, which lm-evaluation-harness would write to files; leave "
            "it out, and put the server's key into the environment variable that `api_key_env` names."
        )
    chat = recipe.openai_endpoint == "chat"
    found = {"model": model.served_model or model.place, "num_concurrent": recipe.concurrency}
    found["base_url"] = f"{place.url}/{'chat/completions' if chat else 'completions'}"
    if chat:  # whose prompts it leaves to the server
        return found
    window = _window(model.tokenizer, recipe)
    return found | {"tokenizer": model.tokenizer, "tokenizer_backend": "huggingface", "max_length": window}


def _window(path: str, recipe: Any) -> int:
    """Tokens of prompt and answer: those of the model at `path`, or where it has no configuration the recipe's."""
    from transformers import AutoConfig

    window = math.inf
    with suppress(OSError, ValueError):
        config = AutoConfig.from_pretrained(path, trust_remote_code=recipe.trust_remote_code)
        window = window_of(config.get_text_config())
    return int(window) if window < math.inf else recipe.max_input_tokens + recipe.max_new_tokens


BACKENDS = {"transformers": _hf, "vllm": _vllm, "openai": _server}


def _files(model: Any, config: dict) -> dict[str, str]:
    """Hashes of what the harness reads from this machine: weights, adapter, task definitions of the user's own."""
    tasks = config.get("include_path")
    places = {model.tokenizer: TEMPLATES} | {model.path: TEMPLATES + WEIGHTS, model.adapter: ADAPTER}
    places[tasks] = ("**/*.yaml", "**/*.py", "**/*.jsonl")
    return {place: model_hash(Path(place), kinds) for place, kinds in places.items() if place and Path(place).is_dir()}


def _run(model: Any, recipe: Any, folder: Path, server: str | None) -> None:
    """Run it; its progress bars go to our standard error and, with all else that it says, into the log."""
    module = f"{__package__}.harness_process"
    command = [sys.executable, "-m", module, "run", "--config", str(folder / "config.json")]
    key = api_key(recipe.api_key_env) if server else ""
    path, tail = folder / LOG, b""
    with as_data_error(path, "write"), open(path, "ab") as file:  # a run that goes on adds to it
        process = subprocess.Popen(command, env=_environment(server, key), stdout=file, stderr=subprocess.PIPE)
        assert isinstance(process.stderr, BufferedReader)  # a pipe of bytes is one
        read = partial(process.stderr.read1, 1 << 16)
        try:
            secret = key.encode() if len(key) > 3 else b""  # a shorter one keeps nobody out, and would tear words apart
            for part in _without(secret, iter(read, b"")):
                file.write(part)
                tail = (tail + part)[-(1 << 16) :]
                sys.stderr.write(part.decode("utf-8", "replace"))
                sys.stderr.flush()
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code or not any(folder.glob("results_*.json")):
        lines = [line.strip() for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if ERROR.match(line)), lines[-1] if lines else "it said nothing")
        hint = next((hint for words, hint in HINTS.items() if words in said), "")
        raise DataError(
            f"lm-evaluation-harness ended with {code} for {model.name}: {excerpt(said, 200)}; {hint}see {path}."
        )


def _environment(server: str | None, key: str) -> dict[str, str]:
    """Return the environment of the process: with the server's key, and no proxy for a server on this machine."""
    if not server:
        return dict(os.environ)
    found = os.environ | {"OPENAI_API_KEY": key}
    if is_local(host := httpx.URL(server).host):
        direct = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host)))
        found |= {"no_proxy": direct, "NO_PROXY": direct}
    return found


def _without(key: bytes, parts: Iterator[bytes]) -> Iterator[bytes]:
    """Bytes in which a key that a server repeats is not to be read, even if it is spread over two parts."""
    held = b""
    for part in parts:
        text = (held + part).replace(key, b"***") if key else part
        begun = next((n for n in range(len(key) - 1, 0, -1) if text.endswith(key[:n])), 0)
        held = text[len(text) - begun :]
        yield text[: len(text) - begun]
    yield held


def read_results(path: Path, model: str, tasks: list[str]) -> list[dict]:
    """Return what the harness' results file says; see `run_harness`.

    Raises:
        DataError: There is nothing in it of a task.
    """
    found = _read(path)
    results = []
    for task in tasks:
        lines = _task_results(found, task)
        if not lines:
            raise DataError(f"{path} has no result of the task `{task}`; see the log beside it.")
        results += [{"model": model} | line for line in lines]
    return list({(result["task"], result["metric"]): result for result in results}.values())


def _task_results(found: dict, task: str) -> list[dict]:
    """Return the results of a task or group; else of the tasks in it, or that a pattern names (`leaderboard_*`)."""
    numbers = found["results"].get(task, {})
    results = []
    for key, value in numbers.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{metric}_stderr,{kind}")
        results.append({
            "task": task, "metric": metric if kind == "none" else f"{metric} ({kind})", "value": value,
            "stderr": error if isinstance(error, int | float) else None, "n": _count(found, task),
        })  # fmt: skip
    if results:
        return results
    parts = found.get("group_subtasks", {}).get(task, [])
    if "*" in task:
        parts = [name for name in found["results"] if Path(name).match(task)]
    return [result for name in parts if name != task for result in _task_results(found, name)]


def _count(found: dict, task: str) -> int | None:
    """Questions of a task, or of all tasks of a group."""
    if task in found.get("n-samples", {}):
        return found["n-samples"][task]["effective"]
    counts = [_count(found, name) for name in found.get("group_subtasks", {}).get(task, [])]
    return sum(filter(None, counts)) or None


def _read(path: Path) -> dict:
    """Return a file's JSON object, an empty one where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
