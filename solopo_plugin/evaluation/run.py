"""Run an evaluation from recipe to report: questions, answers of each model, scores. It can be killed and continues."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..qa.files import FORGOTTEN, DataError, lock_folder, set_aside, write_json
from ..qa.generate.calls import Model, load_chat
from ..qa.provenance import differences
from ..qa.ready import check_ready
from ..qa.recipe import Chat, pick, settings
from ..qa.store import STORE, Store
from .ask import answers_file, ask, asked_so, asked_with, fingerprint, key_of, take_in, write_answers
from .items import read_items
from .models import as_row, find_models, stored_models
from .prepare import ITEMS, items_manifest, prepare_items
from .recipe import EvalRecipe
from .score import stored_answers

log = logging.getLogger(__name__)
MODELS = "models.json"
PRIVATE = ("server_urls", "api_key_env")  # keys of a recipe that no report shows


def evaluate(recipe: EvalRecipe, rescore: bool = False, resume: bool = True) -> dict:
    """Ask what is not answered, score, compare, report; returns what results.json holds.

    Args:
        recipe: What is asked of which models.
        rescore: Load no model: score and report again what is answered.
        resume: False: make all questions and ask for all answers again; a run that is stopped goes on without it.

    Raises:
        DataError: Something that the user has to put right, or another run at work in the same folder.
    """
    folder = Path(recipe.output_dir)
    models = stored_models(recipe, folder / MODELS) if rescore else find_models(recipe)
    if recipe.benchmarks and not rescore and not (resume and (folder / STORE).exists()):
        named = [] if recipe.backend == "openai" else models  # a server has its own
        check_ready(recipe.backend, recipe.server_urls, {f"models: {model.name}": model.path for model in named})
    with lock_folder(folder, "output_dir"):
        from .harness import check_harness, check_kept, check_thoughts, kept_results, run_harness
        from .report import write_report
        from .results import make_results, pairs_of, report_rows
        from .score import write_scores

        # a mistake is better told now than at the end
        pairs_of(recipe.compare, report_rows(recipe.runs, [model.name for model in models]))
        to_run = []
        for model in models if recipe.harness_tasks else ():
            if rescore:
                check_kept(model, recipe, folder)
            elif check_harness(model, recipe, folder, resume):
                to_run.append(model)
        if to_run:
            check_thoughts(to_run, recipe)
        if not rescore:
            write_json(folder / MODELS, list(map(as_row, models)))
            if recipe.benchmarks:
                answer_all(recipe, models, resume)
            elif not resume:
                for place in _harness_folders(recipe, models):
                    shutil.rmtree(place, ignore_errors=True)
        else:
            log.info(f"scored again, as the last run had them: {', '.join(model.name for model in models)}.")
            if recipe.benchmarks:
                models = write_stored(folder, models)
                check_left(recipe, [model.name for model in models])
                check_asked_so(recipe, models)
        if recipe.benchmarks:
            write_scores(folder, [model.name for model in models], recipe.prompt)
        harness: list[dict] = []
        for model in models if recipe.harness_tasks else ():
            harness += kept_results(model, folder) if rescore else run_harness(model, recipe, folder)
        results = make_results(folder, list(map(as_row, models)), public_settings(recipe), harness)
        write_report(folder)
    return results


def answer_all(recipe: EvalRecipe, models: list[Model], resume: bool = True) -> None:
    """Make the questions, with the first model's tokenizer where lengths matter, and ask every model."""
    prepare_items(recipe, models[0], resume)
    folder, names = Path(recipe.output_dir), {model.name for model in models}
    hashes, longest = {}, 0
    for item in read_items(folder / ITEMS):
        hashes[key_of(item)] = item.prompt_hash
        longest = max(longest, item.max_new_tokens or recipe.max_new_tokens)
    shutil.rmtree(folder / FORGOTTEN, ignore_errors=True)  # of a run that was killed
    with Store(folder / STORE) as store, nullcontext() if resume else _anew(recipe, models, store):
        take_in(store, folder / "answers", names)
        for model in models:
            ask(recipe, model, store, hashes, recipe.max_input_tokens + longest, names)


