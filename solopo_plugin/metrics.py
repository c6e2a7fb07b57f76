"""Metrics of question answering, as the benchmarks' own code computes them; pure functions of strings.

`normalize_answer`, `f1_score` and `exact_match` are SQuAD's (Rajpurkar et al. 2016), which LongBench v1 uses;
`string_match_part` is RULER's and `longbench_v2_choice` LongBench v2's. `sub_exact_match` and `extract_answer` judge
the samples of which preference pairs are made.
"""

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# `The answer is: X`, also with markdown around it; the space or colon keeps `The answer isn't` out
_MARKER = re.compile(r"the answer is(?:\s*\**:\**|(?=\s|\*))", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f]")
_CHOICES = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
NO_ANSWER = "no answer"  # normalised; what the prompt asks for where the documents do not tell


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: list[str]) -> bool:
    """Whether the prediction is one of the answers, in normal form."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def sub_exact_match(prediction: str, answers: list[str]) -> bool:
    """Whether one of the answers is a substring of the prediction, in normal form; an empty normal form never is."""
    text = normalize_answer(prediction)
    return any(answer and answer in text for answer in map(normalize_answer, answers))


def f1_score(prediction: str, answers: list[str]) -> float:
    """F1 of the words in normal form, from 0 to 1, best over the answers (LongBench v1 `qa_f1_score`)."""
    return max((_f1(normalize_answer(prediction).split(), normalize_answer(a).split()) for a in answers), default=0.0)


def _f1(words: list[str], gold: list[str]) -> float:
    same = sum((Counter(words) & Counter(gold)).values())
    if not same:
        return 0.0
    precision, recall = same / len(words), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def string_match_part(prediction: str, answers: list[str]) -> float:
    """RULER's score of question answering, 0 or 100: an answer is in the prediction, case apart, as it stands."""
    text = _CONTROL.sub("\n", prediction).strip().lower()
    return 100.0 * any(answer.lower() in text for answer in answers)


def longbench_v2_choice(response: str) -> str | None:
    """The letter A to D that LongBench v2's parser finds in a response, or None."""
    plain = response.replace("*", "")
    for pattern in _CHOICES:
        if match := pattern.search(plain):
            return match.group(1)
    return None


def extract_answer(text: str) -> str | None:
    """What follows the last `The answer is:` up to the end of its line; None where the marker is missing.

    The colon may be missing and the answer may stand on the next line; markdown around it is taken off. On the whole
    chain of thought a mere mention would count as an answer.
    """
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    lines = text[markers[-1].end() :].strip(" \t\r\n*:").split("\n", 1)
    return lines[0].strip(" \t\r*")
