"""Metrics of question answering, as the benchmarks' own code computes them, and our rule for what a response answers.

`normalize_answer`, `f1_score` and `exact_match` are SQuAD's (Rajpurkar et al. 2016), which LongBench v1 uses;
`string_match_part` is RULER's and `longbench_v2_choice` LongBench v2's. `gives_answer` is ours, after the paper's
sub-EM: the one rule by which samples are judged, rows inspected and distractors that hold an answer left out. All are
pure functions of strings.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# those of the host's templates (`thought_words`), and what other models write
_THOUGHT = re.compile(r"<think(?:ing)?>|<seed:think>|◁think▷|\[think\]|<\|channel>thought|<\|channel\|>analysis", re.I)
_THOUGHT_END = re.compile(r"</think(?:ing)?>|</seed:think>|◁/think▷|\[/think\]|<channel\|>|<\|channel\|>final", re.I)
_MARKER = re.compile(r"the(?<![^\W_]the)[\s*_`]+answer[\s*_`]+is[\s*_`]*[:：∶꞉]", re.I)  # in markdown, full width
_LOOSE_MARKER = re.compile(r"the(?<![^\W_]the)\s+answer\s+is(?=[\s*])", re.I)  # the space keeps `The answer isn't` out
_LEAD = re.compile(r"(?:[\s*:：]+|[$`\\({[]+(?:boxed\{)?[^\S\n]*\n)*")  # markdown, and lines that only open a formula
_COMMAND = r"\\(?:boxed|fbox|mbox|emph|(?:text|math)(?:bf|it|rm|sf|tt)?)"  # of LaTeX
_LATEX = re.compile(rf"{_COMMAND}(?![A-Za-z])")
_ARGUMENT = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # with braces two deep within it
_BOXED = re.compile(rf"\\boxed\s*{_ARGUMENT}")
# apart from other words, with which its text would be one word or number
_WRAPPED = re.compile(rf"(?<![^\s$`*(\[]){_COMMAND}(\s*){_ARGUMENT}(?=[.,:;!?]?(?:[\s$`*)\]]|\\[)\]]|\Z))")
# 1,000 and 1,00,000, 1'000.5, 1.000.000, 2.5, 3:30, 1/2; not 1989/90 and the address 142.250.190.142
_COMMAS = r"\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}"
_GROUPS = rf"(?:{_COMMAS}|\d{{1,3}}(?:['’_]\d{{3}})+)(?:\.\d+)?|\d{{1,3}}(?:\.\d{{3}}){{2}}(?:\.000)*"
_PARTS = r"(?:\d+[.:]\d+|\d{1,3}[/⁄]\d{1,3})"
_MINUS = r"(?<![\w)\]%\-–—−])[-–−]"  # and none in 1946-1950
_NUMBER = (  # not 1.2.1990, but both of 2,500/3,000
    rf"(?:{_MINUS}|(?<![\d.,:]))(?:{_GROUPS})(?![.,]?\d)"
    rf"|(?:{_MINUS}(?:{_PARTS}|\d+)|(?<![\d.,:/⁄]){_PARTS})(?![.,:/⁄]?\d)"
)
# of C++ and Notepad++; of C#, A+ and AB+, which LGBTQ+ is not; not of `a+b` and `a+1`
_NAME_SIGN = (
    r"(?<=[^\W\d_])\+\+(?!\+)|(?:(?<=(?<![^\W_])[^\W\d_])|(?<=(?<![^\W_])[^\W\d_]{2}))(?:\+(?!\d)|#)(?![^\W\d_]|[+#])"
)
_KEPT = re.compile(rf"((?=[-–−+#\d])(?:{_NUMBER}|{_NAME_SIGN}))")  # 7 times faster with what it begins with first
_TEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,;:!])(?=\d{3}(?!\d))")  # between thousands
_POINTS = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3})+(?=,\d{1,2}(?![\d.,]))")  # 1.234,56 is 1234,56
_RAISED = re.compile(r"[⁻⁰¹²³⁴-⁹](?<=\d.)")  # 10⁶ is 10^6, and not 106
_FRACTION = re.compile(r"[¼-¾⅐-⅞](?<=\d.)")  # 1½ is 1 1/2
_AS_WRITTEN = str.maketrans("–−⁄", "--/", ",'’_")  # of a number
# what may be a sign that counts, in ASCII
_SIGNED = re.compile(r"[-+#\d](?:(?<=[+#])|(?<=-)\d|(?<=\d)[!-/:-@[-`{-~]+\d)")
_PARTED = re.compile(r"(?<=\d)_+(?=\d)")
_DIGIT = re.compile(r"[^\D0-9]|[٫٬]")  # of other scripts, with Arabic's point and comma
_UNSPACED = "CJK IDEOGRAPHIC HIRAGANA KATAKANA HANGUL THAI LAO KHMER MYANMAR TIBETAN".split()  # Hangul: glued particles
_CONTROL = re.compile(r"[\x00-\x1f]")
_CHOICES = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
_SAID_CHOICE = re.compile(
    r"(?i:(?:\banswer(?:\s+is\b|\s*:)|\\boxed)(?:[\s:({\[\"'$_`]|\\(?:boxed|text|math)[a-z]{0,2}|option\b|choice\b){0,30})"
    r"(?:([A-D])(?![\w'’])|([a-d])(?=\s*(?:[)\]}.,;:!\"'$_`]|\Z|\n)))"  # a small one must end there: `a` is also a word
)
_CHOICE_ALONE = re.compile(r"\W*([A-Da-d])\W*")
_PLAIN = re.compile(r"[\t\n\r -\[\]-~]*")  # printable ASCII without the backslash
RULE = 5  # number of `gives_answer`'s rule: finished work folders are judged again by another one
NO_ANSWER = "no answer"  # normalised; what the prompt asks for where the documents do not tell
_NO_ANSWER = re.compile(rf"(?<![^ _]){NO_ANSWER}(?![^ _])")
# read in the text as it stands: in `No. Data show ...` the word is the answer
_SAYS_NOTHING = re.compile(
    r"\bno\s+\*{0,2}(?:(?:relevant|specific|explicit|direct|further|additional|clear|known)\s+)?"
    r"\*{0,2}(?:information|mention|evidence|data|details?|documents?|such|answer)\b",
    re.I,
)
_NO = re.compile(r"\bno\b", re.I)
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_NUMBERS)})\b", re.I)


def normalize_answer(text: str) -> str:
    """Return SQuAD's normal form: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: list[str]) -> bool:
    """Return whether the prediction is one of the answers, in normal form."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def f1_score(prediction: str, answers: list[str]) -> float:
    """Return F1 of the words in normal form, from 0 to 1, best over the answers (LongBench v1 `qa_f1_score`)."""
    words = normalize_answer(prediction).split()
    return max((f1_of_words(words, normalize_answer(answer).split()) for answer in answers), default=0.0)


def f1_of_words(words: list[str], gold: list[str]) -> float:
    """Return F1 of the words of two texts, from 0 to 1."""
    same = sum((Counter(words) & Counter(gold)).values())
    if not same:
        return 0.0
    precision, recall = same / len(words), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def string_match_part(prediction: str, answers: list[str]) -> float:
    """Return RULER's score, 0 or 100: an answer is in the prediction as it stands, upper and lower case alike."""
    text = _CONTROL.sub("\n", prediction).strip().lower()
    return 100.0 * any(answer.lower() in text for answer in answers)


