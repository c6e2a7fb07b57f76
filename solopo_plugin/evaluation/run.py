"""An evaluation from recipe to report: questions, answers of each model, scores. It can be killed and continues.

items.json says of every benchmark in items.jsonl what it was made from; one that is still the same is kept. The first
line of answers/<model>.jsonl says what settings and model its answers come from. With others they are asked anew;
answers to a question whose prompt has changed are dropped one by one.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..host.template import encode_prompt
from ..qa.files import Appender, DataError, alone_in, dump, explained, read_jsonl, replacing, write_json, write_jsonl
from ..qa.generate import check_backend, generate
from ..qa.generate.calls import Call, Model, load_chat
from ..qa.provenance import ADAPTER, TOKENIZER, WEIGHTS, file_hash, folder_hash
from ..qa.recipe import settings
from .items import Item, read_items
from .models import ModelRef, find_models, tokenizer_of
from .recipe import EvalRecipe, sources
from .score import answer_field, stored_answers

log = logging.getLogger(__name__)
ITEMS, ITEMS_MANIFEST, MODELS = "items.jsonl", "items.json", "models.json"
PRIVATE = ("server_urls", "api_key_env", "extra_body")  # keys of a recipe that no report shows
Key = tuple[str, str, str]


def evaluate(recipe: EvalRecipe, rescore: bool = False, resume: bool = True) -> dict:
    """Ask what is not answered, score, compare, report; returns what results.json holds.

    Args:
        rescore: Load no model: score and report again what is answered.
        resume: False: make all questions and ask for all answers again.

    Raises:
        DataError: Something that the user has to put right, or another run at work in the same folder.
    """
    folder = Path(recipe.output_dir)
    with alone_in(folder, "output_dir"):
        from .report import write_report
        from .results import make_results, pairs_of, rows_of
        from .score import write_scores

        models = stored_models(folder) if rescore else find_models(recipe)
        # a wrong name is better told now than at the end
        pairs_of(recipe.compare, rows_of(recipe.runs, [model.name for model in models]))
        if not rescore:
            write_json(folder / MODELS, [asdict(model) for model in models])
            if recipe.benchmarks:
                answer_all(recipe, models, resume)
        else:
            log.info(f"scored again, as the last run had them: {', '.join(model.name for model in models)}.")
            if recipe.benchmarks:
                check_asked_so(recipe, models)
        for model in models if recipe.benchmarks else ():
            write_scores(folder, model.name)
        harness = [row for model in models for row in harness_rows(recipe, model, rescore)]
        results = make_results(
            folder, [asdict(model) for model in models], public_settings(recipe), recipe.select_by, recipe.compare,
            recipe.bootstrap_samples, recipe.seed, harness, recipe.runs,
        )  # fmt: skip
        write_report(folder)
    return results


def answer_all(recipe: EvalRecipe, models: list[ModelRef], resume: bool = True) -> None:
    """Make the questions, with the first model's tokenizer where lengths matter, and ask every model."""
    prepare_items(recipe, models[0], resume)
    hashes, longest = {}, 0
    for item in read_items(Path(recipe.output_dir) / ITEMS):
        hashes[item.key] = item.prompt_hash
        longest = max(longest, item.max_new_tokens or recipe.max_new_tokens)
    for model in models:
        if resume:
            _take_over(Path(recipe.output_dir, "answers"), model.name, fingerprint(recipe, model), models)
        ask(recipe, model, hashes, recipe.max_input_tokens + longest, len(models) == 1, resume)


def harness_rows(recipe: EvalRecipe, model: ModelRef, rescore: bool) -> list[dict]:
    """Results of lm-evaluation-harness for a model; with `rescore` those that are there."""
    if not recipe.harness_tasks:
        return []
    from .harness import kept_rows, run_harness

    folder = Path(recipe.output_dir)
    return kept_rows(model, folder) if rescore else run_harness(model, recipe, folder)


def stored_models(folder: Path) -> list[ModelRef]:
    """The models of the last run in an evaluation's folder."""
    path = folder / MODELS
    with explained(path, "read"):
        text = path.read_bytes()
    try:
        return [ModelRef(**row) for row in json.loads(text)]
    except (ValueError, TypeError):
        raise DataError(f"{path} is no list of models of ours; evaluate without `--rescore`.") from None


