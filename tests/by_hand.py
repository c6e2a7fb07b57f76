"""One step of the trainer, and the same by a loop over single sequences; tiny models, and the memory of a step."""

import weakref
from functools import cache
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import LlamaConfig, LlamaForCausalLM

from solopo_plugin import attention, losses

# ---- the step, in float64

# Seeds of the weights. With these the three rows lie on both sides of the hinge and of `drop`: what an absolute value
# or a missing clamp would give differs from the truth.
POLICY, REFERENCE = 28, 1


@cache
def qwen2_float64(seed: int):
    """A Qwen2 of two layers in float64 whose answers depend strongly on the context (large initial weights)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, initializer_range=0.25, use_cache=False)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**shape)).double().eval()


def tiny_rows() -> list[dict]:
    """Three ragged rows of ids; the last one's long prompt is its short prompt."""
    ids = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(16)).tolist()
    take = lambda n: [ids.pop() for _ in range(n)]  # noqa: E731
    rows = [
        dict(name=f"rows[{i}]", long_is_short=False, short_prompt_ids=take(s), long_prompt_ids=take(lo),
             chosen_ids=take(w), rejected_ids=take(r))
        for i, (s, lo, w, r) in enumerate([(5, 11, 4, 6), (3, 17, 6, 2), (7, 7, 3, 5)])
    ]  # fmt: skip
    rows[2] |= dict(long_is_short=True, long_prompt_ids=rows[2]["short_prompt_ids"])
    return rows


def step(model, reference, rows, **keys):
    """Losses (B,) and metrics of `SoloTrainer.solopo_step`: the real methods on an instance without its Trainer."""
    from llamafactory.hparams import FinetuningArguments

    from solopo_plugin.attention import why_not_packed
    from solopo_plugin.forward import Packed, TwoStages
    from solopo_plugin.host.arguments import with_solo
    from solopo_plugin.trainer import SoloTrainer

    args = with_solo(FinetuningArguments)(stage="solopo", **keys)
    trainer = SoloTrainer.__new__(SoloTrainer)
    trainer.finetuning_args, trainer.ref_model = args, reference if args.use_ref_model else None
    trainer.accelerator = SimpleNamespace(gather=lambda t: t, unwrap_model=lambda m: m)
    trainer.train_dataset, trainer.eval_dataset = SimpleNamespace(), None
    trainer.objective = losses.OBJECTIVES[args.solopo_objective]
    if args.solopo_forward == "packed":
        assert all(why_not_packed(m) is None for m in filter(None, (model, trainer.ref_model)))
        trainer.form = Packed(args, model, trainer.ref_model)
    else:
        trainer.form = TwoStages(args, model, trainer.every_rank_may_skip, 0)
    losses_B, metrics_BM = trainer.solopo_step(model, trainer.form.collator(rows))
    return losses_B, dict(zip(trainer.metrics, metrics_BM.unbind(1), strict=True))


def by_hand_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """One sequence alone, all logits, float64: the token at position t is predicted by the logits at t - 1."""
    logps = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(response)])


def by_hand_kl(student: tuple, teacher: tuple, row: dict, response: str, kind="forward", temperature=1.0, k=0):
    """Mean over a response's tokens of a divergence of (model, side) from (model, side), in float64, all logits."""

    def p(model, side):
        prompt, ids = row[f"{side}_prompt_ids"], row[f"{response}_ids"]
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return (logits.double() / temperature).softmax(-1)

    q, p = p(*student), p(*teacher).detach()
    if k:
        top = p.topk(k).indices
        q, p = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (q, p))
    m = (p + q) / 2
    of = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    return {"forward": lambda: of(p, q), "reverse": lambda: of(q, p),
            "jsd": lambda: (of(p, m) + of(q, m)) / 2}[kind]().mean()  # fmt: skip