def longbench_v2_choice(response: str) -> str | None:
    """Return the letter A to D that LongBench v2's parser finds in a response, or None."""
    plain = response.replace("*", "")
    for pattern in _CHOICES:
        if match := pattern.search(plain):
            return match.group(1)
    return None


def longbench_v2_choice_lenient(response: str) -> str | None:
    r"""Return the letter that a chain of thought ends with, or None: ours, beside the official parser.

    What stands behind the last closed thought is read. The last of `answer is C`, `Answer: (c)` and `\boxed{C}`
    counts; where there is none, a last line that is nothing but a letter, such as `(C)`. A mere mention does not.
    """
    plain = unicodedata.normalize("NFKC", behind_thought(response)).replace("*", "").strip()
    if said := list(_SAID_CHOICE.finditer(plain)):
        return (said[-1][1] or said[-1][2]).upper()
    alone = _CHOICE_ALONE.fullmatch(plain.rsplit("\n", 1)[-1])
    return alone and alone[1].upper()


def gives_answer(response: str, answers: list[str]) -> bool:
    """Return whether a response gives one of the answers: sub-EM of what `extract_answer` finds; no answer is wrong."""
    found = extract_answer(response)
    return found is not None and holds_answer(found, answers)


def behind_thought(response: str) -> str:
    """Return what a response says behind its last closed thought; nothing if another thought is left open."""
    ends = list(_THOUGHT_END.finditer(response))
    said = response[ends[-1].end() :] if ends else response
    return "" if _THOUGHT.search(said) else said


