"""Seam 5 (docs/seams.md): all that a recipe of `stage: solopo` lacks on this machine is told in one message."""

import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError
from traceback import walk_tb
from typing import Any

from .. import args as solo
from ..qa.entries import URLS, misshapen
from ..qa.files import did_you_mean, is_path
from ..qa.provenance import doubtful_weights
from .arguments import refusals_of_keys
from .versions import wrap

LOCAL_RANK = "LOCAL_RANK"  # set by torchrun in each of its processes
DEBUG = "LLAMAFACTORY_VERBOSITY"  # DEBUG: a sentence comes with its traceback
PACKAGES = {  # `key: value` of a recipe -> the package (of several one is enough); "": what the value says
    "deepspeed:": "deepspeed",
    "quantization_bit:|optim: (?!adamw_torch).*(bit|bnb|mix)": "bitsandbytes",
    "enable_liger_kernel:": "liger_kernel",
    "use_galore:|optim: galore": "galore_torch",
    "use_apollo:|optim: apollo": "apollo_torch",
    "use_badam:": "badam",
    "use_adam_mini:": "adam_mini",
    "optim: (ada)?lomo": "lomo_optim",
    "optim: schedule_free": "schedulefree",
    "use_swanlab:": "swanlab",
    "report_to: tensorboard": "tensorboard tensorboardX",
    "report_to: (clearml|codecarbon|comet_ml|dvclive|mlflow|neptune|swanlab|trackio|wandb)": "",
}
INSTALL_BY = {  # those not by their name
    "deepspeed": 'DS_BUILD_OPS=0 pip install --no-build-isolation ".[deepspeed]"',
    "bitsandbytes": 'pip install ".[qlora]"',
}


class Refused(ValueError):
    """Refuse a recipe, data set or model before training; the text is for the user."""


def apply(launcher) -> None:
    """Patch `llamafactory.launcher` right after its import."""
    wrap((launcher, "launch", (), _speaking))


def _speaking(launch):
    """End in one sentence, not in a traceback, where the user has to put something right."""
    ours = False
    try:
        if sys.argv[1:2] == ["train"] and _under_torchrun():  # else `stage.py` reads the recipe and asks
            recipe = read_recipe(sys.argv[2:])
            if ours := recipe.get("stage") == "solopo":
                check(recipe)
        return launch()
    except Refused as error:
        if os.environ.get(DEBUG, "").upper() == "DEBUG":
            raise
        sys.exit(f"Error: {error}")
    except CalledProcessError as error:
        if not ours:
            raise
        sys.exit(error.returncode)  # torchrun has said what was wrong


@contextmanager
def refusing() -> Iterator[None]:
    """Make what is refused before training a `Refused`; under torchrun end here, with one sentence of one rank."""
    try:
        yield
    except ValueError as error:
        rank = os.environ.get(LOCAL_RANK)
        if rank is None or os.environ.get(DEBUG, "").upper() == "DEBUG":
            if isinstance(error, Refused):
                raise
            raise Refused(f"{error}{_how_to_see_where(error)}") from error
        if rank != "0":
            time.sleep(30)  # torchrun ends all ranks with the first that ends: let rank 0 speak, if it has to
        sys.exit(f"Error: {error}{_how_to_see_where(error)}")