def check_asked_so(recipe: EvalRecipe, models: list[ModelRef]) -> None:
    """Refuse to report stored answers under settings that they were not asked with.

    Raises:
        DataError: What differs; models' files are not looked at, since they may be gone.
    """
    folder = Path(recipe.output_dir)
    made = {name: entry["made_from"]["settings"] for name, entry in _items_manifest(folder).items()}
    wanted = {name: settings(recipe, "items") | settings(recipe, name) for name in recipe.benchmarks}
    pairs = [(made[name], keys) for name, keys in wanted.items() if name in made]
    if made and set(made) != set(recipe.benchmarks):
        pairs.append(({"benchmarks": sorted(made)}, {"benchmarks": sorted(recipe.benchmarks)}))
    for model in models:
        first = next(read_jsonl(folder / "answers" / f"{model.name}.jsonl"), {}).get("fingerprint") or {}
        pairs.append((first, {name: value for name, value in asked_with(recipe, model).items() if name in first}))
    for old, new in pairs:
        if changed := _changes({name: old[name] for name in new if name in old}, new):
            raise DataError(f"`--rescore` keeps what {folder} was asked with, but {changed}; leave `--rescore` out.")


def public_settings(recipe: EvalRecipe) -> dict[str, Any]:
    """The recipe's keys that are set, without addresses."""
    return {name: value for name, value in asdict(recipe).items() if value is not None and name not in PRIVATE}


# ---- questions


def prepare_items(recipe: EvalRecipe, model: ModelRef, resume: bool = True) -> dict[str, int]:
    """Write items.jsonl, keeping the benchmarks that are as they would be made; returns questions by benchmark."""
    from .benchmarks import BENCHMARKS

    folder = Path(recipe.output_dir)
    path, chat = folder / ITEMS, replace(recipe, model_name_or_path=tokenizer_of(recipe, model))
    wanted = {name: _made_from(recipe, name, chat.model_name_or_path) for name in recipe.benchmarks}
    before = _items_manifest(folder) if resume else {}
    kept = [name for name in wanted if name in before and before[name]["made_from"] == wanted[name]]
    if set(kept) == set(wanted) == set(before):
        log.info("questions: made before, kept.")
        return {name: entry["questions"] for name, entry in before.items()}
    tokens = ()
    if set(kept) != set(wanted):
        check_backend(recipe)
        tokens = load_chat(chat)
    entries, seen = {}, set()
    with replacing(path) as out:
        for name in wanted:
            start = out.tell()
            if name in kept:
                _copy(path, before[name]["start"], before[name]["end"], out)
                questions = before[name]["questions"]
            else:
                questions = _write_items(name, BENCHMARKS[name](recipe, *tokens), seen, out)
                log.info(f"{name}: {questions} questions.")
            entries[name] = {
                "made_from": wanted[name], "questions": questions, "start": start, "end": out.tell()
            }  # fmt: skip
    write_json(folder / ITEMS_MANIFEST, {"hash": file_hash(path), "benchmarks": entries})
    return {name: entry["questions"] for name, entry in entries.items()}


def _made_from(recipe: EvalRecipe, benchmark: str, tokenizer: str) -> dict:
    """All on which a benchmark's questions depend: keys, files, the tokenizer that measures lengths."""
    files = {}
    for path in sources(recipe, benchmark):
        files[str(path)] = folder_hash(path, ("**/*",)) if path.is_dir() else file_hash(path)
    is_folder = Path(tokenizer).is_dir()
    return {
        "settings": settings(recipe, "items") | settings(recipe, benchmark),
        "files": files,
        "tokenizer": folder_hash(Path(tokenizer), TOKENIZER) if is_folder else tokenizer,
    }


def _items_manifest(folder: Path) -> dict:
    """Benchmarks of items.jsonl, none where it is not as it was written."""
    try:
        manifest = json.loads((folder / ITEMS_MANIFEST).read_bytes())
        return manifest["benchmarks"] if manifest["hash"] == file_hash(folder / ITEMS) else {}
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return {}


def _write_items(benchmark: str, items: Iterator[Item], seen: set[Key], out) -> int:
    count = 0
    for item in tqdm(items, desc=benchmark, unit=" questions", disable=None):
        if item.key in seen:
            raise DataError(f"`{benchmark}` has the question {item.id!r} of {item.task} twice; ids must differ.")
        seen.add(item.key)
        out.write(dump(item.as_dict()) + b"\n")
        count += 1
    if not count:
        raise DataError(f"`{benchmark}` has no question; check its files and the keys that begin like it.")
    return count


