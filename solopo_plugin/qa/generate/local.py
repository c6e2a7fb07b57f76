"""Answer with a model of transformers in this process, many answers at a time."""

import gc
import logging
import math
from collections import deque
from collections.abc import Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...host.template import encode_prompt, thought_markers
from ..files import DataError, excerpt
from ..provenance import residual_adapter
from ..recipe import Sampling
from ..window import ropes_by_length, window_of
from .calls import Call, Model, Reply, load_chat

if TYPE_CHECKING:  # torch and transformers take seconds to load
    from .decode import Row

log = logging.getLogger(__name__)
AHEAD = 4  # times `concurrency` calls are read ahead and sorted by length, so that batches need little padding. Ours
CPU_TOKENS = 2**16  # of a batch at most on a CPU, where no error tells that memory is out; 3 GB of SmolLM2-135M's. Ours
# Tokens from which a CPU reads a prompt without others: a mask of padding would cost it the causal half of attention.
# SmolLM2-135M at 1,480 tokens in fp32: 8.0 s of a core instead of 9.9 as one of four; at 280 1.6 instead of 1.4. Ours
CPU_ALONE = 2**10


def transformers_answers(sampling: Sampling, model: Model, calls: Iterable[Call]) -> Generator[Reply, None, None]:
    """Answer by transformers, `concurrency` answers at a time. Nothing of generation_config.json is used.

    Memory that runs out halves the batch; what was not finished is begun again, with the same draws.

    Raises:
        DataError: A single answer takes more memory than there is, or the model computes NaN.
    """
    import torch

    from .decode import Job, Noise, decode

    tokenizer, template = load_chat(model.tokenizer, sampling)
    stop, skip = set(template.get_stop_token_ids(tokenizer)), not thought_markers(tokenizer, template)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_network(model, sampling.trust_remote_code).to(device).eval()
    _warn_of_fp32(network, device.type, model)
    config, warned = network.config.get_text_config(), False
    window, ropes = window_of(config), ropes_by_length(config)
    room, alone = (math.inf, math.inf) if device.type == "cuda" else (CPU_TOKENS, CPU_ALONE)
    calls = iter(calls)

    def job_of(call: Call) -> Job:
        ids = encode_prompt(tokenizer, template, call.prompt)
        return Job(call, ids, call.max_new_tokens or sampling.max_new_tokens)

    try:
        while pool := list(map(job_of, islice(calls, AHEAD * sampling.concurrency))):
            warned = warned or _beyond_window(max(job.tokens for job in pool), window, model)
            pool.sort(key=lambda job: (job.limit, len(job.ids)), reverse=True)  # the longest first: memory ends soon
            rows = deque((job, i) for job in pool for i in range(len(job.call.ks)))
            while batch := _next_batch(rows, sampling.concurrency, room, alone, ropes):
                left, failed = dict.fromkeys(batch), False
                _forget_lengths(network)
                try:
                    noise = Noise(sampling, device)
                    for row, ids, ended in decode(network, batch, noise, stop, tokenizer.pad_token_id or 0):
                        del left[row]
                        text = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                        if reply := _take_in(row, text, ended):
                            yield reply
                except FloatingPointError:
                    raise DataError(
                        f"{model.place} computes NaN: its weights are damaged, or its training has diverged; take "
                        "another checkpoint."
                    ) from None
                except RuntimeError as error:
                    if not (failed := _memory_is_out(error)):
                        raise
                if failed:  # out of the handler, whose error holds what filled the memory
                    room = _halved(batch, model)
                    rows.extendleft(reversed(left))
                    gc.collect()
                    torch.cuda.empty_cache()
    finally:  # the next model needs the memory
        del network
        gc.collect()
        torch.cuda.empty_cache()


def _warn_of_fp32(network, device: str, model: Model) -> None:
    """Say that a GPU answers slowly in fp32, in which the host saves a full fine-tuning without DeepSpeed."""
    import torch

    if device == "cuda" and network.dtype == torch.float32:
        log.warning(
            "%s: its weights are in fp32, in which a GPU answers several times as slowly as in bf16, with twice the "
            "memory; `llamafactory-cli export` with `--infer_dtype bfloat16` saves them in bf16.",
            model.path,
        )  # fmt: skip


