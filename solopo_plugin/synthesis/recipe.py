"""Every key of a data recipe: its default, where the default comes from, which stages it concerns, what is refused.

This is the one definition: recipes, the manifest's settings and the documentation derive from it or are tested against
it. A key that names no stage changes how fast rows are made, never which.
"""

import logging
import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from ..qa import kinds
from ..qa.answers import RULE
from ..qa.files import DataError, split_names
from ..qa.generate.calls import Model
from ..qa.provenance import BINARIES, TOKENIZER, WEIGHTS, file_hash, folder_hash, model_hash
from ..qa.recipe import Sampling, build, key, pick, read_values, settings, shared
from .folder import folder_digest, is_folder_of_documents

log = logging.getLogger(__name__)
RUBRIC_TOKENS = 1024  # room for what the judge is told, the question and the template; ours
Format = Literal["auto", "documents", "musique", "hotpotqa", "2wikimultihopqa", "squad", "plain", "retrieval"]


@dataclass(config=kinds.STRICT, kw_only=True)
class DataRecipe:
    """Hold the keys of a recipe under examples/yaml/data/.

    Token counts are of the templated prompt, in the model's tokens.
    """

    served_key: ClassVar[str] = "served_model"  # what the recipe calls the served name of the model that answers

    # model
    model_name_or_path: kinds.Needed = key(
        ...,
        "documents ask filter contexts sample judge select",
        "The instruct model that is to be trained; it samples its own pairs. Required.",
    )
    template: kinds.Needed = shared("template", "ask filter contexts sample judge select")
    default_system: str | None = shared("default_system", "ask filter contexts sample select")
    enable_thinking: bool = shared("enable_thinking", "ask filter contexts sample judge select")
    trust_remote_code: bool = shared("trust_remote_code", "")

    # documents, read
    input: kinds.Needed = key(
        ...,
        "documents read",
        "A folder of documents; or questions: a file of JSON or parquet, a folder, or a hub name; several with commas. "
        "Required.",
    )
    input_format: Format = key(
        "auto", "documents read", "What `input` holds; `auto` tells a folder of documents, and rows by their keys."
    )

    passage_tokens: kinds.Count = key(
        200, "documents", "Tokens of a passage at most. Ours: several then fit into a short context."
    )

    # read
    input_subset: str | None = key(None, "read", "Configuration of a hub data set, such as `distractor` of HotpotQA.")
    input_split: str = key("train", "read", "Split of a hub data set.")
    corpus: str | None = key(
        None, "read", "A file of documents (id, title, text): further distractors, and what evidence may name."
    )
    skip_bad: bool = key(False, "read", "Count and skip bad lines instead of stopping at the first.")
    max_questions: kinds.Count | None = key(
        None,
        "filter read",
        "Use a seeded random choice of so many questions, by document and hops in turn if a model asks; null: all. "
        "Each costs 2 x num_samples answers.",
    )

    # ask
    max_passages: kinds.Count | None = key(
        None, "ask", "Ask about a seeded random choice of so many passages; null: all."
    )
    pairs_per_passage: kinds.NotNegative = key(
        0.5, "ask", "Pairs that are asked about, for two hops, for each passage that is asked about alone. Ours."
    )
    candidates: kinds.Count = key(2, "ask", "Questions asked for about each passage and each pair. Ours.")
    ask_prompts: str | None = key(
        None, "ask filter", "A folder whose ask_one.txt, ask_two.txt and unaided.txt take the place of ours."
    )
    ask_model_name_or_path: str | None = key(
        None, "ask filter", "The model that asks, and answers with the evidence; null: model_name_or_path."
    )
    ask_template: str | None = key(None, "ask filter", "The host's chat template of that model; null: template.")
    ask_backend: kinds.Backend | None = key(None, "ask filter", "What asks that model; null: backend.")
    ask_server_urls: str | None = key(None, "", "`openai`: that model's addresses; null: server_urls.")
    ask_api_key_env: str | None = key(
        None, "", "`openai`: the environment variable of that model's key; null: api_key_env."
    )
    ask_served_model: str | None = key(
        None, "ask filter", "`openai`: that model's name at its server; null: ask_model_name_or_path, or served_model."
    )
    ask_openai_endpoint: kinds.Endpoint | None = key(
        None, "ask filter", "As openai_endpoint, for that model; null: openai_endpoint."
    )
    ask_extra_body: kinds.Written | None = key(
        None, "ask filter", "As extra_body, for that model; null: extra_body, and none for another model."
    )

    # filter
    answer_words: kinds.Count = key(8, "filter", "Words of a gold answer at most. Ours.")
    check_samples: kinds.Count = key(
        5, "filter", "Answers to each question with its evidence, without it, and with each of two passages. Ours."
    )
    min_agreement: kinds.Count = key(
        3, "filter", "So many of the answers with the evidence must give the gold answer. Ours."
    )
    max_known: kinds.Whole | None = key(
        1, "filter", "So many of the answers without the evidence may give the gold answer; null: not asked. Ours."
    )
    max_alone: kinds.Whole | None = key(
        1,
        "filter",
        "Two hops: so many of the answers with only one of the passages may give the gold answer; null: not asked. "
        "Ours.",
    )
    max_per_document: kinds.Count | None = key(
        None, "filter", "Questions of a document at most; null: as many as there are."
    )

    # contexts
    contexts: Literal["mixed", "document"] = key(
        "mixed",
        "contexts",
        "Long contexts of a folder of documents: `mixed` passages of all of them, or the `document` of the evidence.",
    )
    prompt: str | None = shared("prompt", "filter contexts")
    short_tokens: kinds.Count = key(1024, "contexts", "Short context, tokens at most. The paper's target (1K).")
    long_tokens: kinds.Count = key(8192, "contexts", "Long context, tokens at most. The paper's target (8K).")
    distractors: kinds.Distractors = shared("distractors", "contexts")
    allow_answer_in_distractors: bool = shared("allow_answer_in_distractors", "contexts")
    short_subset_of_long: bool = key(
        False, "contexts", "Short distractors are some of the long ones. False is our reading of the paper."
    )
    lossy_short: kinds.Share = key(
        0.0, "contexts", "Probability that the short context lacks one paragraph of the evidence. 0 in the paper."
    )
    num_workers: kinds.Count = key(1, "", "Processes that build contexts.")

    # sample
    num_samples: kinds.Count = key(32, "sample", "Answers per prompt. The paper's N.")
    temperature: kinds.NotNegative = shared("temperature", "ask filter sample")
    top_p: kinds.Nucleus = shared("top_p", "ask filter sample")
    max_new_tokens: kinds.Count = shared("max_new_tokens", "ask filter sample select")
    sample_long: bool = key(True, "sample", "Also sample on the long contexts: for D_long, and to prefer questions.")
    backend: kinds.Backend = shared("backend", "ask filter sample judge")
    server_urls: str | None = key(
        None, "", "`openai`: addresses such as http://localhost:8000/v1; several with commas share the load."
    )
    api_key_env: str = shared("api_key_env", "")
    served_model: str | None = key(
        None,
        "ask filter sample judge",
        "`openai`: the model's name at the server; null: model_name_or_path, or the only one it has.",
    )
    openai_endpoint: kinds.Endpoint = shared("openai_endpoint", "ask filter sample")
    extra_body: kinds.Written | None = shared("extra_body", "ask filter sample")
    answers_per_call: kinds.Count | None = key(
        None, "sample", "Answers asked for in one call; null: num_samples, and 8 with `transformers`."
    )
    concurrency: kinds.Count = shared("concurrency", "")
    timeout: kinds.Positive = shared("timeout", "")
    retries: kinds.Whole = shared("retries", "")
    tensor_parallel_size: kinds.Count = shared("tensor_parallel_size", "")

    # judge
    judge: Literal["rule", "model"] = key(
        "rule",
        "read judge select",
        "`rule`: what holds a gold answer is right, as in the paper; `model`: a model grades.",
    )
    judge_form: Literal["score", "pairwise"] = key(
        "score", "judge select", "`score`: each answer from 1 to 10; `pairwise`: against others to the same prompt."
    )
    judge_rubric: str | None = key(
        None, "judge", "File of what the judge is told; null: ours, judge_<judge_form>.txt in synthesis/templates."
    )
    judge_model_name_or_path: str | None = key(None, "judge", "The model that judges; null: model_name_or_path.")
    judge_template: str | None = key(None, "judge", "The host's chat template of that model; null: template.")
    judge_backend: kinds.Backend | None = key(None, "judge", "What asks the judge; null: backend.")
    judge_server_urls: str | None = key(None, "", "`openai`: the judge's addresses; null: server_urls.")
    judge_api_key_env: str | None = key(
        None, "", "`openai`: the environment variable of the judge's key; null: api_key_env."
    )
    judge_served_model: str | None = key(
        None, "judge", "`openai`: the judge's name at its server; null: judge_model_name_or_path, or served_model."
    )
    judge_openai_endpoint: kinds.Endpoint = key("chat", "judge", "As openai_endpoint, for the judge.")
    judge_extra_body: kinds.Written | None = key(None, "judge", "As extra_body, for the judge.")
    judge_temperature: kinds.NotNegative = key(0.0, "judge", "0 is greedy. Ours.")
    judge_max_new_tokens: kinds.Count = key(512, "judge", "Tokens of a verdict at most. Ours.")
    judge_samples: kinds.Count = key(
        1, "judge", "Verdicts on each order of the positions, averaged; more need judge_temperature above 0. Ours."
    )
    judge_rivals: kinds.Count = key(
        2, "judge", "`pairwise`: comparisons per answer; each answer is in twice as many. Ours."
    )
    judge_chosen_min: kinds.Grade = key(7.0, "judge select", "The grade from which on an answer is right. Ours.")
    judge_rejected_max: kinds.Grade = key(4.0, "select", "The grade up to which an answer may be rejected. Ours.")
    judge_margin: kinds.Positive = key(3.0, "select", "Grades between chosen and rejected at least. Ours.")

    # select
    num_rows: kinds.Count = key(5000, "select", "Rows of the finished set, validation included. The paper's 5,000.")
    val_size: kinds.NotNegative = key(
        0.0, "select", "Validation rows: a share below 1, or a number of rows; by question. 0 is the host's default."
    )
    num_rejected: kinds.Count = key(
        1, "select export", "Rejected answers of a row at most, as a list if above 1. 1 is the paper's."
    )
    balance_length: bool = key(False, "select", "Choose pairs so that chosen and rejected are alike in length.")
    cutoff_len: kinds.Count = key(
        10240, "select", "Prompt + response at most, as in training; longer ones are dropped. That of our recipes."
    )

    # export
    dataset_dir: str = key("data", "export", "Folder of dataset_info.json. The host's key and default.")
    dataset_name: kinds.Needed = key(
        ..., "export", "Entries are called <dataset_name>_solopo, _short_po and so on. Required."
    )
    export_format: Literal["jsonl", "parquet"] = key("jsonl", "export", "File format of the rows.")

    # all
    work_dir: kinds.Needed = key(
        ..., "", "Folder of intermediate files and the manifest; a run continues from it. Required."
    )
    seed: kinds.Seed = shared("seed", "ask filter read contexts sample judge select")

    @property
    def model(self) -> Model:
        """Return the model that answers, with room for the long contexts."""
        return Model(
            self.model_name_or_path, server_urls=self.server_urls, served_model=self.served_model,
            window=self.long_tokens + self.max_new_tokens,
            shorten="lower `long_tokens` or `max_new_tokens`, or set `sample_long: false`",
            served_key=self.served_key,
        )  # fmt: skip

    @property
    def asker(self) -> "DataRecipe":
        """Return the recipe with the model that asks in place of the one that is trained, if it is another one.

        Another model gets neither the system prompt of the one that is trained nor its `extra_body`.
        """
        own = {name: value for name in ASKER if (value := getattr(self, f"ask_{name}")) is not None}
        if not own.keys() & ASKED:
            return replace(self, **own)
        others = {"default_system": None, "extra_body": None, "served_model": None}
        return _RecipeOfAsker(**vars(self) | others | own)

    @property
    def another_asks(self) -> bool:
        """Return whether any key of the recipe that asks is another one than the model that is trained has."""
        return vars(self.asker) != vars(self)  # by `==` a recipe of another type is another one

    @property
    def judging(self) -> tuple[Sampling, Model]:
        """Return how the judge is asked, and which model it is: the one that answers, unless keys say otherwise."""
        sampling = replace(
            pick(self, Sampling), default_system=None, top_p=1.0, temperature=self.judge_temperature,
            template=self.judge_template or self.template, backend=self.judge_backend or self.backend,
            api_key_env=self.judge_api_key_env or self.api_key_env, extra_body=self.judge_extra_body,
            openai_endpoint=self.judge_openai_endpoint, max_new_tokens=self.judge_max_new_tokens,
        )  # fmt: skip
        own, another = self.judge_model_name_or_path, self.judge_model_name_or_path or self.judge_server_urls
        return sampling, Model(
            own or self.model_name_or_path,
            server_urls=self.judge_server_urls or self.server_urls,
            served_model=self.judge_served_model or (None if another else self.served_model),
            served_key="judge_served_model" if another else "served_model",
            shorten="lower `short_tokens`, `max_new_tokens` or `judge_max_new_tokens`",
            window=self.short_tokens + 2 * self.max_new_tokens + RUBRIC_TOKENS + self.judge_max_new_tokens,
        )