def extract_answer(response: str) -> str | None:
    r"""Return what follows the last `The answer is:` on its line; None where nothing is marked as the answer.

    The last one counts, because a chain of thought weighs answers before it settles on one, and may quote the prompt.
    Where there is none, the last `\boxed{...}` counts; then the last `the answer is` without a colon, which beside a
    marked answer is a mere mention: `the answer is stated in document 3`. The answer may stand on the next line;
    markdown around it is taken off, and LaTeX's `\boxed{}`, `\text{}` and the like around its words. Thoughts are not
    read, see `behind_thought`.
    """
    said = behind_thought(response)
    markers = list(_MARKER.finditer(said))
    if not markers and (boxes := _BOXED.findall(said)):
        return _unwrapped(boxes[-1].strip())
    markers = markers or list(_LOOSE_MARKER.finditer(said))
    if not markers:
        return None
    lead = _LEAD.match(said, markers[-1].end())
    return _unwrapped(said[lead.end() if lead else markers[-1].end() :].split("\n", 1)[0].strip(" \t\r*"))


def _unwrapped(text: str) -> str:
    """Return a text without LaTeX commands around words; its `judged_form` stays the same."""
    for _ in range(3):  # one within the other
        text = _WRAPPED.sub(r"\1\2", text)
    return text.strip()


def holds_answer(text: str, answers: list[str]) -> bool:
    """Return whether one of the answers stands in a text, as whole words, both in `judged_form`.

    An answer whose form is empty stands nowhere. Words end at spaces and at punctuation: `US` is in `U.S.-based` and
    not in `Russia`. Of `No answer`, what the prompt asks for where the documents do not tell, the words `no` and
    `answer` are no answers; nor is `no` in `no information` and the like.
    """
    words = _judged_words(text)
    form = words.replace("_", "")
    for answer in map(judged_form, answers):
        if not answer or answer not in form:
            continue
        whole = rf"(?<![^ _]){'_?'.join(map(re.escape, answer))}(?![^ _])"
        denies = answer in NO_ANSWER.split()
        if re.search(whole, _NO_ANSWER.sub("|", _judged_words(_SAYS_NOTHING.sub(" ", text))) if denies else words):
            return True
    return False


def is_nearly_right(answer: str, golds: Sequence[str]) -> bool:
    """Return whether a wrong answer is part of a gold one, has its words in another order, or `6` for its `six`; ours.

    `Koch` for `Robert Koch`, `5 May 2010` for `May 5, 2010` and `6 months` for `six months` are wrong by sub-EM, and so
    are the digits of a gold answer alone: `5551234` for `555-1234`. `No such law exists` may say the gold answer `no`,
    or nothing. `No answer` is never nearly right.
    """
    said, *written = (_NUMBER_WORD.sub(_digits, text) for text in (answer, *golds))
    denies = bool(_NO.search(answer)) and "no" in map(judged_form, golds)
    return judged_form(answer) != NO_ANSWER and (
        denies
        or holds_answer(said, written)
        or any(holds_answer(gold, [said]) or _has_same_words(said, gold) for gold in written)
    )


