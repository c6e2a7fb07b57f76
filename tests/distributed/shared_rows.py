"""Loss and gradients of rows that ranks share against one process, in float64: torchrun shared_rows.py SIZE ...

Every case prints a line of JSON per rank: how far loss, log-probs and the gradient (averaged over all ranks, as DDP
does) are from one process's on all groups' rows, relative; the bytes that attention sent, counted and by
scripts/step_cost.py's formula; and those of the scored tokens' hidden states, with what they are at most.
"""

import json
import os
import sys
from pathlib import Path
from types import MethodType, SimpleNamespace

import torch
import torch.distributed as dist
from llamafactory.model.model_utils.checkpointing import _gradient_checkpointing_enable
from transformers import AutoConfig, AutoModelForCausalLM

from solopo_plugin import forward
from solopo_plugin.data import BETWEEN
from solopo_plugin.forward import Packed
from solopo_plugin.losses import OBJECTIVES
from solopo_plugin.sequence_parallel import Ranks

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from step_cost import exchanged  # noqa: E402

LAYERS, HEAD, WIDTH = 2, 8, 8  # the last: bytes of a float64
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
draw = torch.Generator().manual_seed(1)
sent: list[int] = []
scored: list[int] = []
exchange, to = dist.all_to_all_single, torch.Tensor.to


def counted(output, tensor, output_split_sizes=None, input_split_sizes=None, group=None):
    """Attention's exchanges have equal parts, one per rank, of which a rank's own stays; those to scorers have not."""
    if input_split_sizes is None:
        sent.append(tensor[1:].numel() * tensor.element_size())
    else:
        away = sum(input_split_sizes) - input_split_sizes[dist.get_rank(group)]
        scored.append(away * tensor[0].numel() * tensor.element_size() if len(tensor) else 0)
    return exchange(output, tensor, output_split_sizes, input_split_sizes, group=group)


dist.all_to_all_single = counted
# the host's `use_unsloth_gc` brings hidden states back from the CPU to "cuda", which here is the CPU
torch.Tensor.to = lambda x, *a, **k: to(x, *["cpu" if d == "cuda" else d for d in a], **k)


def ranks_of(size: int) -> Ranks:
    links = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    return Ranks(size, rank % size, world // size, rank // size, links[rank // size])


def exact_logps(logits, targets, chunk):  # in float64 throughout, where the step's own are fp32
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


forward.token_logps = exact_logps


def tokens(n: int) -> list[int]:
    return torch.randint(1, 64, (n,), generator=draw).tolist()


def samples(*lengths, rejected: int = 1) -> list[dict]:
    """Rows of given lengths: short prompt, long prompt (None: the short one), chosen, rejected ones."""
    rows = []
    for short, long, chosen, worse in lengths:
        row = dict(short_prompt_ids=tokens(short), chosen_ids=tokens(chosen))
        row["rejected_ids"] = [*tokens(worse), *([BETWEEN, *tokens(worse + 1)] if rejected == 2 else [])]
        row["long_prompt_ids"] = row["short_prompt_ids"] if long is None else tokens(long)
        rows.append(row | dict(long_is_short=long is None, name="row"))
    return rows


def model_of(kind: str, heads: int, kv_heads: int, checkpointing: str | None):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=heads * HEAD, intermediate_size=48, num_hidden_layers=LAYERS)
    shape |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=HEAD, initializer_range=0.2)
    shape |= dict(sliding_window=8) if kind == "mistral" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).double().train()
    if checkpointing is not None:
        how = {"use_reentrant": checkpointing == "reentrant"}
        enable = MethodType(_gradient_checkpointing_enable, model)
        enable(how, use_unsloth_gc=checkpointing == "unsloth")
        model.enable_input_require_grads()
    return model


def settings(**changes) -> SimpleNamespace:
    keys = dict(
        longpo=False, long_pair=False, distills=False, solopo_anchor=0.0,
        use_ref_model=False, solopo_logp_chunk=1024, pref_loss="orpo", pref_beta=0.3,
        simpo_gamma=0.5, dpo_label_smoothing=0.0, pref_ftx=0.2, solopo_alpha=2.0, solopo_align="reward",
        solopo_penalty="auto", solopo_detach_short=False, solopo_longpo_lambda=0.5, solopo_objective="solopo",
        solopo_distill_kl="forward", solopo_distill_temperature=1.5, solopo_distill_topk=0,
    )  # fmt: skip
    return SimpleNamespace(**keys | changes)