def _beyond_window(longest: int, window: float, model: Model) -> bool:
    """Warn if prompt and answer may have more tokens than the model's window; returns whether they may."""
    if longest > window:
        log.warning(
            "%s: prompt and answer may have %d tokens, and its window is %d: answers beyond it are not to be relied "
            "on; %s, or widen the window by YaRN.",
            model.adapter or model.path, longest, window, model.shorten,
        )  # fmt: skip
    return longest > window


def _take_in(row: "Row", text: str, ended: bool) -> Reply | None:
    """Add an answer to its call; returns the call's reply if it was the last."""
    job, i = row
    job.answers[i] = text, "stop" if ended else "length"
    if len(job.answers) < len(job.call.ks):
        return None
    answers = [answer for _, answer in sorted(job.answers.items())]
    return Reply(job.call.id, job.call.ks, answers, len(job.ids))


def _next_batch(rows: "deque[Row]", most: int, room: float, alone: float, ropes: dict) -> "list[Row]":
    """Take from the front what may be answered together, at least one answer.

    Args:
        rows: Answers to be written; those of a call follow each other.
        most: Answers at most.
        room: Tokens with padding at most.
        alone: Tokens from which a prompt has no other beside it.
        ropes: Of `ropes_by_length`: tokens of prompt and answer beyond which the rotary embedding of all of a batch is
            another: that of the longest (`dynamic`), or one for all lengths.
    """
    batch: list[Row] = []
    longest, shortest, alike = 0, math.inf, min(ropes.values(), default=math.inf)
    while rows and len(batch) < most:
        job = rows[0][0]
        longest, shortest = max(longest, job.tokens), min(shortest, len(job.ids))
        if batch and (len(batch) + 1) * longest > room:
            break
        other = longest > alike and (shortest <= alike or "dynamic" in ropes)
        if batch and job is not batch[0][0] and (other or max(len(job.ids), len(batch[0][0].ids)) >= alone):
            break
        batch.append(rows.popleft())
    return batch


def _forget_lengths(network) -> None:
    """Give `dynamic` rope scaling its first frequencies again: transformers keeps those of the last long sequence."""
    for module in network.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
            module.max_seq_len_cached = module.original_max_seq_len


def _memory_is_out(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # of a GPU; of a CPU


def _halved(batch: "list[Row]", model: Model) -> int:
    """Return the tokens that a batch may have after this one was too large, and say so."""
    longest = max(job.tokens for job, _ in batch)
    if len(batch) == 1:
        raise DataError(
            f"{model.place}: memory is out with a single answer of up to {longest} tokens, prompt included; "
            f"{model.shorten}, or ask a server (`backend: openai`)."
        )
    log.warning("Memory is out with %d answers at a time; going on with %d.", len(batch), len(batch) // 2)
    return len(batch) // 2 * longest


def load_network(model: Model, trust_remote_code: bool = False):
    """Load weights in the dtype they were saved in, with YaRN and adapter where asked for; it is not merged.

    Raises:
        DataError: The adapter is not one to these weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if model.adapter and (sentence := residual_adapter(Path(model.adapter))):
        raise DataError(f"{model.adapter} {sentence}")
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=trust_remote_code)
    for name, value in yarn(config, model).items():
        setattr(config, name, value)
    network = AutoModelForCausalLM.from_pretrained(
        model.path, config=config, dtype="auto", trust_remote_code=trust_remote_code
    )
    if model.adapter:
        from peft import PeftModel  # the host brings it along

        try:
            return PeftModel.from_pretrained(network, model.adapter)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            reason = excerpt(str(error).partition("\n")[2] or error)
        raise DataError(
            f"{model.adapter} does not fit {model.path} ({reason}); give the model that it was trained on as "
            "`model_name_or_path`, with the tokens that its training added."
        )
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
