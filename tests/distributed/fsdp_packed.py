"""A packed step under FSDP1 or FSDP2 with mixed precision, on two CPU processes: torchrun fsdp_packed.py 1|2.

Both wrappers cast a layer's inputs, keyword arguments among them; the plan must come through as the one object that
counts the layers. Prints the log-probs' and gradients' distance from the plain model's under autocast.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from solopo_plugin import attention
from solopo_plugin.logps import token_logps
from solopo_plugin.packing import pack

LAYERS = 4
dist.init_process_group("gloo")
torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4)
config = LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.1)
plain = LlamaForCausalLM(config).train()
sharded = LlamaForCausalLM(config).train()
sharded.load_state_dict(plain.state_dict())
row = pack([(range(1, 10), [range(20, 25), range(30, 33)]), (range(1, 40), [range(20, 25)])])
for model in (plain, sharded):
    attention.prepare(model)
if sys.argv[1] == "2":
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
else:
    mixed = MixedPrecision(torch.bfloat16, torch.float32, cast_forward_inputs=True)
    sharded = FullyShardedDataParallel(
        sharded, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), mixed_precision=mixed,
        device_id=torch.device("cpu"),
    )  # fmt: skip


def logps_of(model):
    logits = model(
        input_ids=row["input_ids"], position_ids=row["position_ids"], logits_to_keep=row["positions_K"],
        use_cache=False, solopo_segments=row["plan"],
    ).logits  # fmt: skip
    assert row["plan"].calls == LAYERS
    return token_logps(logits[0], row["targets_K"])


wanted = logps_of(plain.to(torch.bfloat16))
found = logps_of(sharded)
found.mean().backward()  # runs, in segments again where a layer is checkpointed
print(f"rank {dist.get_rank()}: log-probs differ by {(found - wanted).abs().max().item():.6f} nats", flush=True)
dist.barrier()
os._exit(0)
