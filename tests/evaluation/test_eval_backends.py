"""Adapters, YaRN and limits of single questions reach the model, and a model's memory is free before the next one."""

import gc
import json
import math
import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch
from toy import item, make_adapter, recipe_in

from solopo_plugin.host.template import encode_prompt
from solopo_plugin.qa.files import DataError
from solopo_plugin.qa.generate import generate, local
from solopo_plugin.qa.generate.calls import Call, Model, load_chat
from solopo_plugin.qa.generate.local import yarn
from solopo_plugin.qa.recipe import Sampling, pick

pytestmark = pytest.mark.timeout(120)
CALLS = [Call(f"q{i}", (0,), item(i).prompt, None if i else 3) for i in range(3)]


def recipe_for(folder, model: str, **keys):
    return recipe_in(folder, [model], model_name_or_path=model, max_new_tokens=8, **keys)


def answer(recipe, model: Model) -> dict[str, str]:
    return {reply.id: reply.answers[0][0] for reply in generate(pick(recipe, Sampling), model, CALLS)}


def greedy_by_hand(network, recipe) -> dict[str, str]:
    """The likeliest token, again and again, without a cache."""
    tokenizer, template = load_chat(recipe.model_name_or_path, recipe)
    texts = {}
    for call in CALLS:
        prompt = encode_prompt(tokenizer, template, call.prompt)
        ids = torch.tensor([prompt])
        for _ in range(call.max_new_tokens or recipe.max_new_tokens):
            with torch.no_grad():
                ids = torch.cat([ids, network(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        texts[call.id] = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    return texts


def test_an_adapter_answers_on_top_of_its_model(tiny_model, tmp_path):
    """Greedy, question by question with its own limit; merged into the weights by peft the answers are the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_model()
    recipe, adapter = recipe_for(tmp_path, base), make_adapter(base, tmp_path / "adapter", 1)
    plain = AutoModelForCausalLM.from_pretrained(base)
    without = answer(recipe, Model(base))
    assert without == greedy_by_hand(plain, recipe)
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    assert answer(recipe, Model(base, adapter)) == greedy_by_hand(merged, recipe) != without


@pytest.mark.parametrize("trained_on", [dict(hidden_size=128), dict(vocab_size=1100)], ids=["another", "more tokens"])
def test_an_adapter_to_another_model_is_refused(tiny_model, tmp_path, trained_on):
    base, adapter = tiny_model(), str(tmp_path / "adapter")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model(**trained_on))
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(network, lora).save_pretrained(adapter)
    with pytest.raises(
        DataError, match=rf"^{adapter} does not fit {base} \(.*size mismatch .*`model_name_or_path`"
    ) as error:
        answer(recipe_for(tmp_path, base), Model(base, adapter))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_model_without_keys_and_values_is_refused(tiny_model, tmp_path):
    path = tiny_model("mamba2", num_heads=8, head_dim=16, state_size=16, n_groups=1)
    with pytest.raises(DataError, match="^Mamba2ForCausalLM keeps no keys and values.*use `backend: openai`.$"):
        answer(recipe_for(tmp_path, path), Model(path))


@pytest.mark.parametrize("window, said", [(40, 1), (8192, 0)])
def test_prompts_beyond_the_window_are_told_once(tiny_model, tmp_path, caplog, window, said):
    path = tiny_model(max_position_embeddings=window)
    assert len(answer(recipe_for(tmp_path, path), Model(path))) == len(CALLS)
    assert caplog.text.count(f"and its window is {window}: answers beyond it are not to be relied on") == said


def test_a_model_is_gone_before_the_next_is_loaded(tiny_model, tmp_path, monkeypatch):
    alive, counts = [], []
    original = local.load_network

    def load(*args):
        counts.append(sum(ref() is not None for ref in alive))
        network = original(*args)
        alive.append(weakref.ref(network))
        return network

    monkeypatch.setattr(local, "load_network", load)
    recipe, adapter = recipe_for(tmp_path, tiny_model()), make_adapter(tiny_model(), tmp_path / "a", 1)
    gc.collect()
    gc.disable()  # whoever frees it must do so on purpose
    try:
        for model in (Model(tiny_model()), Model(tiny_model(), adapter), Model(tiny_model())):
            replies = generate(pick(recipe, Sampling), model, CALLS)
            next(replies)
            replies.close()  # also when it is left half way
        assert counts == [0, 0, 0]
    finally:
        gc.enable()


def test_yarn_changes_the_rotary_embedding(tiny_model, tmp_path):
    """High frequencies stay, low ones are divided by the factor, and attention is scaled as in the YaRN paper."""
    base, factor = tiny_model(), 4.0
    plain, stretched = (local.load_network(Model(base, rope_factor=f)) for f in (None, factor))
    window = plain.config.max_position_embeddings
    assert stretched.config.max_position_embeddings == 4 * window
    before, after = (network.model.rotary_emb for network in (plain, stretched))
    assert torch.equal(after.inv_freq[:1], before.inv_freq[:1])
    turns = window * before.inv_freq / (2 * math.pi)  # of each frequency in the window
    slow = turns < 1
    assert slow.any() and torch.allclose(after.inv_freq[slow], before.inv_freq[slow] / factor)
    assert before.attention_scaling == 1.0
    assert after.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)
    with torch.no_grad():
        ids = torch.arange(50)[None]
        assert not torch.allclose(plain(ids).logits, stretched(ids).logits)


def test_yarn_is_for_plain_rotary_embeddings(tiny_model):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model())
    assert yarn(config, Model("m")) == {}
    found = yarn(config, Model("m", rope_factor=2.0))
    assert found["rope_parameters"] == config.rope_parameters | {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": config.max_position_embeddings
    }  # fmt: skip
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    with pytest.raises(
        DataError, match="`rope_factor: 4` stretches a plain .* that of m is `llama3`; leave the key out"
    ):
        yarn(config, Model("m", rope_factor=4.0))


def fake_vllm(seen: list) -> dict[str, ModuleType]:
    """The parts of vLLM that are used; what they are given is noted in `seen`."""

    class LLM:
        def __init__(self, **kwargs):
            seen.append(kwargs)
            self.llm_engine, self.waiting = self, {}

        def add_request(self, request_id, prompt, params, lora_request=None):
            self.waiting[request_id] = params, lora_request

        def step(self):
            (lora,) = {lora for _, lora in self.waiting.values()}
            params = [params for params, _ in self.waiting.values()]
            seen.append((lora, [p.max_tokens for p in params], {p.temperature for p in params}))
            answers = [SimpleNamespace(text="x", finish_reason="stop")]
            done = [SimpleNamespace(finished=True, request_id=name, outputs=answers) for name in self.waiting]
            self.waiting = {}
            return done

    names = ("vllm", "vllm.sampling_params", "vllm.lora", "vllm.lora.request", "vllm.distributed")
    modules = {name: ModuleType(name) for name in names}
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SimpleNamespace
    modules["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(FINAL_ONLY="final only")
    modules["vllm.sampling_params"].StructuredOutputsParams = SimpleNamespace
    modules["vllm.lora.request"].LoRARequest = lambda *given: given
    modules["vllm.distributed"].cleanup_dist_env_and_memory = lambda: seen.append("freed")
    return modules


def test_vllm_gets_window_adapter_and_yarn(tiny_model, tmp_path, monkeypatch):
    from peft import LoraConfig  # before it can find the module that stands in for vLLM  # noqa: F401

    seen, base = [], tiny_model()
    recipe, adapter = recipe_for(tmp_path, base, backend="vllm"), make_adapter(base, tmp_path / "adapter", 1)
    load_chat(recipe.model_name_or_path, recipe)
    for name, module in fake_vllm(seen).items():
        monkeypatch.setitem(sys.modules, name, module)
    for model in (Model(base, window=500), Model(base, adapter, rope_factor=4.0, window=900)):
        assert set(answer(recipe, model).values()) == {"x"}
    plain, first, freed, engine, second, freed_again = seen
    assert (plain["model"], plain["max_model_len"], freed) == (base, 500, "freed") == (base, 500, freed_again)
    assert not {"hf_overrides", "enable_lora"} & set(plain)
    assert first == (None, [3, 8, 8], {0.0}) and second == (("adapter", 1, adapter), [3, 8, 8], {0.0})
    assert (engine["max_model_len"], engine["enable_lora"], engine["max_lora_rank"]) == (900, True, 16)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 12 and engine["hf_overrides"]["rope_parameters"]["factor"] == 4.0
    assert engine["hf_overrides"]["max_position_embeddings"] == 4 * 8192