@contextmanager
def _anew(recipe: EvalRecipe, models: list[Model], store: Store) -> Iterator[None]:
    """Forget what all models have answered with these settings, and their results of the harness.

    At once, so that a run that is stopped goes on without them also where it asks a model that it had not reached. One
    that fails before its first answer, as where a model or server does not start, has them again.
    """
    folder = Path(recipe.output_dir)
    for tokenizer in sorted({model.tokenizer for model in models}):
        load_chat(tokenizer, pick(recipe, Chat))
    sets = [(model.name, fingerprint(recipe, model)) for model in models]
    take_in(store, folder / "answers", set())
    places = [answers_file(folder, model) for model in models] + _harness_folders(recipe, models)

    def put_back() -> bool:
        if back := store.remember(sets):
            log.warning("All answers so far are there again; repeat `--no-resume` to begin anew.")
        return back

    try:
        with set_aside(places, folder / FORGOTTEN, put_back):
            store.forget(sets)
            yield
    finally:
        store.forget([])


def _harness_folders(recipe: EvalRecipe, models: list[Model]) -> list[Path]:
    return [Path(recipe.output_dir, "harness", model.name) for model in models if recipe.harness_tasks]


def write_stored(folder: Path, models: list[Model]) -> list[Model]:
    """Write the files of answers as the last run left them in the store, finished or not.

    Returns:
        The models that have answered something.

    Raises:
        DataError: None has.
    """
    if (folder / STORE).exists():
        hashes = {key_of(item): item.prompt_hash for item in read_items(folder / ITEMS)}
        with Store(folder / STORE) as store:
            for model in models:
                if last := store.last_used(model.name):
                    set_id, chosen = last
                    write_answers(store, answers_file(folder, model), set_id, chosen, hashes)
    files = {model.name: answers_file(folder, model) for model in models}
    answered = [m for m in models if files[m.name].exists() and any(True for _ in stored_answers(files[m.name]))]
    if not answered:
        raise DataError(f"{folder} holds no answers yet, which `--rescore` could score; leave it out.")
    for model in models:
        if model not in answered:
            log.warning("%s: nothing is answered yet; it is left out.", model.name)
    return answered


def check_left(recipe: EvalRecipe, names: list[str]) -> None:
    """Refuse comparisons and runs that need a model without an answer."""
    from .results import pairs_of, report_rows

    try:
        pairs_of(recipe.compare, report_rows(recipe.runs, names))
    except DataError:
        raise DataError(
            f"Only {', '.join(names)} answered, and `compare` or `runs` names others; leave `--rescore` out, or write "
            "`compare=null runs=null` behind it."
        ) from None


def check_asked_so(recipe: EvalRecipe, models: list[Model]) -> None:
    """Refuse to report stored answers under settings that they were not asked with.

    Raises:
        DataError: What differs; models' files are not looked at, since they may be gone.
    """
    folder = Path(recipe.output_dir)
    made = {name: entry["made_from"]["settings"] for name, entry in items_manifest(folder).items()}
    wanted = {name: settings(recipe, "items") | settings(recipe, name) for name in recipe.benchmarks}
    pairs = [(made[name], keys) for name, keys in wanted.items() if name in made]
    if made and set(made) != set(recipe.benchmarks):
        pairs.append(({"benchmarks": sorted(made)}, {"benchmarks": sorted(recipe.benchmarks)}))
    for model in models:
        pairs.append((asked_so(answers_file(folder, model)) or {}, asked_with(recipe, model)))
    for old, new in pairs:
        known = [name for name in new if name in old]  # an earlier version may not have written all
        if words := ", ".join(differences(*({name: keys[name] for name in known} for keys in (old, new)))):
            raise DataError(f"`--rescore` keeps what {folder} was asked with, but {words}; leave `--rescore` out.")


def public_settings(recipe: EvalRecipe) -> dict[str, Any]:
    """Return the recipe's keys that are set and used, without addresses."""
    shown = {name: value for name, value in asdict(recipe).items() if value is not None and name not in PRIVATE}
    if recipe.backend == "openai" and recipe.rope_factor:
        log.warning("`rope_factor: %g` is not used: a server is started with its own.", recipe.rope_factor)
        shown["rope_factor"] = "the server's own"
    return shown
