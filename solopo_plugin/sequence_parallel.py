"""Share one packed row among P ranks, each a P-th of its tokens (`solopo_sequence_parallel`).

All of a decoder but attention works token by token, on a rank's own tokens. Attention exchanges tokens for heads
(DeepSpeed-Ulysses, arXiv:2309.14509): a rank attends within the segments of the whole row with a P-th of the heads.
Behind the decoder the hidden states that need logits are dealt out anew: a rank scores a P-th of every span, whoever
held it, so that logits are spread evenly, and two spans of equal length have their tokens on the same ranks.

Gradients equal one process's. The spans' sums are added over the group, so its ranks have one loss L, and the sum's
backward adds what each of them asks for: P * dL. Each rank thus holds its tokens' share of P * dL. The mean over all
W = G * P ranks, which DDP and ZeRO take as always, is (1 / W) * sum over G groups of P * dL: the mean over the groups.

What cannot share rows is refused in four places, each as soon as what decides is known:

    known            refused                                               where
    the recipe       two stages, streams, FSDP; in LlamaBoard too          host/arguments.py, `_of_shared_rows`
    the machine      P and its GPUs, the processes, a local model's heads  host/preflight.py, `_shared_rows`
    the processes    P and they, or the heads of any model                 workflow.py, `check_sharing`
    the model        one that does not run packed rows                     workflow.py, `choose_form`

Shape suffixes: H heads, h of one rank, T tokens of the row, t of one rank, D head size, E hidden size, K scored tokens,
S of one rank.
"""

from dataclasses import dataclass
from math import lcm

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.nn.functional import all_reduce, all_to_all_single

from .packing import Plan, Segment