def _how_to_see_where(error: ValueError) -> str:
    """Return nothing for a sentence of ours or of the host; a library's, as of JSON, does not say where."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    raised = frame.f_globals.get("__name__"), type(error).__module__  # what another process raised is raised again here
    ours = any(str(name).startswith(("solopo_plugin.", "llamafactory.")) for name in raised)
    return "" if ours else f" (`{DEBUG}=DEBUG` shows where)"


def read_recipe(words: list[str]) -> dict:
    """Read the recipe that a command line gives, as the host will; empty where there is none that can be read."""
    from omegaconf import OmegaConf

    with suppress(Exception):  # the host's to refuse
        if words[0].endswith((".yaml", ".yml", ".json")):  # JSON is YAML
            keys = OmegaConf.merge(OmegaConf.load(words[0]), OmegaConf.from_cli(words[1:]))
        else:
            keys = OmegaConf.from_dotlist([f"{key}={value}" for key, value in solo.flags(words).items()])
        recipe = OmegaConf.to_container(keys)
        return recipe if isinstance(recipe, dict) else {}
    return {}


def recipe_of(args: dict | list[str] | None) -> dict:
    """Return the recipe that the host is given: itself, or the words of a command line, None being this one's."""
    return args if isinstance(args, dict) else read_recipe(sys.argv[1:] if args is None else args)


def check(recipe: dict) -> None:
    """Refuse a recipe that cannot run here, with everything that is missing.

    Raises:
        Refused: One sentence, or a numbered list of several.
    """
    if found := [sentence for part in PARTS for sentence in part(recipe)]:
        raise Refused(listed(found))


def listed(sentences: list[str]) -> str:
    """Return one sentence as it is, and several as a numbered list."""
    if len(sentences) == 1:
        return sentences[0]
    lines = "".join(f"\n  {i}. {sentence}" for i, sentence in enumerate(sentences, 1))
    return f"{len(sentences)} things keep this recipe from starting here:{lines}"


def check_vocabulary(tokenizer, template, config, name: str) -> None:
    """Refuse a template whose stop tokens the model has no embedding for: all would end in an IndexError.

    Args:
        tokenizer: As the host leaves it, with the template's tokens.
        template: The host's.
        config: Of the model.
        name: Of the model, for the message.

    Raises:
        ValueError: There is such a token.
    """
    size = getattr(config.get_text_config(), "vocab_size", None) or math.inf
    for token in (tokenizer.eos_token, *template.stop_words):
        if token is not None and (tokenizer.convert_tokens_to_ids(token) or 0) >= size:
            raise ValueError(
                f"`template` writes the token {token!r}, which {name} does not know (its vocabulary has {size}): is "
                "it this model's template? Only training with `resize_vocab: true` teaches new tokens."
            )


def _again(changes: str = "", before: str = "") -> str:
    """Return the command that was given, with keys changed, each once, and without keys whose values are secrets."""
    from ..qa.kinds import SECRET  # here, since it needs pydantic, and this file must do without packages

    words, new = sys.argv[1:], dict(change.split("=") for change in changes.split())
    words = words[words[:1] == ["train"] :] or [""]
    if "stage" not in solo.flags(words) and not words[0].endswith((".yaml", ".yml", ".json")):
        words = ["RECIPE"]  # started otherwise: from Python, by Ray
    flag, kept, left_out = "--" * words[0].startswith("--"), [], False
    for word in words:
        if word.startswith(flag):  # else a flag's value
            name = word.removeprefix(flag).partition("=")[0].replace("-", "_")
            left_out = name in new or bool(SECRET.fullmatch(name))
        kept += [] if left_out else [word]
    command = shlex.join([*kept, *(f"{flag}{name}={value}" for name, value in new.items())])
    return f"{before} llamafactory-cli train {command}".strip()


def _devices() -> int:
    from llamafactory.extras.misc import get_device_count

    return get_device_count()


def _under_torchrun() -> bool:
    """Return whether torchrun has started this process, or the host will start it; the host's own rule."""
    from llamafactory.extras.misc import is_env_enabled, use_kt, use_ray

    forced = is_env_enabled("FORCE_TORCHRUN") or is_env_enabled("USE_MCA")
    return LOCAL_RANK in os.environ or forced or (_devices() > 1 and not use_ray() and not use_kt())


def _keys(recipe: dict) -> Iterator[str]:
    ours = {key: value for key, value in recipe.items() if key.startswith("solopo")}
    yield from refusals_of_keys(recipe.get)
    try:
        solo.check_keys(ours)
        solo.check_values(solo.SoloArguments(**ours))
    except ValueError as error:
        yield str(error)