def by_hand_solopo(model, ref_model, row: dict, keys: dict) -> dict:
    """SoLoPO of one row from the definitions, in float64; nothing of the package is used."""
    name, beta, gamma = keys["pref_loss"], keys["pref_beta"], keys["simpo_gamma"]
    smoothing = keys["dpo_label_smoothing"]
    size = torch.mean if name in ("ipo", "simpo", "orpo") else torch.sum

    def logp(m, side, response):
        return size(by_hand_logps(m, row[f"{side}_prompt_ids"], row[f"{response}_ids"]))

    odds = lambda x: x - torch.log(1 - torch.exp(x))  # noqa: E731
    reward = {"orpo": odds, "ipo": lambda x: x}.get(name, lambda x: beta * x)
    w, r = logp(model, "short", "chosen"), logp(model, "short", "rejected")
    long_w, long_r = logp(model, "long", "chosen"), logp(model, "long", "rejected")
    with torch.no_grad():
        ref = logp(ref_model, "short", "chosen") - logp(ref_model, "short", "rejected")
    nll = -by_hand_logps(model, row["short_prompt_ids"], row["chosen_ids"]).mean()
    log_sigma = lambda z: -torch.log(1 + torch.exp(-z))  # noqa: E731
    po = {
        "sigmoid": lambda: -(1 - smoothing) * log_sigma(beta * (w - r - ref)) - smoothing * log_sigma(-beta * (w - r - ref)),  # noqa: E501
        "ipo": lambda: (w - r - ref - 0.5 / beta) ** 2,
        "hinge": lambda: torch.clamp(1 - beta * (w - r - ref), min=0),
        "simpo": lambda: -log_sigma(beta * (w - r) - gamma),
        "orpo": lambda: nll - beta * log_sigma(odds(w) - odds(r)),
    }[name]() + keys["pref_ftx"] * nll  # fmt: skip

    alone, k = keys.get("solopo_objective") == "distill", keys.get("solopo_distill_topk", 0)
    if alone:
        po = keys["pref_ftx"] * nll
    responses = ("chosen", "rejected") if keys["solopo_align_on"] == "both" else ("chosen",)
    if alone or keys["solopo_align"] == "distill":
        form = (keys.get("solopo_distill_kl", "forward"), keys.get("solopo_distill_temperature", 1.0), k)
        align = sum(by_hand_kl((model, "long"), (model, "short"), row, name, *form) for name in responses)
    seen = reward if keys["solopo_align"] == "reward" else lambda x: x
    still = (lambda x: x.detach()) if keys["solopo_detach_short"] else lambda x: x
    s = {"drop": lambda t: torch.clamp(t, min=0), "squared": lambda t: t**2, "abs": torch.abs,
         "auto": (lambda t: 2 * t**2) if name == "ipo" else torch.abs}[keys["solopo_penalty"]]  # fmt: skip
    if not alone and keys["solopo_align"] != "distill":
        align = s(seen(still(w)) - seen(long_w))
        if keys["solopo_align_on"] == "both":
            align = align + s(seen(long_r) - seen(still(r)))
    gap = (reward(w) - reward(long_w)).abs()
    terms = {
        "loss": po + keys["solopo_alpha"] * align, "solopo/po_loss": po, "solopo/align_loss": align,
        "solopo/reward_short": reward(w), "solopo/reward_long": reward(long_w), "solopo/reward_gap": gap,
        "solopo/nll": nll, "logps/chosen": w, "logps/rejected": r,
    }  # fmt: skip
    if weight := keys.get("solopo_anchor"):
        anchor = sum(by_hand_kl((model, "short"), (ref_model, "short"), row, name) for name in responses)
        terms |= {"loss": terms["loss"] + weight * anchor, "solopo/anchor_kl": anchor}
    return terms


BASE = dict(pref_beta=0.4, simpo_gamma=0.3, dpo_label_smoothing=0.0, pref_ftx=0.0, ref_model="a reference",
            solopo_alpha=0.7, solopo_align="reward", solopo_align_on="chosen", solopo_penalty="auto",
            solopo_detach_short=False)  # fmt: skip
STEPS = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "simpo": {},
    "orpo": {},
    "sigmoid, smoothed, logp": dict(dpo_label_smoothing=0.1, solopo_align="logp"),
    "hinge, both": dict(solopo_align_on="both", solopo_alpha=2.0),
    "simpo, both, ftx": dict(solopo_align_on="both", pref_ftx=0.5),
    "orpo, both, drop": dict(solopo_align_on="both", solopo_penalty="drop"),
    "ipo, detached": dict(solopo_detach_short=True),
    "orpo, logp, squared, detached": dict(solopo_align="logp", solopo_penalty="squared", solopo_detach_short=True),
    "orpo, alpha 0": dict(solopo_alpha=0.0),
    "sigmoid, distill": dict(solopo_align="distill"),
    "ipo, distill, reverse, both": dict(solopo_align="distill", solopo_distill_kl="reverse", solopo_align_on="both"),
    "hinge, distill, top": dict(solopo_align="distill", solopo_distill_topk=3, solopo_distill_temperature=1.6),
    "simpo, distill, jsd, ftx": dict(solopo_align="distill", solopo_distill_kl="jsd", pref_ftx=0.5),
    "orpo, distill, chunked": dict(solopo_align="distill", solopo_logp_chunk=2),
}
ALONE = dict(solopo_objective="distill", solopo_alpha=1.0, pref_beta=0.1, ref_model=None)
STEPS_OF_KL = {
    "sigmoid, alone": ALONE,
    "sigmoid, alone, ftx, both": ALONE | dict(pref_ftx=0.3, solopo_align_on="both", solopo_distill_kl="jsd"),
    "sigmoid, alone, anchor": ALONE | dict(solopo_anchor=0.6, ref_model="a reference", solopo_reference="online"),
    "orpo, anchor": dict(solopo_anchor=0.6, solopo_reference="online"),
    "sigmoid, anchor, both": dict(solopo_anchor=0.6, solopo_align_on="both", solopo_reference="online"),
    "simpo, distill, anchor": dict(solopo_anchor=0.6, solopo_align="distill", solopo_reference="online"),
}

