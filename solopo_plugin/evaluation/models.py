"""Find the models that an evaluation asks: whole ones and LoRA adapters, one by one or all checkpoints of a run."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..qa.checkpoints import by_step
from ..qa.files import DataError, as_data_error, is_path
from ..qa.generate.calls import Model
from ..qa.provenance import TOKENIZER, doubtful_weights, indexed_files, residual_adapter
from .recipe import TITLE, EvalRecipe


def find_models(recipe: EvalRecipe) -> list[Model]:
    """Find the recipe's models in its order, then the checkpoints, those of each folder by step.

    The name of each is unique.

    Raises:
        DataError: A folder without a model or checkpoint, a half-written one, an adapter whose model is missing.
    """
    given = recipe.models or {}
    pairs = list(given.items()) if isinstance(given, dict) else [(None, path) for path in given]
    for name, path in pairs:
        if not isinstance(path, str) or not path.strip():
            raise DataError(f"`models` must name a folder or a model of the hub, got {path!r} for {name!r}.")
    found = [(name, _model(path, recipe)) for name, path in pairs]
    for folder in recipe.checkpoints or []:
        checkpoints = _checkpoints(Path(folder), recipe)
        base = _base(checkpoints[0], folder, recipe) if recipe.with_base else None
        if base and base.place not in [model.place for _, model in found]:  # several runs may have begun from it
            found.append((None, base))
        found += [(None, model) for model in checkpoints]
    for place, n in Counter(model.place for _, model in found).items():
        if n > 1:
            raise DataError(f"{place} is named {n} times in the {TITLE}; once is enough.")
    names = _names([(str(name) if name is not None else None, model.place) for name, model in found])
    return [complete(model, name, recipe, len(found) == 1) for name, (_, model) in zip(names, found, strict=True)]


def complete(model: Model, name: str, recipe: EvalRecipe, alone: bool = True) -> Model:
    """Return a model with all that the recipe says of it.

    Raises:
        DataError: `server_urls` or `served_model` is there by model, and not for this one.
    """
    return replace(
        model, name=name, tokenizer=_tokenizer(recipe, model.path), rope_factor=recipe.rope_factor, alone=alone,
        server_urls=_of(recipe.server_urls, name, "server_urls"),
        served_model=_of(recipe.served_model, name, "served_model"),
    )  # fmt: skip


def as_row(model: Model) -> dict[str, Any]:
    """Return what files of an evaluation say of a model."""
    return {name: getattr(model, name) for name in ("name", "path", "adapter", "step")}


def stored_models(recipe: EvalRecipe, path: Path) -> list[Model]:
    """Read the models of the last run, whose files may be gone.

    Args:
        recipe: It may name a model otherwise at its servers.
        path: Of a JSON list of `as_row`.

    Raises:
        DataError: There is no such file, or it is another one.
    """
    with as_data_error(path, "read"):
        text = path.read_bytes()
    try:
        models = [Model(**row) for row in json.loads(text)]
    except (ValueError, TypeError):
        raise DataError(f"{path} is no list of models of ours; evaluate without `--rescore`.") from None
    return [replace(model, served_model=_of(recipe.served_model, model.name, "served_model")) for model in models]


def _of(value: str | dict | None, name: str, key: str) -> str | None:
    """Return a key's value for the model `name`, where it may have one for each."""
    if not isinstance(value, dict):
        return value
    of_models = {str(model): text for model, text in value.items()}
    if name not in of_models:
        raise DataError(f"`{key}` says nothing of the model {name}, only of {', '.join(of_models)}.")
    if not isinstance(of_models[name], str):
        raise DataError(f"`{key}` must have a text for the model {name}, got {of_models[name]!r}.")
    return of_models[name]


def _tokenizer(recipe: EvalRecipe, path: str) -> str:
    """Return where a model's tokenizer is: beside its weights, else at the recipe's model_name_or_path.

    A name that only a server knows has none of its own.
    """
    folder = Path(path)
    own = recipe.backend != "openai"
    if folder.is_dir():
        own = any(found for pattern in TOKENIZER for found in folder.glob(pattern))
    return path if own or not recipe.model_name_or_path else recipe.model_name_or_path