def _device(recipe: dict) -> Iterator[str]:
    from transformers.utils import is_torch_bf16_gpu_available

    wanted = next((key for key in ("bf16", "pure_bf16", "fp16") if recipe.get(key)), None)
    if wanted is None or recipe.get("use_cpu"):
        return
    if not _devices():
        # a CPU has neither of the two
        on_cpu = _again("".join(f"{key}=false " for key in ("pure_bf16", "fp16") if recipe.get(key)) + "use_cpu=true")
        yield (
            f"`{wanted}: true` needs a GPU, and PyTorch finds none: look at `nvidia-smi`, or start on another machine; "
            f"a model that is small enough runs on the CPU: {on_cpu}"
        )
    elif wanted != "fp16" and not is_torch_bf16_gpu_available():
        yield f"`{wanted}: true` needs a GPU with bf16 (Ampere or later): {_again(f'{wanted}=false fp16=true')}"


def _packages(recipe: dict) -> Iterator[str]:
    other = recipe.get("quantization_method", "bnb") != "bnb"
    given = [(key, each) for key, value in recipe.items() for each in (value if isinstance(value, list) else [value])]
    for key, value in given:
        for pattern, packages in PACKAGES.items():
            if not value or (key == "quantization_bit" and other) or not re.match(pattern, f"{key}: {value}"):
                continue
            if not any(map(find_spec, names := (packages or value).split())):
                name = names[0].replace("_", "-")
                yield f"`{key}: {value}` needs the package {name}: {INSTALL_BY.get(names[0], f'pip install {name}')}"


def _launch(recipe: dict) -> Iterator[str]:
    from llamafactory import launcher

    settings = recipe.get("deepspeed")
    if isinstance(settings, str) and not Path(settings).is_file():
        yield f"`deepspeed: {settings}`: there is no such file below {Path.cwd()}; start in the repository's folder."
    if settings and not _under_torchrun():
        yield f"`deepspeed` is started by torchrun: {_again(before='FORCE_TORCHRUN=1')}"
    starts_it = sys.argv[1:2] == ["train"] and LOCAL_RANK not in os.environ and _under_torchrun()
    for word in (launcher.__file__, *sys.argv[2:]) if starts_it else ():
        if len(word.split()) > 1:  # the host parts what it gives to torchrun by blanks
            yield f"torchrun cannot be given {word!r}, which has a blank: rename the folder, file or value that has it."
    processes, devices = _processes(), _devices()
    if processes > devices > 0 and not recipe.get("use_cpu"):
        again = _again(before=f"FORCE_TORCHRUN=1 NPROC_PER_NODE={devices}")
        yield f"NPROC_PER_NODE={processes}, and there are {devices} GPUs: {again}"


def _offload(recipe: dict) -> Iterator[str]:
    settings: Any = recipe.get("deepspeed")
    offloads = False
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):  # no offload, or the host's to refuse
        config = json.loads(Path(settings).read_text(encoding="utf-8")) if isinstance(settings, str) else settings
        device = config["zero_optimization"]["offload_optimizer"]["device"]
        # where accelerate puts DeepSpeed's Adam in the place of the optimizer
        offloads = device != "none" and "optimizer" not in config and config.get("zero_force_ds_cpu_optimizer", True)
    compiler = (os.environ.get("CXX", "").split() or ["c++"])[0]
    if offloads and recipe.get("do_train") and not shutil.which(compiler) and not _adam_is_built():
        yield (
            "`deepspeed` offloads the optimizer to the CPU, for which DeepSpeed compiles its Adam at the first start; "
            f"the C++ compiler `{compiler}` is not there: apt-get install g++, or set CXX to another."
        )