# The model runs in float64; the step makes fp32 of its logits (size <= 10 here, asserted). A token's log-prob is a
# difference of two of them and so within 3 * 2^-23 * 10 = 4e-6, a sum of 6 tokens within 2.2e-5. The losses' slopes in
# their log-probs are at most 4 here (ipo: 2 |d|, 2 * 2 t alpha), giving 1e-4; the faults that this is to catch change
# a loss by 0.01 and more (test_mutations.py).
STEP_TOLERANCE = 1e-4


def assert_gradients_close(ours: list, truth: list) -> None:
    """Within 2e-4 of each tensor's largest entry: the relative error of the slopes, twice STEP_TOLERANCE at worst."""
    assert len(ours) == len(truth) > 10
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * b.abs().max().item())


# ---- architectures, in fp32

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=10000.0,
              original_max_position_embeddings=16)  # fmt: skip
MODELS = {name: (name, {}) for name in attention.TESTED}
MODELS |= {
    "qwen2, yarn": ("qwen2", dict(rope_parameters=YARN)),
    "llama, llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama, one head of keys": ("llama", dict(num_key_value_heads=1)),
}
# Every second layer has a window of 5 tokens, or all where an architecture has no kinds of layers: less than any prompt
# but one, and less than some responses. Gemma's full layers turn at another base; Gemma 4's have larger heads.
WINDOW = dict(sliding_window=5, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"])
ALL_LAYERS = ("mistral", "mixtral", "phi3", "ministral3", "starcoder2")
GEMMA4 = dict(
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=40, global_head_dim=16, final_logit_softcapping=3.0
)
MODELS |= {
    f"{name}, window": (name, {"sliding_window": 5} if name in ALL_LAYERS else WINDOW) for name in attention.WINDOWED
}
MODELS |= {"gemma4_text": ("gemma4_text", GEMMA4), "gemma4_text, window": ("gemma4_text", WINDOW | GEMMA4)}


@cache
def tiny(name: str, seed: int = 0):
    """An fp32 model of an architecture in training mode, as a step has it; dropout is 0 everywhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, changes = MODELS.get(name, (name, {}))
    shape = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, initializer_range=0.25, use_cache=False, pad_token_id=0,
                 eos_token_id=0, bos_token_id=0, max_position_embeddings=256)  # fmt: skip
    if architecture in ALL_LAYERS:
        shape["sliding_window"] = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(architecture, **(shape | changes))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


# ---- memory


class Live(TorchDispatchMode):
    """Bytes of all storages alive, their peak, and the shapes of all tensors made, forward and backward alike; those in
    fp32 once more."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak, self.made, self.shapes, self.fp32 = {}, 0, 0, 0, set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
                if tensor.dtype == torch.float32:
                    self.fp32.add(tuple(tensor.shape))
                self.watch(tensor.untyped_storage())
        return output

    def watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = size
            self.made += size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.known.pop(key, 0)


def rows_of(prompt: int) -> list[dict]:
    """One row of a short prompt of 16, a long one of the given length, and responses of 8 and 6 tokens."""
    ids = list(range(1, 40)) * 1000
    return [dict(name="rows[0]", long_is_short=False, short_prompt_ids=ids[:16], long_prompt_ids=ids[:prompt],
                 chosen_ids=ids[:8], rejected_ids=ids[6:12])]  # fmt: skip


def watched_step(monkeypatch, vocabulary: int, prompt: int, forward="packed", change=lambda model: None, **changes):
    """A training step on a two-layer Llama, changed as asked, under `Live`; keys of the recipe begin with `solopo_`."""
    keys = {name: changes.pop(name) for name in [*changes] if name.startswith("solopo_")} | dict(pref_loss="orpo")
    shape = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192) | changes  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape)).train()
    change(model)
    with Live() as live:
        losses_B, _ = step(model, None, rows_of(prompt), solopo_forward=forward, **(BASE | keys))
        losses_B.mean().backward()
    return live
