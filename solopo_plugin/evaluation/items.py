"""Define a question of a benchmark, as it is asked and judged: what readers of benchmarks make and all else uses."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..qa.files import DataError, read_jsonl
from ..qa.prompts import prompt_hash

# benchmark -> metric of its table; the others are reported beside it
MAIN_METRIC = {
    "longbench_qa": "f1",  # LongBench v1's own, and the paper's
    "ruler_qa": "f1",  # the paper's; RULER's own is `string_match`
    "niah_plus": "sub_em",  # ours: whether the needle's answer is in what stands behind the marker
    "longbench_v2": "accuracy",
    "plain": "f1",  # of choices accuracy, see `main_metric`
    "validation": "sub_em",  # what the data pipeline judged its samples by
}
EACH_OWN = "f1_or_accuracy"  # of each question the main metric of its kind, where a benchmark has both kinds
# LongBench v1's question answering in English: the paper's tasks in its order, with their names, and whether an answer
# stands in a single document or in several
LONGBENCH = {
    "narrativeqa": ("NarrativeQA", "S-Doc"),
    "qasper": ("Qasper", "S-Doc"),
    "multifieldqa_en": ("MultiFieldQA-en", "S-Doc"),
    "hotpotqa": ("HotpotQA", "M-Doc"),
    "2wikimqa": ("2WikiMQA", "M-Doc"),
    "musique": ("MuSiQue", "M-Doc"),
}
# properties by which questions are grouped: columns of results.json and of the report's tables. `length` (tokens) and
# `depth` (percent) are what was asked for, `length_class` is LongBench's (words); `depths` are of a pair of needles
GROUPS = ("length", "depth", "length_class", "difficulty", "hops", "depths")
# benchmark with `prompts: official` -> tokens of an answer that its authors allow
OFFICIAL_TOKENS = {"longbench_v2": 128}  # pred.py of github.com/THUDM/LongBench


def main_metric(benchmark: str, metrics: Collection[str]) -> str:
    """Return the metric of a benchmark's table, of those that there are: files of one's own may have choices."""
    wanted = EACH_OWN, MAIN_METRIC.get(benchmark, ""), "accuracy"
    return next((name for name in wanted if name in metrics), wanted[1])


@dataclass(frozen=True)
class Item:
    """Hold one question, which is a line of items.jsonl. (benchmark, task, id) is unique."""

    benchmark: str  # a key of MAIN_METRIC
    task: str  # row of the benchmark's table, such as `musique` or `squad`
    id: str
    prompt: str  # the user's whole message; not yet cut to the model's window
    question: str
    answers: list[str]  # gold answer, then its aliases; of a choice the letter
    kind: Literal["qa", "choice"] = "qa"
    max_new_tokens: int | None = None  # None: the recipe's
    length: int | None = None  # target length of the prompt in tokens where contexts are built to one
    depth: float | None = None  # where the needle was put, in percent of the context, where that was asked for
    groups: dict[str, str] = field(default_factory=dict)  # further breakdowns, such as {"difficulty": "hard"}
    evidence: list[dict[str, Any]] = field(default_factory=list)  # {"paragraph" from 1, "start", "end"}: of the prompt

    @property
    def key(self) -> tuple[str, str, str]:
        """Name of the question in all files of an evaluation."""
        return self.benchmark, self.task, self.id

    @property
    def prompt_hash(self) -> str:
        """Hash of the uncut prompt: an answer with another one was given to another question."""
        return prompt_hash(self.prompt)

    def as_dict(self) -> dict[str, Any]:
        """Return the line of items.jsonl."""
        return asdict(self)


def read_items(path: Path | str) -> Iterator[Item]:
    """Yield the questions of an items.jsonl, one at a time.

    Raises:
        DataError: No such file, or a line is no question.
    """
    for row in read_jsonl(path):
        try:
            yield Item(**row)
        except TypeError as error:
            raise DataError(
                f"{path}: a line is no question of ours ({error}), {str(row)[:60]}; delete the file and start again."
            ) from None
