"""Print what a layer keeps of a row that ranks share: torchrun shared_memory.py SIZE ...

A line of JSON for each rank and case: bytes per token of a rank that autograd saves for one layer (a model of three
layers less one of two, parameters apart), and what scripts/step_cost.py counts.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / name) for name in ("scripts", "tests")]
from kept import bytes_kept  # noqa: E402
from step_cost import Setup, shape_of, step_memory  # noqa: E402

from solopo_plugin.forward import Packed  # noqa: E402
from solopo_plugin.packing import pack  # noqa: E402
from solopo_plugin.sequence_parallel import Ranks  # noqa: E402

TINY = dict(
    model_type="qwen2", hidden_size=96, intermediate_size=160, num_attention_heads=12, vocab_size=300,
    max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
PROMPT, RESPONSE = 100, 20  # tokens
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()


def saved(layers: int, kv_heads: int, dtype: torch.dtype, ranks: Ranks) -> int:
    """Bytes that a forward saves beside the parameters."""
    config = AutoConfig.for_model(**TINY, num_hidden_layers=layers, num_key_value_heads=kv_heads, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    form = Packed(SimpleNamespace(longpo=False, long_pair=False, use_ref_model=False, distills=False, solopo_anchor=0.0,
                                  solopo_logp_chunk=8, pref_loss="orpo"), model, ranks=ranks)  # fmt: skip
    row = pack([([1] * PROMPT, [[2] * RESPONSE])]) | {"spans": {"chosen": torch.zeros(1, dtype=torch.long)}}
    with bytes_kept(model) as kept:
        form._score(model, row)
    return sum(kept.values())


for size in map(int, sys.argv[1:]):
    links = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    ranks = Ranks(size, rank % size, world // size, rank // size, links[rank // size])
    for kv_heads, dtype in ((4, torch.float32), (4, torch.bfloat16), (3, torch.bfloat16), (1, torch.bfloat16)):
        two, three = (saved(layers, kv_heads, dtype, ranks) for layers in (2, 3))
        here = (PROMPT + RESPONSE) // size
        shape = shape_of(AutoConfig.for_model(**TINY, num_hidden_layers=1, num_key_value_heads=kv_heads))
        setup = Setup(element=dtype.itemsize, checkpointing=False, sequence_parallel=size)
        # without checkpointing all that the layer keeps counts as checkpoints
        counted = step_memory(shape, "S3", 0, 1, size * here - 3, None, setup)["checkpoints"] / here
        rest = 4 * (2 + shape.heads)  # 1 / rms of both norms, attention's log-sum-exp per head, in fp32: not counted
        found = dict(size=size, kv_heads=kv_heads, kept=(three - two) / here, counted=counted + rest)
        print("\n" + json.dumps(found), flush=True)
dist.barrier()
os._exit(0)
