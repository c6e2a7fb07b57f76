"""Types of the keys of recipes: pydantic's, in its strict mode, so that neither "1" nor true nor 5.0 is a whole number.

The text in a number's type is what a sentence calls those in its range.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo

from .files import DataError, split_names

# of the dataclass of a recipe; an input may be a password
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
SECRET = re.compile(
    r"(.*[_-])?(api[_-]?key|authorization|password|secret|webhook[_-]?url|(auth|access|bearer|hf|hub)[_-]?token)"
    r"|(.*[_-])?headers?|token",
    re.IGNORECASE,
)
# parts of a request to a server, with the key of the recipe that sets and reports them
REQUEST = dict.fromkeys(("n", "messages", "prompt")) | {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "model": "served_model",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
# those of other models than the one that is trained, where they have keys of their own, or none
REQUESTS = {
    "judge_extra_body": REQUEST
    | {"temperature": "judge_temperature", "top_p": None, "model": "judge_served_model"}
    | dict.fromkeys(("max_tokens", "max_completion_tokens"), "judge_max_new_tokens"),
    "ask_extra_body": REQUEST | {"model": "ask_served_model"},
    "extra_body": REQUEST,
}


def _secret_in(value: Any, name: str = "") -> str | None:
    """Return the name of a part that is a secret by its name, or by its value an address with a password."""
    if SECRET.fullmatch(name) or (isinstance(value, str) and re.search(r"://\S*@", value)):
        return name
    parts = value.items() if isinstance(value, dict) else [("", v) for v in value] if isinstance(value, list) else ()
    return next((found for key, part in parts if (found := _secret_in(part, str(key) or name))), None)


def _list_of(value: Any) -> list:
    """Return a list as it is, the names of `a,b`, or a single value as the only one."""
    parts = split_names(value) if isinstance(value, str) else value if isinstance(value, list) else [value]
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    return [part for part in parts if part != ""]


def _fit_to_write(value: dict, info: ValidationInfo) -> dict:
    """Refuse secrets, and parts of a request that another key sets and reports."""
    if secret := _secret_in(value):
        raise DataError(
            f"`{info.field_name}` cannot hold `{secret}`: what stands there is written to files; put a key into the "
            "environment variable that `api_key_env` names, a token of the hub into HF_TOKEN."
        )
    request = REQUESTS.get(info.field_name or "", {})
    for name in (name for name in value if name in request):
        advice = f"set `{request[name]}` of the recipe" if request[name] else "leave it out"
        raise DataError(f"`{info.field_name}` cannot hold `{name}`, which every request has: {advice}.")
    return value


Needed = Annotated[str, Field(pattern=r"\S")]  # more than blanks
Count = Annotated[int, Field(ge=1), "a whole number > 0"]
Whole = Annotated[int, Field(ge=0), "a whole number >= 0"]
Seed = Annotated[int, Field(ge=0, lt=2**63), f"a whole number from 0 to {2**63 - 1}"]
Positive = Annotated[float, Field(gt=0), "a number > 0"]
NotNegative = Annotated[float, Field(ge=0), "a number >= 0"]
Factor = Annotated[float, Field(ge=1), "a number >= 1"]
Share = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
Nucleus = Annotated[float, Field(ge=1e-6, le=1), "a number from 1e-06 to 1"]
Grade = Annotated[float, Field(ge=1, le=10), "a number from 1 to 10"]
Percent = Annotated[float, Field(ge=0, le=100), "a number from 0 to 100"]
Names = Annotated[list[str], BeforeValidator(_list_of)]
Counts = Annotated[list[Count], BeforeValidator(_list_of)]
Percents = Annotated[list[Percent], BeforeValidator(_list_of)]
Written = Annotated[dict, AfterValidator(_fit_to_write)]  # parts are the user's own, and stand in files of a run
Backend = Literal["vllm", "openai", "transformers"]
Endpoint = Literal["chat", "completions"]
Distractors = Literal["random", "bm25"]
Pairs = Annotated[list, BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