def _copy(path: Path, start: int, end: int, out) -> None:
    with open(path, "rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(1 << 20, end - start))
            out.write(block)
            start += len(block)


# ---- answers


def ask(
    recipe: EvalRecipe, model: ModelRef, hashes: dict[Key, str], window: int, alone: bool = True, resume: bool = True
) -> None:
    """Have one model answer what it has not yet.

    Args:
        hashes: Prompt hash of every question.
        window: Tokens that the longest prompt and answer may have together.
        alone: It is the only model, so that a server with a single one must mean it.
    """
    path = Path(recipe.output_dir) / "answers" / f"{model.name}.jsonl"
    have = _tidy(path, fingerprint(recipe, model), hashes, resume)
    if missing := len(hashes) - len(have):
        log.info(f"{model.name}: {missing} of {len(hashes)} questions to be asked.")
        chat = replace(
            recipe,
            model_name_or_path=tokenizer_of(recipe, model),
            server_urls=_of(recipe.server_urls, model, "server_urls"),
            served_model=_of(recipe.served_model, model, "served_model"),
        )
        names = tuple(dict.fromkeys((model.name, model.place)))
        loaded = Model(model.path, model.adapter, recipe.rope_factor, window, names, alone)
        pending: dict[str, dict] = {}
        bar = tqdm(total=len(hashes), initial=len(have), unit=" answers", desc=model.name)
        with Appender(path) as file, bar:
            for reply in generate(chat, _calls(chat, have, pending), loaded):
                row = pending.pop(reply.id)
                _compare_tokens(recipe, row, reply.prompt_tokens)
                text, finish_reason = reply.answers[0]
                file.append(row | {"text": text, "finish_reason": finish_reason})
                bar.update()
        if pending:
            raise DataError(f"{path}: {len(pending)} questions got no answer, {min(pending)} is one; start again.")
    _report_cuts(path, model, recipe)


def fingerprint(recipe: EvalRecipe, model: ModelRef) -> dict[str, Any]:
    """All on which a model's answers depend but the prompts: keys that matter, and its files or its name."""
    chosen = asked_with(recipe, model)
    patterns = {"model": TOKENIZER + WEIGHTS, "adapter": ADAPTER, "tokenizer": TOKENIZER}
    tokenizer = tokenizer_of(recipe, model)
    apart = tokenizer if tokenizer != model.path else None  # where it is not the model's own
    for what, place in (("model", model.path), ("adapter", model.adapter), ("tokenizer", apart)):
        if place and Path(place).is_dir():
            chosen[f"files of the {what}"] = folder_hash(Path(place), patterns[what])
        else:
            chosen[what] = place
    return chosen


def asked_with(recipe: EvalRecipe, model: ModelRef) -> dict[str, Any]:
    """The keys on which a model's answers depend."""
    chosen = settings(recipe, "answers")
    for name in ("model_name_or_path", *(("top_p", "seed") if recipe.temperature == 0 else ())):
        del chosen[name]
    return chosen | {"served_model": _of(recipe.served_model, model, "served_model")}


def _of(value: str | dict | None, model: ModelRef, key: str) -> str | None:
    """A key's value for a model, where it may have one for each."""
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get(model.name), str):
        raise DataError(f"`{key}` says nothing of the model {model.name}, only of {', '.join(map(str, value))}.")
    return value[model.name]


def _tidy(path: Path, chosen: dict, hashes: dict[Key, str], resume: bool) -> set[Key]:
    """Bring a file of answers in order; returns the questions it answers.

    Answers of other settings are put aside, and come back with their settings; those to other prompts are removed.
    Those to questions that are not asked now stay: they may be asked again.
    """
    known = _aside(path, chosen)
    if not resume:
        path.unlink(missing_ok=True)
        known.unlink(missing_ok=True)
    with Appender(path):  # cuts off half a line that a killed run left
        first = next(read_jsonl(path), None)
    if first is not None and (changed := _changes(first.get("fingerprint"), chosen)):
        aside = _aside(path, first.get("fingerprint"))
        how = f"taken up again from {known.name}" if known.exists() else "asked anew"
        log.warning(f"{path}: {how}, because {changed}; the answers so far are in {aside.name}.")
        os.replace(path, aside)
        first = None
    if first is None:
        if known.exists():
            os.replace(known, path)
            return _tidy(path, chosen, hashes, resume)
        write_jsonl(path, [{"fingerprint": chosen}])
        return set()
    have, outdated, double = set(), 0, 0
    for number, _, row in stored_answers(path):
        *names, prompt = (answer_field(row, name, path, number) for name in ("benchmark", "task", "id", "prompt_hash"))
        key = tuple(names)
        outdated += (stale := hashes.get(key, prompt) != prompt)
        double += key in have
        if not stale:
            have.add(key)
    if outdated or double:
        log.warning(f"{path}: {outdated} answers to questions that have changed since are dropped and asked for again.")
        _drop(path, hashes)
    return have & hashes.keys()


def _take_over(folder: Path, name: str, chosen: dict, models: list[ModelRef]) -> None:
    """Copy the answers of a model that is there under another name than it was, known by the same fingerprint.

    Args:
        folder: Of the files of answers.
        models: Those of this evaluation, each of which is asked for itself.
    """
    path, others = folder / f"{name}.jsonl", {f"{model.name}.jsonl" for model in models}
    if path.exists():
        return
    for former in sorted(folder.glob("*.jsonl")):
        if former.name not in others and _asked_so(former) == chosen:
            log.info(f"{name}: the same model was asked as {former.stem}; its answers are taken over.")
            with replacing(path) as out:
                _copy(former, 0, former.stat().st_size, out)
            return


