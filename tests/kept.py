"""Count what autograd keeps: for tests of scripts/step_cost.py, in one process and on ranks that share a row."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bytes_kept(model) -> Iterator[Counter]:
    """Give a counter of the bytes by storage that forwards save for backward, the model's parameters apart."""
    own, kept, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, Counter(), []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)  # or its address could be another's later
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