def _has_same_words(text: str, other: str) -> bool:
    """Return whether two texts have the same words in any order, or one is the other's digits in one word."""
    forms = [judged_form(text), judged_form(other)]
    joined = [form.replace(" ", "") for form in forms]
    words = [sorted(form.split()) for form in forms]
    return words[0] == words[1] != [] or (joined[0] == joined[1] and any(map(str.isdecimal, forms)))


def _digits(word: re.Match) -> str:
    return str(_NUMBERS.index(word[0].lower()))


def judged_form(text: str) -> str:
    r"""Return SQuAD's normal form of a text, the same for every way to write a sign.

    Compatibility characters, cases and composed accents are unified (NFKC, case folding). All punctuation goes, not
    only ASCII's, but for what tells numbers apart: a point, colon or slash within one and a minus before it; and but
    for the end of names such as `C++` and `C#`. Digits of all scripts are ASCII's, and signs between two of them part
    words (`1.1.10`, `2020-01-12`), unless they group thousands; `10⁶` is `10^6`, and `1½` is `1 1/2`. Invisible signs
    go, and LaTeX's `\boxed`, `\text` and the like. Other symbols (`€`) are words. Of printable ASCII without such signs
    it is `normalize_answer`.
    """
    if _PLAIN.fullmatch(text) and not _SIGNED.search(text):
        return normalize_answer(text)  # 4 times faster
    return _judged_words(text).replace("_", "")


def _judged_words(text: str) -> str:
    """Return `judged_form` with `_` where a word ends without a space.

    That is where punctuation was, and around signs of scripts that put no spaces between words.
    """
    text = _TEX_COMMA.sub(",", text).replace("\\+", "+").replace("\\#", "#").replace("♯", "#").replace("´", "'")
    text = unicodedata.normalize("NFKC", _FRACTION.sub(r" \g<0>", _RAISED.sub(r"^\g<0>", text)))
    text = unicodedata.normalize("NFKC", _LATEX.sub("", text).casefold())
    text = _POINTS.sub(lambda number: number[0].replace(".", ""), text)
    text = _DIGIT.sub(lambda sign: {"٫": ".", "٬": ","}.get(sign[0]) or str(unicodedata.decimal(sign[0])), text)
    parts = enumerate(_KEPT.split(text))  # every second one is a number, or the end of a name
    text = "".join(_as_written(part) if n % 2 else part.translate(_SIGNS) for n, part in parts)
    words = (re.sub("_+", "_", word).strip("_") for word in _PARTED.sub(" ", text).split())
    return " ".join(word for word in words if word.replace("_", "") not in ("", "a", "an", "the"))


def _as_written(part: str) -> str:
    """Return what `_judged_words` writes for what `_KEPT` finds."""
    if part[-1] in "+#":
        return f"{part}_"
    return part.translate(_AS_WRITTEN).replace(".", "" if part.count(".") > 1 else ".")


class _Signs(dict):
    """Code point -> what `_judged_words` writes for it; filled as signs are met."""

    def __missing__(self, code: int) -> str:
        sign = chr(code)
        kind = unicodedata.category(sign)
        if kind[0] == "P" or sign in string.punctuation or sign in "ʹʻʼ⁄−":  # the last ones are letters and symbols
            shown = "_"
        elif kind == "Cf":
            shown = ""
        elif kind[0] in "SC":
            shown = f" {sign} "
        elif unicodedata.name(sign, "").split(" ")[0].split("-")[0] in _UNSPACED:
            shown = f"_{sign}_"
        else:
            shown = sign
        self[code] = shown
        return shown


_SIGNS = _Signs()
