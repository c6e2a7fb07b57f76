"""Save the language model of a multimodal checkpoint alone, which `stage: solopo` packs where its kind allows it.

    python scripts/text_part.py google/gemma-3-4b-it saves/gemma-3-4b-text

Weights, tokenizer and chat template are the checkpoint's; images, sound and their processor are left out. What is saved
is a causal language model of its own `model_type` (gemma3_text, gemma4_text, qwen3_5_text).
"""

import argparse
import sys
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)

from solopo_plugin.qa.files import excerpt


def save_text_part(source: str, target: str) -> None:
    """Write the language model and tokenizer of `source`, a folder or hub name, to the folder `target`.

    Raises:
        ValueError: It has no language model within it: it is one, or of an unknown form. Or `target` has a model.
    """
    there = sorted(path.name for path in Path(target).glob("*") if path.suffix in (".safetensors", ".bin", ".json"))
    if there:  # of the source too, where it is the target
        raise ValueError(f"{target} holds a model or other files ({there[0]}); give a folder that is new.")
    config = AutoConfig.from_pretrained(source)
    if config.get_text_config() is config:
        raise ValueError(f"{source} is a text model (`{config.model_type}`) and is trained as it is.")
    whole = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    language = getattr(getattr(whole, "model", None), "language_model", None)
    if language is None:
        raise ValueError(f"`{config.model_type}` keeps its language model where it is not looked for.")
    text = AutoModelForCausalLM.from_config(language.config, dtype=whole.dtype)
    try:
        text.model.load_state_dict(language.state_dict())
        text.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict())
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"`{config.model_type}` has another language model than `{text.config.model_type}`, which loads alone: "
            f"{excerpt(error)}"
        ) from error
    text.generation_config = whole.generation_config or GenerationConfig()
    text.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def main() -> None:
    """Read the two arguments and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="folder or hub name of the checkpoint")
    parser.add_argument("target", help="folder to write")
    args = parser.parse_args()
    try:
        save_text_part(args.source, args.target)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