class _RecipeOfAsker(DataRecipe):
    """Hold the keys of a recipe with another model that asks in place of the one that is trained."""

    served_key = "ask_served_model"


# keys of the model that is trained which, with `ask_` before them, are those of the model that asks
ASKER = "model_name_or_path template backend server_urls api_key_env served_model openai_endpoint extra_body".split()
ASKED = {"model_name_or_path", "server_urls", "served_model"}  # those of them that say which model it is
# keys that came later, with the value that changes nothing: a manifest names other values alone
UNSAID = {"contexts": "mixed", "num_rejected": 1, "judge": "rule", "max_alone": None} | {
    f"ask_{name}": None for name in ASKER
}
FIELDS = {f.name: f for f in fields(DataRecipe)}
PROMPTS = {"ask": ("ask_one.txt", "ask_two.txt"), "filter": ("unaided.txt",)}  # files of prompts, by stage
ENTRY_NAME = re.compile(r"(?!\s)[^/\\,\x00-\x1f\x7f]+(?<!\s)")


def prompt_file(recipe: DataRecipe, name: str) -> Path:
    """Return the place of one of the prompts of asking: in the folder `ask_prompts` if it is there, else ours."""
    own = Path(recipe.ask_prompts or "", name)
    return own if recipe.ask_prompts and own.exists() else Path(__file__).parent / "templates" / name


