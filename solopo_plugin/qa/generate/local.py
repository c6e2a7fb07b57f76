"""Answer with transformers' `generate`, one call at a time, for small models."""

import gc
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

from ...host.template import encode_prompt
from ..files import DataError
from ..recipe import Sampling
from .calls import Call, Model, Reply, call_seed, load_chat

log = logging.getLogger(__name__)


def transformers_answers(sampling: Sampling, model: Model, calls: Iterable[Call]) -> Iterator[Reply]:
    """Answer by transformers' `generate`, one call at a time. Nothing of generation_config.json is used."""
    import torch
    from transformers import GenerationConfig

    tokenizer, template = load_chat(model.tokenizer, sampling)
    stop = sorted(template.get_stop_token_ids(tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_network(model, sampling.trust_remote_code).to(device).eval()
    network.generation_config = GenerationConfig()
    window, warned = window_of(network.config.get_text_config()), False
    draw: dict[str, Any] = dict(do_sample=False)
    if sampling.temperature > 0:
        draw = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    try:
        for call in calls:
            prompt = torch.tensor([encode_prompt(tokenizer, template, call.prompt)], device=device)
            if not warned and (longest := prompt.shape[1] + (call.max_new_tokens or sampling.max_new_tokens)) > window:
                warned = True
                log.warning(
                    "%s: prompt and answer may have %d tokens, and its window is %d: answers beyond it are not to be "
                    "relied on; lower `max_input_tokens`, or widen the window by YaRN.",
                    model.adapter or model.path, longest, window,
                )  # fmt: skip
            torch.manual_seed(call_seed(sampling.seed, call))
            config = GenerationConfig(
                **draw, max_new_tokens=call.max_new_tokens or sampling.max_new_tokens, eos_token_id=stop,
                num_return_sequences=len(call.ks), pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            with torch.inference_mode():
                output = network.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
            answers = []
            for ids in output[:, prompt.shape[1] :].tolist():
                end = next((i for i, token in enumerate(ids) if token in stop), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                answers.append((text, "length" if end is None else "stop"))
            yield Reply(call.id, call.ks, answers, prompt.shape[1])
    finally:  # the next model needs the memory
        del network
        gc.collect()
        torch.cuda.empty_cache()


def load_network(model: Model, trust_remote_code: bool = False):
    """Load weights in the dtype they were saved in, with YaRN and adapter where asked for; it is not merged."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=trust_remote_code)
    for name, value in yarn(config, model).items():
        setattr(config, name, value)
    network = AutoModelForCausalLM.from_pretrained(
        model.path, config=config, dtype="auto", trust_remote_code=trust_remote_code
    )
    if model.adapter:
        from peft import PeftModel  # the host brings it along

        return PeftModel.from_pretrained(network, model.adapter)
    return network


def yarn(config, model: Model) -> dict[str, Any]:
    """Return the entries of config.json that make the window `rope_factor` times as long by YaRN (arXiv:2309.00071).

    They are those of Qwen2.5's model card; the window that is stretched is config.json's. Empty without a factor.

    Raises:
        DataError: The model's rotary embedding is a scaled one already, as Llama 3.1's is.
    """
    if not model.rope_factor:
        return {}
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "none") != "default":
        raise DataError(
            f"`rope_factor: {model.rope_factor:g}` stretches a plain rotary embedding by YaRN, but that of "
            f"{model.path} is `{rope.get('rope_type', 'none')}`; leave the key out."
        )
    window = config.max_position_embeddings
    rope |= {"rope_type": "yarn", "factor": model.rope_factor, "original_max_position_embeddings": window}
    return {"rope_parameters": rope, "max_position_embeddings": int(window * model.rope_factor)}


def window_of(config) -> float:
    """Return the tokens that a model was made for.

    With YaRN some configurations name the window before it is widened (Qwen2.5's card), others the one after it; of
    other scalings, such as Llama 3.1's, `max_position_embeddings` is the widened one.
    """
    window = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return window
    return max(window, (rope.get("original_max_position_embeddings") or window) * (rope.get("factor") or 1))