@dataclass(frozen=True)
class Ranks:
    """Count the processes by groups of `size` consecutive ones, which hold the same rows."""

    size: int  # processes of a group, P
    rank: int  # this process's place in its group
    groups: int  # their number; without sequence parallelism every process is one
    group: int  # this one's number
    link: dist.ProcessGroup | None = None  # that exchanges; None where `size` is 1

    @classmethod
    def of(cls, size: int, accelerator: Accelerator) -> "Ranks":
        """Return this run's, and let accelerate deal rows out to groups, and gather one process's of each."""
        world, process = accelerator.num_processes, accelerator.process_index
        if size == 1:
            return cls(1, 0, world, process)
        groups, gather = world // size, accelerator.gather
        # accelerate gives the ranks of a "tp" dimension the same batches, under DDP as under DeepSpeed
        mesh = init_device_mesh(accelerator.device.type, (groups, size), mesh_dim_names=("dp_replicate", "tp"))
        accelerator.state.device_mesh = mesh
        accelerator.gather = lambda tensor: gather(tensor).unflatten(0, (groups, size, -1))[:, 0].flatten(0, 1)
        return cls(size, process % size, groups, process // size, mesh["tp"].get_group())

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the group's ranks; its backward adds theirs."""
        return all_reduce(tensor, group=self.link)

    def part_of(self, packed: dict) -> dict:
        """Return this rank's part of a packed row, in the form of the row (packing.py).

        The row is filled up to a multiple of P by a segment of its own. `input_ids`, `position_ids`: shape (1, t).
        `positions_K`: 0, transformers' word for all, as behind the decoder only what is scored here is left.
        `targets_K`, `counts`: of this rank. `plan`: of the whole row.
        """
        tokens = packed["input_ids"].shape[1]
        pad = -tokens % self.size
        here = (tokens + pad) // self.size
        ids, places = (torch.nn.functional.pad(packed[name], (0, pad)) for name in ("input_ids", "position_ids"))
        own = slice(self.rank * here, (self.rank + 1) * here)
        behind = (Segment((tokens, tokens + pad), ((tokens, tokens + pad),)),) if pad else ()
        owners = [torch.arange(n) * self.size // n for n in packed["counts"]]
        part = Part(self, here, packed["positions_K"].cpu(), torch.cat(owners))
        return {
            "input_ids": ids[:, own],
            "position_ids": places[:, own],
            "positions_K": 0,
            "targets_K": packed["targets_K"][part.scored_K.to(ids.device)],
            "counts": [int((owner == self.rank).sum()) for owner in owners],
            "plan": Plan((*packed["plan"].segments, *behind), part),
        }


class Part:
    """Hold which part of one row is a rank's and what it scores, and exchange with the other ranks of its group."""

    def __init__(self, ranks: Ranks, here: int, positions_K: Tensor, owner_K: Tensor):
        """Take tokens that each rank holds, places in the whole row of all that is scored, and which rank scores it."""
        self.ranks, holder_K = ranks, positions_K // here
        held_K, self.scored_K = holder_K == ranks.rank, owner_K == ranks.rank
        sent, got = owner_K[held_K], holder_K[self.scored_K]  # to and from which ranks
        self.send = (positions_K[held_K] - ranks.rank * here)[sent.argsort(stable=True)]
        self.order = got.argsort(stable=True).argsort()
        self.sent, self.got = (x.bincount(minlength=ranks.size).tolist() for x in (sent, got))

    def to_heads(self, *states: Tensor) -> tuple[Tensor, ...]:
        """Exchange queries, keys and values, each (1, H, t, D), in one call: (1, h, T, D), a P-th of the heads.

        Keys and values whose heads P does not divide are repeated to the least number that it does.
        """
        size = self.ranks.size
        repeated = (x.repeat_interleave(lcm(x.shape[1], size) // x.shape[1], dim=1) for x in states)
        parts = [x[0].unflatten(0, (size, -1)) for x in repeated]
        whole = self._exchange(torch.cat(parts, dim=1)).transpose(0, 1).flatten(1, 2)
        return whole[None].split([part.shape[1] for part in parts], dim=1)

    def to_tokens(self, output_1ThD: Tensor) -> Tensor:
        """Exchange attention's output back: (1, t, H, D)."""
        parts = self._exchange(output_1ThD[0].unflatten(0, (self.ranks.size, -1)))
        return parts.transpose(0, 1).flatten(1, 2)[None]

    def to_scorers(self, hidden_1tE: Tensor) -> Tensor:
        """Exchange the hidden states that need logits: (1, S, E), those that this rank scores, in the row's order."""
        held = hidden_1tE[0][self.send.to(hidden_1tE.device)]
        return self._exchange(held, self.sent, self.got)[self.order.to(held.device)][None]

    def own(self, at_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of some scored tokens this rank scores, and their places among what it scores."""
        scored_K = self.scored_K.to(at_N.device)
        mine_N = scored_K[at_N]
        return mine_N, (scored_K.cumsum(0) - 1)[at_N[mine_N]]

    def whole(self, own: Tensor, at_N: Tensor) -> Tensor:
        """Return what all ranks know of some scored tokens, (N, ...), from what each knows of its own; no gradient."""
        known = own.new_zeros(len(at_N), *own.shape[1:])
        known[self.own(at_N)[0]] = own
        return self.ranks.total(known)

    def _exchange(self, parts: Tensor, sent: list[int] | None = None, got: list[int] | None = None) -> Tensor:
        received = parts.new_empty(len(parts) if got is None else sum(got), *parts.shape[1:])
        return all_to_all_single(received, parts.contiguous(), got, sent, group=self.ranks.link)


def why_not_shared(size: int, heads: int | None = None, processes: int | None = None) -> str | None:
    """Return why rows cannot be shared by so many ranks, and what is possible; None where they can.

    `heads` are the model's query heads and `processes` those of one machine; None while they are not known.
    """
    fits = [n for n in range(2, (heads or size) + 1) if not (heads or n) % n and not (processes or n) % n]
    if size == 1 or size in fits:
        return None
    asked = [f"the model's {heads} attention heads"] if heads else []
    asked += [f"the {processes} processes of a machine"] if processes else []
    possible = f"{', '.join(map(str, fits))} would do" if fits else "nothing but 1 would do"
    return f"`solopo_sequence_parallel: {size}` must divide {' and '.join(asked)}; {possible}."
