"""The host's chat template and tokenizer, outside training: what makes a prompt the tokens that the trainer will see.

Nothing stays patched. Host: 0.9.5.
"""

import re
from copy import copy

from ..qa.files import did_you_mean, excerpt

# templates whose thoughts begin and end with special tokens, told without the host, which takes seconds to load
MARKED_BY_TOKENS = {"gemma4", "gemma4n", "gpt_oss"}


def load_template(
    model_name_or_path: str, template: str, default_system: str | None = None, enable_thinking: bool = True,
    trust_remote_code: bool = False,
) -> tuple:  # fmt: skip
    """Return tokenizer and template as the host loads them for training; the arguments are the host's keys.

    Raises:
        ValueError: No such template, or no tokenizer at that name.
    """
    from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from llamafactory.model import load_tokenizer

    if sentence := unknown_template(template):
        raise ValueError(sentence)
    model_args = ModelArguments(model_name_or_path=model_name_or_path, trust_remote_code=trust_remote_code)
    try:
        tokenizer = load_tokenizer(model_args)["tokenizer"]
    except Exception as error:  # whatever the hub, the disk or the model's own code raised: the name is what helps
        cause = error.__cause__ or error
        raise ValueError(
            f"No tokenizer can be loaded from `model_name_or_path: {model_name_or_path}`: "
            f"{type(cause).__name__} {excerpt(cause)}"
        ) from None
    data_args = DataArguments(template=template, default_system=default_system, enable_thinking=enable_thinking)
    registered = TEMPLATES[template]
    TEMPLATES[template] = copy(registered)  # the host writes `default_system` into what all of the process share
    try:
        return tokenizer, get_template_and_fix_tokenizer(tokenizer, data_args)
    finally:
        TEMPLATES[template] = registered


def unknown_template(name: str) -> str | None:
    """Say, with the nearest name, that the host has no template of this name; None if it has."""
    from llamafactory.data.template import TEMPLATES

    if name in TEMPLATES:
        return None
    hint = did_you_mean(name, TEMPLATES).strip().replace("Did", "did", 1) or "LLaMA-Factory's README lists them."
    return f"`template: {name}` is no template of the host; {hint}"


def written_markers(name: str) -> set[str]:
    """Return the texts in brackets that a template of the host writes around turns, told without any tokenizer.

    Raises:
        ValueError: No such template.
    """
    from llamafactory.data.template import TEMPLATES

    if sentence := unknown_template(name):
        raise ValueError(sentence)
    template = TEMPLATES[name]
    parts = template.format_prefix, template.format_system, template.format_user, template.format_assistant
    slots = [slot for part in parts for slot in part.slots if not isinstance(slot, set)]  # which name bos and eos
    text = "".join(slot if isinstance(slot, str) else slot["token"] for slot in slots)
    return {*template.stop_words, *re.findall(r"<[^<>\s{}]+>|\[/?[A-Z]+\]", text)}


def encode_turn(tokenizer, template, messages: list[dict], *context: str | None) -> tuple[list[int], list[int]]:
    """Return token ids of the prompt and of the response that ends it, stop token included, as training has them.

    `context`: system prompt and tools, where there are any.
    """
    prompt_ids, response_ids = template.encode_oneturn(tokenizer, messages, *context)
    return prompt_ids, response_ids + [tokenizer.eos_token_id] * template.efficient_eos


def encode_prompt(tokenizer, template, text: str) -> list[int]:
    """Return token ids of a user's message in the chat template, up to where the response begins.

    They are those that training gives a row whose `prompt` is `text` and whose responses bring no thought of their own.
    """
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    return template.encode_oneturn(tokenizer, messages)[0]


def template_markers(tokenizer, template) -> set[str]:
    """Return the texts that only the template may write: special tokens and the words that end its turns."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {*tokenizer.all_special_tokens, *added, *template.stop_words}


def thought_markers(tokenizer, template) -> set[str]:
    """Return the special tokens by which a template's thoughts begin and end; empty where plain text marks them.

    Whoever decodes an answer must keep these: without them a thought is text of the answer.
    """
    ids = {i for word in template.thought_words for i in tokenizer.encode(word, add_special_tokens=False)}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    return {tokenizer.convert_ids_to_tokens(i) for i in ids & special}
