"""Make the lab's base model: sure of itself over short contexts, lost in long ones. Minutes on two CPU cores.

    python scripts/lab/make_base.py [OUTPUT_FOLDER]

The result is shipped as data/lab/base. Two steps, since training on the questions alone does not get there: first
random sequences repeated three times, until copying by association appears; then the questions, over 4 to 12 pairs.
Seeds are fixed; another machine or number of threads rounds differently and gives another, similar model.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from recall import BASE, KEY, SPECIAL, WORDS, profile, questions
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from solopo_plugin.qa.files import write_json

BATCH = 64
COPIED = 0.1  # nats per token below which copying has appeared; it does so within some 100 steps
SETTLE = 300  # steps of copying after that: without them 32 pairs are answered less well (0.74 instead of 0.95)
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # what the host's template `empty` writes


def tokenizer(vocabulary: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """Return a tokenizer to which a word is a token; words are separated by white space."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("eos_token", "pad_token", "unk_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT, **names)


def untrained() -> Qwen2ForCausalLM:
    """Return a Qwen2 of 492,000 parameters, its weights drawn."""
    shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=None, eos_token_id=0, pad_token_id=1, tie_word_embeddings=False)
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(WORDS), num_key_value_heads=4, max_position_embeddings=4096, **shape, **ids)
    )


def update(model, optimizer, loss) -> float:
    """Make one optimizer step, gradients clipped to norm 1, and return the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def adamw(model, rate: float):
    """Return the optimizer of both bases."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


def loss_at(model, ids_BT: Tensor, learnt_BT: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the tokens `learnt_BT`."""
    hidden_BTD = model.model(ids_BT).last_hidden_state[:, :-1]
    learnt_BT = learnt_BT[:, 1:]
    return F.cross_entropy(model.lm_head(hidden_BTD[learnt_BT]), ids_BT[:, 1:][learnt_BT])


def copying(model, first: int, batch: int, rate: float, generator: torch.Generator) -> Iterator[float]:
    """Train on `s s s`, s of 8 to 24 random words of id `first` or more, loss on the second and third copy.

    Yields:
        The loss of each step; it ends when nobody asks for another.
    """
    optimizer = adamw(model, rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100))
    for step in itertools.count(1):
        length = int(torch.randint(8, 25, (), generator=generator))
        ids_BT = torch.randint(first, model.config.vocab_size, (batch, length), generator=generator).repeat(1, 3)
        learnt_BT = (torch.arange(3 * length) > length).expand_as(ids_BT)
        loss = update(model, optimizer, loss_at(model, ids_BT, learnt_BT))
        warmup.step()
        if step % 50 == 0:
            print(f"copying: step {step}, loss {loss:.3f}", flush=True)
        yield loss


def learn_to_copy(model, generator: torch.Generator, most: int = 3000) -> int:
    """Train until copying appears, and `SETTLE` steps more.

    Returns:
        The step at which copying appeared.
    """
    losses = copying(model, KEY, BATCH, 1e-3, generator)
    for step, loss in enumerate(itertools.islice(losses, most), 1):
        if loss < COPIED:
            for _ in itertools.islice(losses, SETTLE):
                pass
            return step
    sys.exit(f"Copying has not appeared after {most} steps (loss {loss:.2f}); try another seed.")


def learn_to_answer(model, generator: torch.Generator, steps: int = 100) -> None:
    """Train on the answers to questions over 4 to 12 pairs."""
    optimizer = adamw(model, 5e-4)
    for _ in range(steps):
        pairs = int(torch.randint(4, 13, (), generator=generator))
        ids, _, right_B, _ = questions(BATCH, pairs, pairs, generator)
        update(model, optimizer, F.cross_entropy(model(ids, logits_to_keep=1).logits[:, -1], right_B))


def save(model, folder: Path, vocabulary: list[str] = WORDS) -> None:
    """Save weights in fp16, half the size; the configuration says fp32, in which they are loaded again."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(vocabulary).save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main(folder: str | Path = BASE, seed: int = 0) -> None:
    """Train the base of the first task and write it to a folder, with its accuracy by length."""
    start = time.time()
    torch.manual_seed(seed)
    model, generator = untrained(), torch.Generator().manual_seed(seed)
    copying = learn_to_copy(model, generator)
    learn_to_answer(model, generator)
    save(model, Path(folder))
    again = Qwen2ForCausalLM.from_pretrained(folder)
    measured = profile(again)
    write_json(Path(folder) / "profile.json", {"accuracy": measured, "copying_after_steps": copying, "seed": seed})
    print(json.dumps(measured))
    print(f"base of {again.num_parameters():,} parameters saved to {folder} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUTPUT_FOLDER", nargs="?", default=BASE)
    main(parser.parse_args().folder)
