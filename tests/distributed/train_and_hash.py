"""Run under torchrun: train from recipes and print, per rank, a hash of every parameter as that rank holds it."""

import hashlib
import os
import signal
import sys

import yaml
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class HashParameters(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if str(state.global_step) == os.environ.get("DIE_AT_STEP"):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
        print(f"\nrank {args.process_index} holds {digest.hexdigest()}", flush=True)


port = int(os.environ["MASTER_PORT"])
for i, path in enumerate(sys.argv[1:]):
    os.environ["MASTER_PORT"] = str(port + i)  # the host takes the processes' meeting place down after every run
    with open(path) as file:
        run_exp(yaml.safe_load(file), callbacks=[HashParameters()])