def from_documents(recipe: DataRecipe) -> bool:
    """Return whether a recipe makes its questions from documents, and does not read them."""
    if recipe.input_format == "auto":
        return is_folder_of_documents(Path(recipe.input))
    return recipe.input_format == "documents"


def outside_inputs(recipe: DataRecipe, stage: str) -> dict[str, str]:
    """Return hashes of what a stage reads from outside the work folder: its `input`, and a model that is a folder.

    The judge's rule is one, too: verdicts that another version of this project gave are given again.
    What lies on a hub is known by its name alone; so is what is behind a server, unless nothing is said of its name
    there and the folder holds weights, which then are taken to be the server's.
    """
    if stage == "read":
        names = [*split_names(recipe.input), *([recipe.corpus] if recipe.corpus else [])]
        return {
            name: file_hash(name) if os.path.isfile(name) else folder_digest(Path(name), links=True)
            for name in names
            if os.path.isfile(name) or os.path.isdir(name)
        }
    if stage == "judge":
        found = {"the rule of `gives_answer`": str(RULE)}
        if recipe.judge == "rule":
            return found
        sampling, model = recipe.judging
        rubric = rubric_file(recipe)
        return found | {rubric.name: file_hash(rubric)} | _answering(model.path, sampling.backend, model.served_model)
    files = {recipe.input: folder_digest(Path(recipe.input))} if stage == "documents" else {}
    if stage in ("ask", "filter") and recipe.ask_prompts:
        files = {
            str(path): file_hash(path) for name in PROMPTS[stage] if (path := Path(recipe.ask_prompts, name)).exists()
        }
    return files | _hash_of_model(recipe, stage)