def _adam_is_built() -> bool:
    """Return whether DeepSpeed's Adam was compiled when it was installed, or by an earlier run of this environment."""
    from torch.utils.cpp_extension import get_default_build_root

    package = find_spec("deepspeed")
    folder = Path(package.origin).parent if package and package.origin else Path("no-deepspeed")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    logs = [*root.glob("cpu_adam/.ninja_deps"), *root.glob("*/cpu_adam/.ninja_deps")]  # of what it was compiled
    return any(folder.glob("ops/adam/cpu_adam*.so")) or any(
        log.with_name("cpu_adam.so").is_file() and f"{folder}/".encode() in log.read_bytes() for log in logs
    )


def _processes() -> int:
    """Return how many there are or will be on this machine; the host's own rule."""
    asked = os.environ.get("NPROC_PER_NODE") or str(_devices()) if _under_torchrun() else "1"
    processes = os.environ.get("LOCAL_WORLD_SIZE") or asked
    return int(processes) if processes.isdigit() else 1


def _shared_rows(recipe: dict) -> Iterator[str]:
    size = recipe.get("solopo_sequence_parallel", 1)
    if not isinstance(size, int) or size <= 1:
        return
    from ..sequence_parallel import why_not_shared

    heads, devices, needs = None, _devices(), f"`solopo_sequence_parallel: {size}` needs {size}"
    with suppress(OSError, ValueError, AttributeError):  # the hub's, or the host's to refuse
        config = json.loads(Path(str(recipe.get("model_name_or_path")), "config.json").read_text(encoding="utf-8"))
        heads = config.get("num_attention_heads")
    if 0 < devices < size and not recipe.get("use_cpu"):
        yield f"{needs} GPUs, and PyTorch finds {devices}; set it to 1, or start where there are more."
    elif (processes := _processes()) < size:
        again = _again(before=f"FORCE_TORCHRUN=1 NPROC_PER_NODE={size}")
        yield f"{needs} processes, there would be {processes}: {again}"
    elif sentence := why_not_shared(size, heads, processes):
        yield sentence


def _models(recipe: dict) -> Iterator[str]:
    keys = ["model_name_or_path", "adapter_name_or_path"]
    refers = solo.loss_refers(recipe.get("pref_loss", "sigmoid"), recipe.get("solopo_objective", "solopo"))
    if (refers or recipe.get("solopo_anchor")) and not recipe.get("train_from_scratch"):
        keys.append("ref_model")
    for key in keys:
        for name in names_of(recipe.get(key)) if key.startswith("adapter") else filter(None, [recipe.get(key)]):
            if why := why_not_there(str(name), recipe, key.startswith("adapter")) or doubtful_weights(Path(str(name))):
                yield f"`{key}: {name}` {why}"


def why_not_there(name: str, recipe: dict, adapter: bool = False) -> str | None:
    """Say why a model cannot be loaded from here, and what to do; None if it can, or only loading it will tell.

    `name` is a folder or a name of the hub; of the recipe `cache_dir`, `model_revision`, `hf_hub_token` and
    `adapter_folder` are looked at.
    """
    file = "adapter_config.json" if adapter else "config.json"
    if adapter and recipe.get("adapter_folder"):
        file = f"{recipe['adapter_folder']}/{file}"
    if Path(name).is_dir():
        if (Path(name) / file).is_file():
            return None
        return f"is a folder without {file}: give the folder of a finished model{' adapter' * adapter}."
    if is_path(name):
        return "is a folder that is not there: check the path."
    other_hubs = (os.environ.get(f"USE_{hub}_HUB", "0").lower() for hub in ("MODELSCOPE", "OPENMIND"))
    asked = any(value in ("true", "y", "1") for value in other_hubs)
    return None if asked else _why_not_on_the_hub(name, file, recipe)