def _asked_so(path: Path) -> Any:
    """Return the fingerprint in the first line of a file of answers, None if it has none or is damaged."""
    with suppress(DataError):
        return next(read_jsonl(path), {}).get("fingerprint")


def _aside(path: Path, chosen: Any) -> Path:
    """Where answers asked for in this way are while others are in use."""
    return path.with_suffix(f".{hashlib.sha256(dump(chosen)).hexdigest()[:16]}.old")


def _drop(path: Path, hashes: dict[Key, str]) -> None:
    """Remove answers to other prompts than those of `hashes`, and second ones."""
    seen = set()

    def rows() -> Iterator[dict]:
        for row in read_jsonl(path):
            key = (row.get("benchmark"), row.get("task"), row.get("id"))
            if "fingerprint" not in row and (key in seen or hashes.get(key, row["prompt_hash"]) != row["prompt_hash"]):
                continue
            seen.add(key)
            yield row

    write_jsonl(path, rows())


def _changes(old: dict | None, new: dict) -> str:
    """What differs between two fingerprints, in words."""
    if not isinstance(old, dict):
        return "it does not say how they were asked for"
    phrases = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            known = name in old and name in new
            words = f"the {name} have changed" if name.startswith("files of") and known else None
            phrases.append(words or f"`{name}` was {old.get(name)!r} and is {new.get(name)!r}")
    return ", ".join(phrases)


def _calls(recipe: EvalRecipe, have: set[Key], pending: dict[str, dict]) -> Iterator[Call]:
    """The questions that are not answered, cut to `max_input_tokens`; `pending` gets the first half of their rows."""
    tokenizer, template = load_chat(recipe)
    for item in read_items(Path(recipe.output_dir) / ITEMS):
        if item.key in have:
            continue

        def encode(text: str) -> list[int]:
            return encode_prompt(tokenizer, template, text)

        prompt, tokens, cut = cut_middle(item.prompt, recipe.max_input_tokens, tokenizer, encode)
        name = json.dumps(item.key)
        pending[name] = {
            "benchmark": item.benchmark, "task": item.task, "id": item.id, "prompt_hash": item.prompt_hash,
            "prompt_tokens": tokens, "cut_tokens": cut,
        }  # fmt: skip
        yield Call(name, (0,), prompt, item.max_new_tokens)


def cut_middle(text: str, limit: int, tokenizer, encode: Callable[[str], list[int]]) -> tuple[str, int, int]:
    """A message whose templated prompt has at most `limit` tokens: its first and its last half, as in LongBench.

    LongBench cuts the message and leaves room for the template by a lower limit; here the template is counted.

    Args:
        encode: Message -> ids of the templated prompt.

    Returns:
        The message, tokens of its prompt, and how many tokens fewer these are than those of the whole.

    Raises:
        DataError: The template alone is longer.
    """
    whole = tokens = len(encode(text))
    if whole <= limit:
        return text, whole, 0
    ids = tokenizer.encode(text, add_special_tokens=False)
    keep = len(ids) - (whole - limit)
    while tokens > limit:
        if keep < 2:
            raise DataError(f"`max_input_tokens: {limit}` leaves no room for a question beside the template; raise it.")
        half = keep // 2
        # half a character at the cut is left out, so that both parts are the message's own words
        head = tokenizer.decode(ids[: keep - half], skip_special_tokens=True).rstrip("\ufffd")
        tail = tokenizer.decode(ids[len(ids) - half :], skip_special_tokens=True).lstrip("\ufffd")
        text = head + tail
        tokens = len(encode(text))
        keep -= max(1, tokens - limit)
    return text, tokens, whole - tokens


_warned = False


def _compare_tokens(recipe: EvalRecipe, row: dict, counted: int | None) -> None:
    """Say once if a server sees other tokens than training does."""
    global _warned
    if not _warned and counted not in (None, row["prompt_tokens"]):
        _warned = True
        log.warning(
            f"The server counts {counted} prompt tokens for {row['task']}/{row['id']} where `template: "
            f"{recipe.template}` has {row['prompt_tokens']}: its chat template is another one; use "
            "`openai_endpoint: completions`, or serve with that template."
        )


def _report_cuts(path: Path, model: ModelRef, recipe: EvalRecipe) -> None:
    asked, cut = Counter(), Counter()
    for row in read_jsonl(path):
        if row.get("benchmark") in recipe.benchmarks:
            asked[row["benchmark"]] += 1
            cut[row["benchmark"]] += bool(row.get("cut_tokens"))
    for name, n in asked.items():
        tell = log.warning if cut[name] else log.info
        tell(
            f"{model.name}: {name}: {n} answers; {cut[name]} prompts were longer than {recipe.max_input_tokens} tokens "
            "and lost their middle."
        )