def _hash_of_model(recipe: DataRecipe, stage: str) -> dict[str, str]:
    """Return the hash of what a stage uses of the model's folder, and of that of the model that asks, if it is one."""
    if "model_name_or_path" not in settings(recipe, stage):
        return {}
    answering = {"ask": [recipe.asker], "filter": [recipe.asker, recipe], "sample": [recipe]}.get(stage, [])
    model, found = Path(recipe.model_name_or_path), {}
    if recipe not in answering and model.is_dir():
        found = {str(model): folder_hash(model, TOKENIZER)}
    for who in answering:
        found |= _answering(who.model_name_or_path, who.backend, who.served_model)
    return found


def _answering(name: str, backend: str, served_model: str | None) -> dict[str, str]:
    """Return the hash of a model's folder by its name, weights included if they, as far as is known, answer."""
    model = Path(name)
    if not model.is_dir():
        return {}
    if backend == "openai" and served_model:
        return {str(model): folder_hash(model, TOKENIZER)}
    if backend == "openai" and not any(any(model.glob(kind)) for kind in BINARIES):
        return {}
    return {str(model): model_hash(model, TOKENIZER + WEIGHTS)}


def rubric_file(recipe: DataRecipe) -> Path:
    """Return the file of what the judge is told."""
    return Path(recipe.judge_rubric or Path(__file__).parent / "templates" / f"judge_{recipe.judge_form}.txt")


