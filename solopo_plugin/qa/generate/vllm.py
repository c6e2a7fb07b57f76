"""Answer with vLLM's offline engine."""

import gc
import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ...host.template import encode_prompt, thought_markers
from ..files import DataError, excerpt
from ..recipe import Sampling
from .calls import Call, Model, Reply, call_seed, load_chat
from .local import yarn

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as `max_lora_rank`


def vllm_answers(sampling: Sampling, model: Model, calls: Iterable[Call]) -> Generator[Reply, None, None]:
    """Answer by vLLM's offline engine, which has `concurrency` calls under way until none are left.

    vLLM seeds answer i of a call with the call's seed + i. Its results depend on what runs beside them and are
    reproducible only as far as vLLM's own documentation says. Answers keep to the call's JSON schema, if it has one.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    except ImportError as error:
        raise DataError(
            f"`backend: vllm` cannot be loaded ({error}): pip install '.[vllm]', or use `backend: openai`."
        ) from None
    tokenizer, template = load_chat(model.tokenizer, sampling)
    options = _vllm_options(model, sampling.trust_remote_code)
    with _in_a_sentence(model):
        engine = LLM(
            model=model.path, tokenizer=model.tokenizer, trust_remote_code=sampling.trust_remote_code,
            seed=sampling.seed % 2**31, tensor_parallel_size=sampling.tensor_parallel_size,
            max_model_len=model.window, **options,
        )  # fmt: skip
    lora = {}
    if model.adapter:
        from vllm.lora.request import LoRARequest

        lora = {"lora_request": LoRARequest("adapter", 1, model.adapter)}
    stop, numbered = sorted(template.get_stop_token_ids(tokenizer)), enumerate(calls)
    marks = {"skip_special_tokens": False} if thought_markers(tokenizer, template) else {}
    under_way: dict[str, tuple[Call, int]] = {}
    try:
        while True:
            for number, call in islice(numbered, sampling.concurrency - len(under_way)):
                ids = encode_prompt(tokenizer, template, call.prompt)
                n = len(call.ks) if sampling.temperature else 1  # greedily vLLM refuses more, which would be the same
                params = SamplingParams(
                    n=n, temperature=sampling.temperature, top_p=sampling.top_p, stop_token_ids=stop,
                    seed=call_seed(sampling.seed, call), max_tokens=call.max_new_tokens or sampling.max_new_tokens,
                    output_kind=RequestOutputKind.FINAL_ONLY,  # all answers of a call together, once
                    structured_outputs=StructuredOutputsParams(json=call.schema) if call.schema else None, **marks,
                )  # fmt: skip
                with _in_a_sentence(model):
                    engine.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, params, **lora)
                under_way[str(number)] = call, len(ids)
            if not under_way:
                return
            with _in_a_sentence(model):
                outputs = engine.llm_engine.step()
            for output in outputs:
                if output.finished:
                    call, tokens = under_way.pop(output.request_id)
                    answers = [(answer.text, answer.finish_reason or "") for answer in output.outputs]
                    yield Reply(call.id, call.ks, answers * (len(call.ks) // len(answers)), tokens)
    finally:  # the next model needs the memory
        del engine
        gc.collect()
        with suppress(ImportError):  # what vLLM's maintainers name for it
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()


@contextmanager
def _in_a_sentence(model: Model) -> Iterator[None]:
    """Tell of whatever vLLM refuses or fails in: its classes of errors differ from release to release."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"`backend: vllm` fails with {model.place} ({type(error).__name__}: {excerpt(error)}); {model.shorten} if "
            "the window is too small, free the GPU if its memory is in use, or serve it and use `backend: openai`."
        ) from None


def _vllm_options(model: Model, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments of the engine for YaRN and an adapter."""
    options: dict[str, Any] = {}
    if model.rope_factor:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model.path, trust_remote_code=trust_remote_code)
        options["hf_overrides"] = yarn(config, model)
    if model.adapter:
        options |= {"enable_lora": True, "max_lora_rank": max_lora_rank(model.adapter)}
    return options


def max_lora_rank(adapter: str) -> int:
    """Return the least rank that vLLM takes as `max_lora_rank` and that is enough for the LoRA adapter in a folder."""
    rank = json.loads((Path(adapter) / "adapter_config.json").read_bytes()).get("r", 8)  # peft's default
    return next((r for r in LORA_RANKS if r >= rank), rank)