def _model(path: str, recipe: EvalRecipe, step: int | None = None) -> Model:
    """Return what is at a path; the name is not yet chosen."""
    folder = Path(path)
    if folder.is_file():
        raise DataError(f"{path}, which the {TITLE} names as a model, is a file; give the folder that it is in.")
    if not folder.is_dir():
        if is_path(path):
            raise DataError(
                f"There is no folder {path}, which the {TITLE} names as a model; check the path, or before it is "
                "trained ask the others alone: models=FOLDER_OR_HUB_NAME."
            )
        return Model(path)
    if (folder / "adapter_config.json").exists():
        _check_weights(folder, "adapter_model.safetensors", "adapter_model.bin")
        if sentence := residual_adapter(folder, recipe.backend):
            raise DataError(f"{folder} {sentence}")
        below = _below(folder, recipe)
        _check_once(Path(below), recipe)
        return Model(below, str(folder), step=step)
    if (folder / "config.json").exists():
        _check_once(folder, recipe)
        _check_weights(folder, "model*.safetensors", "pytorch_model*.bin", "*.safetensors")
        return Model(str(folder), step=step)
    if step is None and by_step(folder):
        raise DataError(f"{folder} holds checkpoints and no model of its own; write `checkpoints: {folder}`.")
    raise DataError(
        f"{folder} holds no model: neither config.json nor adapter_config.json is there; before it is trained ask the "
        "others alone: models=FOLDER_OR_HUB_NAME."
    )


def _checkpoints(folder: Path, recipe: EvalRecipe) -> list[Model]:
    steps = by_step(folder)
    if not steps:
        reason = "holds no checkpoint-*" if folder.is_dir() else "is no folder"
        raise DataError(f"`checkpoints: {folder}` {reason}; give the `output_dir` of a training run with checkpoints.")
    return [_model(str(path), recipe, step) for step, path in steps.items()]


def _check_once(folder: Path, recipe: EvalRecipe) -> None:
    """Refuse a folder whose weights are there in two forms, of which programs load one or the other."""
    if sentence := doubtful_weights(folder, recipe.backend):
        raise DataError(f"{folder} {sentence}")


def _check_weights(folder: Path, *patterns: str) -> None:
    """Refuse a folder whose weights were not, or not all, written."""
    files = _weights(folder, patterns)
    if not any(path.stat().st_size for path in files):
        advice = "wait until they are written, or remove the folder"
        if (folder / "zero_to_fp32.py").exists():
            advice = "DeepSpeed's zero_to_fp32.py, which is in it, makes them"
        raise DataError(f"{folder} has no weights ({' or '.join(patterns)}): {advice}.")
    for path in files:
        if path.suffix == ".safetensors" and not _is_whole(path):
            raise DataError(
                f"{path} is not whole: its {path.stat().st_size} bytes are fewer than its tensors take, or it is no "
                "safetensors file; wait until it is written, or copy or download it again."
            )


def _weights(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """List the files that are loaded: of the first pattern that has any the one file, or those that an index names."""
    for pattern in patterns:
        name = pattern.replace("*", "")
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = indexed_files(index)
            if (folder / name).is_file() and folder / name not in files:
                return [folder / name]
            if missing := [path.name for path in files if not path.is_file()]:
                raise DataError(f"{folder} lacks {missing[0]}, which {index.name} names; wait until it is written.")
            return files
        if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return files
    return []


def _is_whole(path: Path) -> bool:
    """Return whether a file of safetensors is as long as its header says that its tensors are; it is not read."""
    try:
        with as_data_error(path, "read"), safe_open(path, "np"):
            return True
    except SafetensorError:
        return False


def _below(adapter: Path, recipe: EvalRecipe) -> str:
    """Return the model below an adapter."""
    if recipe.model_name_or_path:
        return recipe.model_name_or_path
    path = adapter / "adapter_config.json"
    with as_data_error(path, "read"):
        text = path.read_bytes()
    try:
        base = json.loads(text)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise DataError(f"{path} names no base_model_name_or_path; give it as `model_name_or_path`.")
    if is_path(base) and not Path(base).is_dir():
        raise DataError(f"{adapter} was trained on {base}, which is not there; give its place as `model_name_or_path`.")
    return base


def _base(checkpoint: Model, folder: str, recipe: EvalRecipe) -> Model:
    """Return what a training run began from."""
    base = checkpoint.path if checkpoint.adapter else recipe.model_name_or_path
    if not base:
        raise DataError(f"`with_base` does not know what {folder} was trained from; give it as `model_name_or_path`.")
    return _model(base, recipe)


def _names(found: list[tuple[str | None, str]]) -> list[str]:
    """Return the names given, or the last parts of the paths, as many as it takes to tell them apart.

    Raises:
        DataError: Two given names are the same as names of files.
    """
    parts = [(name,) if name is not None else Path(place).parts for name, place in found]
    depth = [1] * len(parts)
    while True:
        names = [_file_name("-".join(p[-n:])) for p, n in zip(parts, depth, strict=True)]
        twice = {name for name, n in Counter(names).items() if n > 1}
        more = [i for i, name in enumerate(names) if name in twice and depth[i] < len(parts[i])]
        if not more:
            break
        for i in more:
            depth[i] += 1
    if twice:
        raise DataError(f"Two of the models are called {twice.pop()}; name them with `models: {{name: path}}`.")
    return names


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", text).strip("._")[:100] or "model"