def step(model, rows, args, ranks=None):
    """Loss, all metrics and the gradient of a micro-batch, and its row."""
    model.zero_grad()
    form = Packed(args, model, ranks=ranks)
    batch = form.collator(rows)
    with torch.no_grad():
        reference = form.pair(model, form.collator.short_pair(rows))
    sent.clear()
    scored.clear()
    top = reference.top and reference.top._replace(logps_NC=(reference.top.logps_NC / 2).log_softmax(-1))
    logps = form.policy(model, batch, top)
    if args.pref_loss in ("sigmoid", "ipo", "hinge"):
        logps = logps._replace(ref_chosen_B=reference.chosen_B + 1, ref_rejected_B=reference.rejected_B)
    losses_B, parts = OBJECTIVES[args.solopo_objective](logps, args)
    losses_B.mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return losses_B.detach(), torch.stack([*parts.values()]), gradient.clone(), batch["policy"]


def case(
    ranks: Ranks, name: str, lengths, kind="qwen2", heads=4, kv_heads=2, checkpointing=None, rejected=1, **changes
) -> None:
    args, model = settings(**changes), model_of(kind, heads, kv_heads, checkpointing)
    by_group = [samples(*lengths, rejected=rejected) for _ in range(ranks.groups)]
    alone = [step(model, rows, args) for rows in by_group]
    losses, metrics, gradient, packed = step(model, by_group[ranks.group], args, ranks)
    counted_bytes, hidden = sum(sent), torch.tensor(sum(scored))
    dist.all_reduce(hidden, group=ranks.link)
    dist.all_reduce(gradient)
    gradient /= world
    wanted = torch.stack([one[2] for one in alone]).mean(0)
    shape = SimpleNamespace(layers=LAYERS, heads=heads, key_heads=kv_heads, query=heads * HEAD)
    formula = exchanged(
        shape, packed["input_ids"].shape[1], ranks.size, WIDTH, passes=2 if checkpointing is None else 3
    )
    own = alone[ranks.group]
    found = dict(
        case=name, size=ranks.size, rank=rank, loss=float((losses - own[0]).abs().max() / own[0].abs().max()),
        metrics=float((metrics - own[1]).abs().max() / own[1].abs().max()),
        gradient=float((gradient - wanted).norm() / wanted.norm()), sent=counted_bytes, formula=formula,
        scored=int(hidden), most=2 * sum(packed["counts"]) * heads * HEAD * WIDTH,
    )  # fmt: skip
    print("\n" + json.dumps(found), flush=True)


USUAL = ((9, 33, 6, 5), (7, 21, 3, 8))
for ranks in map(ranks_of, map(int, sys.argv[1:])):
    case(ranks, "orpo", USUAL)
    case(ranks, "simpo, both", USUAL, pref_loss="simpo", long_pair=True)
    case(ranks, "sigmoid", USUAL, pref_loss="sigmoid")
    case(ranks, "ipo", USUAL, pref_loss="ipo")
    case(ranks, "hinge, detached", USUAL, pref_loss="hinge", solopo_detach_short=True)
    case(ranks, "longpo", USUAL, pref_loss="sigmoid", longpo=True, long_pair=True, solopo_objective="longpo")
    case(ranks, "distill", USUAL, distills=True, solopo_align="distill")
    case(ranks, "distill, both, likeliest, small chunks", USUAL, rejected=2, long_pair=True, distills=True,
         solopo_align="distill", solopo_distill_kl="reverse", solopo_distill_topk=5, solopo_logp_chunk=2)  # fmt: skip
    case(ranks, "distill, long is short", ((9, None, 6, 5), (7, 21, 1, 8)), distills=True, solopo_align="distill")
    case(ranks, "anchor", USUAL, use_ref_model=True, solopo_anchor=0.7)
    case(ranks, "long is short", ((9, None, 6, 5), (7, 21, 3, 8)))
    case(ranks, "cut within the chosen response", ((14, None, 16, 4),))
    case(ranks, "two rejected", USUAL, rejected=2)
    case(ranks, "one token each", ((1, None, 1, 1),))
    case(ranks, "shorter than the ranks are many", ((1, 1, 1, 1),))
    case(ranks, "one key head", USUAL, kv_heads=1)
    case(ranks, "three key heads", USUAL, heads=12, kv_heads=3)
    case(ranks, "a head each", USUAL, kv_heads=4)
    case(ranks, "llama, checkpointed, reentrant", USUAL, kind="llama", checkpointing="reentrant")
    case(ranks, "mistral, a window", USUAL, kind="mistral")
    case(ranks, "qwen3, checkpointed", USUAL, kind="qwen3", checkpointing="non-reentrant")
    case(ranks, "checkpoints on the CPU", USUAL, checkpointing="unsloth")
dist.barrier()
os._exit(0)