def stage_settings(recipe: DataRecipe, stage: str) -> dict[str, Any]:
    """Return the keys on which a stage's results depend, with the recipe's values; `judge: rule` has no more than it.

    So a work folder from before there was another judge is finished as it was; from before there were other contexts
    than `mixed`, another model that asks, `max_alone` and `num_rejected`, too.
    """
    chosen = {name: v for name, v in settings(recipe, stage).items() if name not in UNSAID or v != UNSAID[name]}
    if recipe.judge == "rule":
        return {} if stage == "judge" else {name: v for name, v in chosen.items() if not name.startswith("judge")}
    return chosen


def model_files(made_from: dict[str, Any], inputs: dict[str, str]) -> str | None:
    """Return the hash of the model's folder if a stage knows the model by that, and None if by its name.

    Args:
        made_from: What `settings` returns, or returned.
        inputs: Hashes by name, those of `outside_inputs` among them.
    """
    return inputs.get(str(Path(made_from.get("model_name_or_path") or "")))


def load_recipe(path: str, overrides: list[str] | None = None) -> DataRecipe:
    """Read a recipe from a YAML file and `key=value` words that override it, as `llamafactory-cli` reads both.

    Raises:
        DataError: No such file, no YAML, an unknown key, or a value of the wrong type or out of range.
    """
    return make_recipe(read_values(path, overrides))


def make_recipe(values: dict[str, Any]) -> DataRecipe:
    """Make a recipe from a dict, checked.

    Raises:
        DataError: An unknown key (with the nearest one), a missing one, or a value of the wrong type or out of range.
    """
    recipe = build(DataRecipe, "data recipe", values)
    if recipe.short_tokens >= recipe.long_tokens:
        raise DataError(
            f"`short_tokens: {recipe.short_tokens}` must be below `long_tokens: {recipe.long_tokens}`; "
            "the contexts are to differ in length."
        )
    if recipe.cutoff_len < recipe.long_tokens + recipe.max_new_tokens:
        log.warning(
            f"`cutoff_len: {recipe.cutoff_len}` is below `long_tokens: {recipe.long_tokens}` + `max_new_tokens: "
            f"{recipe.max_new_tokens}`: answers that do not fit behind a long prompt are sampled, and then dropped."
        )
    if recipe.min_agreement > recipe.check_samples:
        raise DataError(
            f"`min_agreement: {recipe.min_agreement}` must be at most `check_samples: {recipe.check_samples}`, the "
            "answers of which so many have to agree."
        )
    if recipe.val_size >= 1 and recipe.val_size != int(recipe.val_size):
        raise DataError(f"`val_size` must be a share below 1 or a whole number of rows, got {recipe.val_size}.")
    if recipe.ask_prompts and not any(Path(recipe.ask_prompts, name).is_file() for name in sum(PROMPTS.values(), ())):
        raise DataError(
            f"`ask_prompts: {recipe.ask_prompts}` is no folder with a file of prompts; they are called "
            f"{', '.join(sum(PROMPTS.values(), ()))}."
        )
    changed = (
        name for name, spec in FIELDS.items() if name.startswith("judge_") and getattr(recipe, name) != spec.default
    )
    if recipe.judge == "rule" and (name := next(changed, None)):
        raise DataError(f"`{name}` is for `judge: model`; set that, or leave it out.")
    if not ENTRY_NAME.fullmatch(recipe.dataset_name):
        raise DataError(
            "`dataset_name` begins names of files in `dataset_dir`, and of entries that `dataset` lists with commas: "
            "it has no slash, comma or control character, and no blank at its ends; got "
            f"{recipe.dataset_name!r}."
        )
    return recipe
