"""Which models an evaluation asks: whole ones and LoRA adapters, one by one or all checkpoints of a training run."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..qa.files import DataError, explained
from ..qa.provenance import TOKENIZER
from .recipe import TITLE, EvalRecipe


@dataclass(frozen=True)
class ModelRef:
    """One model that is asked. `name` is unique and part of the names of its files."""

    name: str
    path: str  # folder or hub name; of an adapter the model below it
    adapter: str | None = None  # folder of a LoRA adapter
    step: int | None = None  # of a checkpoint

    @property
    def place(self) -> str:
        """What the user would load: the adapter's folder, or the model's."""
        return self.adapter or self.path


def find_models(recipe: EvalRecipe) -> list[ModelRef]:
    """The recipe's models in its order, then the checkpoints, those of each folder by step.

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
        refs = _checkpoints(Path(folder), recipe)
        if recipe.with_base:
            found.append((None, _base(refs[0], folder, recipe)))
        found += [(None, ref) for ref in refs]
    refs = [ref for _, ref in found]
    for place, n in Counter(ref.place for ref in refs).items():
        if n > 1:
            raise DataError(f"{place} is named {n} times in the {TITLE}; once is enough.")
    names = _names([(str(name) if name is not None else None, ref.place) for name, ref in found])
    return [ModelRef(name, ref.path, ref.adapter, ref.step) for name, ref in zip(names, refs, strict=True)]


def tokenizer_of(recipe: EvalRecipe, model: ModelRef) -> str:
    """Where a model's tokenizer is: beside its weights, else at the recipe's model_name_or_path.

    A name that only a server knows has none of its own.
    """
    folder = Path(model.path)
    own = recipe.backend != "openai"
    if folder.is_dir():
        own = any(path for pattern in TOKENIZER for path in folder.glob(pattern))
    return model.path if own or not recipe.model_name_or_path else recipe.model_name_or_path


def _model(path: str, recipe: EvalRecipe, step: int | None = None) -> ModelRef:
    """What is at a path; the name is not yet chosen."""
    folder = Path(path)
    if folder.is_file():
        raise DataError(f"{path}, which the {TITLE} names as a model, is a file; give the folder that it is in.")
    if not folder.is_dir():
        if path.startswith(("/", ".", "~")) or path.strip("/").count("/") > 1:
            raise DataError(f"There is no folder {path}, which the {TITLE} names as a model; check the path.")
        return ModelRef("", path)
    if (folder / "adapter_config.json").exists():
        _check_weights(folder, "adapter_model.safetensors", "adapter_model.bin")
        return ModelRef("", _below(folder, recipe), str(folder), step)
    if (folder / "config.json").exists():
        _check_weights(folder, "*.safetensors", "pytorch_model*.bin")
        return ModelRef("", str(folder), None, step)
    if step is None and any(folder.glob("checkpoint-*")):
        raise DataError(f"{folder} holds checkpoints and no model of its own; write `checkpoints: {folder}`.")
    raise DataError(f"{folder} holds no model: neither config.json nor adapter_config.json is there.")


def _checkpoints(folder: Path, recipe: EvalRecipe) -> list[ModelRef]:
    steps = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
                steps[int(match[1])] = path
    if not steps:
        reason = "holds no checkpoint-*" if folder.is_dir() else "is no folder"
        raise DataError(f"`checkpoints: {folder}` {reason}; give the `output_dir` of a training run with checkpoints.")
    return [_model(str(steps[step]), recipe, step) for step in sorted(steps)]


def _check_weights(folder: Path, *patterns: str) -> None:
    """Refuse a folder whose weights were not, or not all, written."""
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DataError(f"{index} is no index of weights: the model is half written; remove the folder.") from None
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise DataError(f"{folder} lacks {missing[0]}, which {index.name} names; wait until it is written.")
    if not any(path.stat().st_size for pattern in patterns for path in folder.glob(pattern)):
        advice = "wait until they are written, or remove the folder"
        if (folder / "zero_to_fp32.py").exists():
            advice = "DeepSpeed's zero_to_fp32.py, which is in it, makes them"
        raise DataError(f"{folder} has no weights ({' or '.join(patterns)}): {advice}.")


def _below(adapter: Path, recipe: EvalRecipe) -> str:
    """The model below an adapter."""
    if recipe.model_name_or_path:
        return recipe.model_name_or_path
    path = adapter / "adapter_config.json"
    with explained(path, "read"):
        text = path.read_bytes()
    try:
        base = json.loads(text)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise DataError(f"{path} names no base_model_name_or_path; give it as `model_name_or_path`.")
    local = base.startswith(("/", ".", "~")) or base.strip("/").count("/") > 1
    if local and not Path(base).is_dir():
        raise DataError(f"{adapter} was trained on {base}, which is not there; give its place as `model_name_or_path`.")
    return base


def _base(ref: ModelRef, folder: str, recipe: EvalRecipe) -> ModelRef:
    """What a training run began from."""
    base = ref.path if ref.adapter else recipe.model_name_or_path
    if not base:
        raise DataError(f"`with_base` does not know what {folder} was trained from; give it as `model_name_or_path`.")
    return _model(base, recipe)


def _names(found: list[tuple[str | None, str]]) -> list[str]:
    """Names given, or the last parts of the paths, as many as it takes to tell them apart.

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