def _why_not_on_the_hub(name: str, file: str, recipe: dict) -> str | None:
    from httpx import TransportError  # of the hub's client since huggingface_hub 1; before, an OSError
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    fetch = f"hf download {name}"
    try:
        where = {"cache_dir": recipe.get("cache_dir"), "revision": recipe.get("model_revision")}
        if isinstance(try_to_load_from_cache(name, file, **where), str):
            return None
        if constants.is_offline_mode():
            return f"is not on this machine, and HF_HUB_OFFLINE keeps it from the hub: HF_HUB_OFFLINE=0 {fetch}"
        HfApi(token=recipe.get("hf_hub_token")).auth_check(name)
    except errors.HFValidationError:
        return "is neither a folder nor a name of the hub, which is `owner/model`: check the spelling."
    except errors.GatedRepoError:
        return f"is gated: accept its terms on {constants.ENDPOINT}/{name}, then: hf auth login"
    except errors.RepositoryNotFoundError:
        return "is neither a folder nor on the hub, or private: check the spelling; for a private one: hf auth login"
    except errors.HfHubHTTPError:
        return None  # a mirror may not answer this question
    except (TransportError, OSError):
        return f"is not on this machine, and the hub cannot be reached: where there is a network, {fetch}"
    return None


def _template(recipe: dict) -> Iterator[str]:
    from .template import unknown_template

    # the process that starts torchrun has not imported the host's templates, and leaves this to the ranks
    if "llamafactory.data.template" in sys.modules and recipe.get("template") is not None:
        if sentence := unknown_template(recipe["template"]):
            yield sentence


def faults_of_data(recipe: dict) -> Iterator[str]:
    """Yield a sentence for each data set that a recipe names and that is not registered, not there or not readable."""
    folder, tokenized = recipe.get("dataset_dir", "data"), recipe.get("tokenized_path")
    saved = tokenized and Path(tokenized).is_dir()
    if saved or not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return
    info = Path(folder, "dataset_info.json")
    wanted = {name: key for key in ("dataset", "eval_dataset") for name in names_of(recipe.get(key))}
    if wanted and not info.is_file():
        yield (
            f"`dataset_dir: {folder}` has no dataset_info.json: make the rows first, as the head of the recipe says, "
            "or register your own (docs/data.md)."
        )
        return
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the host's to refuse, as what is no object
    for name, key in wanted.items() if isinstance(entries, dict) else ():
        if name not in entries:
            yield f"`{key}: {name}` is not registered in {info}: {_how_to_make(name, [*entries])}"
        elif sentence := misshapen(name, entries[name]):
            yield sentence
        elif not entries[name].keys() & URLS:
            path = Path(folder, entries[name]["file_name"])
            if not (there := path.exists()) or not (any(path.iterdir()) if path.is_dir() else path.stat().st_size):
                which = "empty" if there else "not there"
                yield f"`{key}: {name}` is read from {path}, which is {which}: check the path."


def _how_to_make(name: str, registered: list[str]) -> str:
    """Say how to come by a data set: the nearest name, the data recipe that makes it, or the documentation."""
    made: dict[str, Path] = {}  # the longest name counts: one may begin with another
    for path in sorted(Path("examples/yaml").rglob("*.yaml")):
        names = re.findall(r"^dataset_name: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        made |= {known: path for known in names if name.startswith(f"{known}_")}
    if made:
        known = max(made, key=len)
        longer = " with the overrides of examples/yaml/README.md" * bool(re.match(r"\d+k_", name[len(known) + 1 :]))
        return f"python scripts/build_data.py {made[known]}{longer}"
    near = did_you_mean(name, registered).replace("Did", "did", 1)
    return f"{near}{'If not, ' * bool(near)}make rows (scripts/build_data.py), or register yours (docs/data.md)."


def names_of(value: object) -> list[str]:
    """Return the names of a list, or of a text with commas, as the host splits it."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts if str(part).strip()]


# each yields a sentence for what is missing
PARTS = (_keys, _device, _packages, _launch, _offload, _shared_rows, _models, _template, faults_of_data)
