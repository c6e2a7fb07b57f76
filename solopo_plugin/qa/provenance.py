"""Tell what results were made from: hashes of files and models, versions, what differs between settings."""

import hashlib
import json
import os
import platform
import re
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .files import DataError, as_data_error, dump

PLACES, PIECE = 64, 1 << 16  # of a large file that are read beside its ends, and the bytes at each; ours


def file_hash(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    blob = Path(path).resolve()
    if os.path.islink(path) and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names its large files by it
    with as_data_error(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return `folder_hash` of a model's or adapter's folder, `PLACES` within its large files included.

    Training or a merge may change nothing near the ends of a file: where some layers or modules alone are trained.
    """
    return folder_hash(folder, patterns, places=PLACES)


def is_of_model(known: str | None, now: str | None, folder: Path) -> bool:
    """Return whether a hash is `now`, or what `model_hash` gave of a model before it read places within large files."""
    return known == now or (known is not None and folder.is_dir() and known == folder_hash(folder, TOKENIZER + WEIGHTS))


def folder_hash(folder: Path, patterns: tuple[str, ...], whole: int | None = 1 << 24, places: int = 0) -> str:
    """Return SHA-256 over names and contents of the files in `folder` that match a pattern.

    Args:
        folder: Where the files are; folders within it are not read unless a pattern says so.
        patterns: As of `Path.glob`.
        whole: Bytes up to which a file is read whole; of a larger one, such as weights, both ends of half that size.
            None: all files are read whole.
        places: Of a larger one also `PIECE` bytes at so many evenly spaced places.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        with as_data_error(path, "read"), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(dump([path.name, size]))
            if whole is None or size <= whole:
                for piece in iter(partial(file.read, 1 << 24), b""):
                    digest.update(piece)
                continue
            half = whole // 2
            spots = [(size * n // (places + 1), PIECE) for n in range(1, places + 1)]
            for start, length in [(0, half), (size - half, half), *spots]:
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def differences(old: object, new: dict) -> list[str]:
    """Return what differs between settings then and now, one phrase each."""
    if not isinstance(old, dict):
        return ["it does not say how they were asked for"]
    return [
        f"the {name} have changed"
        if name.startswith("files of") and name in old and name in new
        else f"`{name}` was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


TOKENIZER = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
BINARIES = ("*.safetensors", "*.bin")
WEIGHTS = ("config.json", "generation_config.json", *BINARIES, "*.py")  # the last: a model's own code
ADAPTER = ("adapter_config.json", *BINARIES)
OF_THE_TRAINER = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # beside a model, no part of it


def weight_hashes(path: str, model_args, adapter: bool = False) -> dict[str, str]:
    """Return the SHA-256 by name of the files that make a model or an adapter: weights, configuration, code.

    `path`: a folder or a hub name. An adapter is looked for where the host looks: in its sub-folder `adapter_folder`.

    Raises:
        ValueError: No weights are found there, though weights were read.
    """
    from transformers.utils.hub import cached_file

    config, inside = ("adapter_config.json", model_args.adapter_folder or "") if adapter else ("config.json", "")
    folder = Path(path, inside)
    if not folder.is_dir():
        where = dict(cache_dir=model_args.cache_dir, revision=model_args.model_revision, token=model_args.hf_hub_token)
        found = cached_file(path, config, subfolder=inside, **where)
        assert found is not None  # for the type checker: a file that is not there raises
        folder = Path(found).parent
    suffixes = tuple(pattern.removeprefix("*") for pattern in BINARIES)
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.name not in OF_THE_TRAINER]
    if not any(f.suffix in suffixes for f in files) and (adapter or not model_args.train_from_scratch):
        raise ValueError(
            f"{folder} holds no weights ({', '.join(suffixes)}) by which its reference scores could be known; set "
            "`solopo_reference: online`."
        )
    kinds = (*suffixes, ".py", *((".json", ".model", ".txt") if model_args.resize_vocab else ()))  # draw new tokens
    names = (config, "adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
    return {file.name: file_hash(file) for file in files if file.suffix in kinds or file.name in names}


RESIDUAL = ("pissa", "olora", "corda", "loftq")  # initialisations of peft that change the weights below the adapter


def residual_adapter(folder: Path, backend: str = "transformers") -> str | None:
    """Say that a LoRA adapter does not fit its base model's own weights, and what to do; None if all is well.

    PiSSA and its kin begin with a part of the weights and train beside the rest. What loads such an adapter has to take
    that part off again: vLLM does not, and peft finds the same one only where it is not drawn at random.

    Args:
        folder: Of an adapter.
        backend: What is to load it.
    """
    config = None
    with suppress(OSError, ValueError):
        config = json.loads((folder / "adapter_config.json").read_bytes())
    kind = str(config.get("init_lora_weights")) if isinstance(config, dict) else ""
    again = kind.lower() in ("pissa", "olora")
    if not kind.lower().startswith(RESIDUAL) or (again and backend == "transformers"):
        return None
    advice = "train with `pissa_convert: true` and take the run's pissa_converted"
    if converted := [p / "pissa_converted" for p in (folder, folder.parent) if (p / "pissa_converted").is_dir()]:
        advice = f"take {converted[0]}, which is converted, as it was at the end of the training"
    return (
        f"is an adapter to what `init_lora_weights: {kind}` of its adapter_config.json left of the model, and would be "
        f"put on the whole one: {advice}{', or set `backend: transformers`' * again}."
    )


def doubtful_weights(folder: Path, backend: str = "transformers") -> str | None:
    """Say that a folder has a model's weights in one file and an index of shards, and what to do; None if all is well.

    Saving in one form leaves the other in place. Transformers then loads the one file, vLLM the shards, there or not.

    Args:
        folder: Of a model.
        backend: What is to load it.
    """
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):  # the second goes unseen by the first
        index = whole.with_name(f"{whole.name}.index.json")
        if there := whole.is_file() + index.is_file():
            break
    shards = [whole]
    if there == 2:
        with suppress(DataError):  # no index: nobody goes by it
            shards = indexed_files(index)
    if whole in shards:
        return None
    if any(path.is_file() for path in shards):
        return (
            f"holds weights twice, in {whole.name} and in the shards that {index.name} names, and which are loaded "
            "depends on the program: remove those that are older, shards with their index."
        )
    if backend == "vllm" and whole.suffix == ".safetensors":
        return f"holds {index.name}, by which vLLM goes and whose shards are gone: remove it."
    return None


def indexed_files(index: Path) -> list[Path]:
    """Return the files that an index of weights names, sorted.

    Raises:
        DataError: It is no index.
    """
    with as_data_error(index, "read"):
        text = index.read_bytes()
    try:
        return sorted({index.parent / name for name in json.loads(text)["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DataError(f"{index} is no index of weights: the model is half written; remove the folder.") from None


def installed(package: str) -> str:
    """Return the version of an installed package, or 'not installed'."""
    try:
        return version(package) or "not installed"  # None: metadata of a half-removed package
    except PackageNotFoundError:
        return "not installed"


def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of Python, of this package and of those of `packages` that are installed."""
    from .. import __version__

    found = {package: installed(package) for package in packages}
    here = {package: version for package, version in found.items() if version != "not installed"}
    return {"python": platform.python_version(), "solopo": __version__} | here
