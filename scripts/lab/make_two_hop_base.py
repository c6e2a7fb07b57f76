"""Make the base of the lab's second task: good over short contexts, lost in long ones. A minute on one CPU core.

    python scripts/lab/make_two_hop_base.py [OUTPUT_FOLDER]

The result is shipped as data/lab/two_hop_base. Two steps as in make_base.py: copying, then questions, several behind
each context, over 6 to 9 documents. It stops while it still errs, since pairs are made of right and wrong answers.

Heads of the first layer begin as heads that look 1, 2, 3 and 4 words back, by the biases of their queries and keys:
copying appears after some 300 steps. Without it, with vocabularies of 384 and of 1,923 words, it had not after 700.
"""

import argparse
import json
import random
import time
from itertools import islice
from pathlib import Path

import torch
from make_base import adamw, copying, loss_at, save, update
from transformers import Qwen2Config, Qwen2ForCausalLM
from two_hop import BASE, FIRST, PROMPT, SECOND, SPECIAL, WORDS, World, measure

from solopo_plugin.qa.files import write_json
from solopo_plugin.qa.prompts import document_text, lay_out, split_prompt

COPIES, COPY_STEPS = 32, 350  # sequences in a step of copying, steps
BATCH, STEPS = 16, 110  # contexts in a step of questions, steps
ASKED = 3  # questions behind a context
DOCUMENTS = (6, 9)  # least and most in a context; 9 are SHORT tokens
SHARP = 30.0  # of where these heads look: the larger, the less beside that word; ours
FREQUENCIES = 6  # of RoPE, the fastest, that do it
IDS = {word: i for i, word in enumerate(WORDS)}


def untrained() -> Qwen2ForCausalLM:
    """Return a Qwen2 of two layers and 580,000 parameters, its weights drawn but for `look_back`."""
    shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096)
    ids = dict(bos_token_id=None, eos_token_id=0, pad_token_id=1, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(WORDS), initializer_range=0.06, **shape, **heads, **ids))
    look_back(model)
    return model


@torch.no_grad()
def look_back(model) -> None:
    """Let head h of the first layer look h + 1 words back.

    RoPE turns queries and keys by their place; a constant key, turned by h + 1 places beforehand, agrees best with a
    constant query where it stands h + 1 places before it.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    half = config.hidden_size // config.num_attention_heads // 2
    turn = 10_000.0 ** (-torch.arange(half) / half)  # radians a word, RoPE's
    size = torch.where(torch.arange(half) < FREQUENCIES, SHARP**0.5, 0.0)
    back = 1 + torch.arange(config.num_attention_heads)[:, None]
    zero = torch.zeros(half)
    attention.q_proj.bias.copy_(torch.cat([size, zero]).repeat(len(back)))
    attention.k_proj.bias.copy_(torch.cat([size * (turn * back).cos(), size * (turn * back).sin()], 1).flatten())


def lesson(n_documents: int, rng: random.Random) -> tuple[list[int], list[bool]]:
    """Draw a context with `ASKED` questions and answers: its token ids, and for each whether it is an answer's."""
    world = World(n_documents, rng)
    people = rng.sample(list(world.people), min(ASKED, n_documents // 2))
    asked = [world.ask(person, rng.choice(list(FIRST)), rng.choice(list(SECOND))) for person in people]
    shown = list(dict.fromkeys(name for one in asked for name in one["names"]))
    shown += rng.sample([name for name in world.paragraphs if name not in shown], n_documents - len(shown))
    rng.shuffle(shown)
    texts = [one["text"] for one in asked]
    before, behind = split_prompt(PROMPT)
    documents = [document_text({"title": "", "text": world.paragraphs[name]}) for name in shown]
    first, _ = lay_out(before, behind, texts[0], documents)
    prompts = [first, *(behind.replace("{question}", text) for text in texts[1:])]
    answers = [f"{one['chain']} {SPECIAL[0]}" for one in asked]
    parts = [part for pair in zip(prompts, answers, strict=True) for part in zip(pair, (False, True), strict=True)]
    words = [(IDS[word], learnt) for text, learnt in parts for word in text.split()]
    ids, learnt = zip(*words, strict=True)
    return list(ids), list(learnt)


def learn_to_answer(model, rng: random.Random) -> None:
    """Train on all words of the answers."""
    optimizer = adamw(model, 1e-3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 30))
    for step in range(1, STEPS + 1):
        n_documents = rng.randint(*DOCUMENTS)
        lessons = [lesson(n_documents, rng) for _ in range(BATCH)]
        loss = update(model, optimizer, loss_at(model, *(torch.tensor(part) for part in zip(*lessons, strict=True))))
        warmup.step()
        if step % 25 == 0:
            print(f"questions: step {step}, loss {loss:.3f}", flush=True)


def main(folder: str | Path = BASE, seed: int = 0) -> None:
    """Train the base of the second task and write it to a folder."""
    start = time.process_time()
    torch.manual_seed(seed)
    model, generator, rng = untrained(), torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in islice(copying(model, len(SPECIAL), COPIES, 2e-3, generator), COPY_STEPS):
        pass
    learn_to_answer(model, rng)
    save(model, Path(folder), WORDS)
    seconds = time.process_time() - start
    print(f"base of {model.num_parameters():,} parameters saved to {folder} after {seconds:.0f} CPU seconds")
    measured = measure(Path(folder))
    write_json(Path(folder) / "profile.json", {"accuracy": measured, "seed": seed})
    print(json.dumps(measured))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUTPUT_FOLDER", nargs="?", default=BASE)
    main(parser.parse_args().folder)
