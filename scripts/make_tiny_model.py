"""Build a tiny causal language model and its tokenizer on the spot: nothing is downloaded.

    python scripts/make_tiny_model.py OUTPUT_DIR [TEXT_FILE]

The weights are random (seed 0). The tokenizer is a byte-level BPE trained on the text file and on itself knows the
chat markers of Qwen's and Llama 3's templates.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
MARKERS = QWEN + LLAMA3


def train_tokenizer(texts: list[str], vocab_size: int = 1024, bos: str | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every string has an encoding, and decoding gives it back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=MARKERS[0], pad_token=MARKERS[0], bos_token=bos)


def build(path, texts: list[str], architecture="qwen2", bos: str | None = None, seed=0, tokens=1024, **config) -> None:
    """Save model and tokenizer to `path`.

    Args:
        path: Folder to write.
        texts: What the tokenizer is trained on.
        architecture: The `model_type` of transformers.
        bos: The begin-of-sequence token, for templates that begin with one.
        seed: Of the weights.
        tokens: Size of the vocabulary, at most.
        config: Overrides the tiny shape (2 layers, 4 heads of 16).
    """
    tokenizer = train_tokenizer(texts, tokens, bos)
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=0, eos_token_id=0,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(shape | config)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUTPUT_DIR")
    parser.add_argument(
        "text", metavar="TEXT_FILE", nargs="?", default=Path(__file__).parents[1] / "data/demo_solopo.jsonl"
    )
    args = parser.parse_args()
    build(args.folder, Path(args.text).read_text(encoding="utf-8").splitlines())
    print(f"tiny model saved to {args.folder}")
