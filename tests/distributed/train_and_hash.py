"""Run under torchrun: train from a recipe and print, per rank, a hash of every parameter as that rank holds it."""

import hashlib
import sys

import yaml
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class HashParameters(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
        print(f"\nrank {args.process_index} holds {digest.hexdigest()}", flush=True)


with open(sys.argv[1]) as file:
    run_exp(yaml.safe_load(file), callbacks=[HashParameters()])
