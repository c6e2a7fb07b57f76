"""Reference log-probs, computed once (`solopo_reference: cached`): scored before training, kept on disk, given to rows.

The reference is the policy as it starts (its adapter off), so no second model is loaded: the model scores every row by
the step's own forward of the short pair, each rank its share, before the first step. A `ref_model` from elsewhere is
loaded for that and freed. Either way a step runs no reference.

A folder of scores belongs to one identity: weights, adapters, configuration, dtype, form of the forward, versions. In
it a score belongs to one row, by a hash of its tokens (which is template, tokenizer and text). So what a killed run had
scored, another alpha, a sub-set, or other long contexts find their scores, and nothing else ever does.

Shape suffixes: B samples, N distinct rows, 2 chosen and rejected.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HOME
from llamafactory.extras import logging
from llamafactory.extras.misc import torch_gc
from torch import Tensor
from tqdm import tqdm
from transformers.utils.hub import cached_file

from . import __version__
from .args import LENGTH_NORMALISED
from .attention import base_of
from .data import REFERENCE, data_sets
from .host.versions import installed

SEEN = ["short_prompt_ids", "chosen_ids", "rejected_ids"]  # columns that the reference is shown
UNKNOWN = -torch.inf  # no log-prob of a real row: scores that are not finite are refused
logger = logging.get_logger(f"llamafactory.{__name__}")  # under the host's logger, which has the handlers


# ---- what a score belongs to


def identity(trainer, model_args, finetuning_args) -> dict:
    """All that a score depends on beside the row. A model's files count by content, not by path."""
    config = base_of(trainer.model).config
    elsewhere = finetuning_args.ref_model is not None
    quantization = ("quantization_bit", "quantization_method", "quantization_type", "double_quantization")
    kernels = ("upcast_layernorm", "enable_liger_kernel", "use_v1_kernels", "rope_scaling")
    adapters = finetuning_args.ref_model_adapters if elsewhere else model_args.adapter_name_or_path
    facts = {
        "versions": {"solopo": __version__, **{name: installed(name) for name in ("torch", "transformers")}},
        "weights": digest(finetuning_args.ref_model if elsewhere else model_args.model_name_or_path, model_args),
        "adapters": [
            digest(path, model_args) for path in ([adapters] if isinstance(adapters, str) else adapters or [])
        ],
        "config": {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "use_cache")},
        "arguments": {name: getattr(model_args, name) for name in (*quantization, *kernels)},
        "ref_model_quantization_bit": finetuning_args.ref_model_quantization_bit,
        "dtype": {name: str(getattr(trainer.args, name)) for name in ("bf16", "fp16")}
        | {"weights": str(next(base_of(trainer.model).parameters()).dtype), "compute": str(model_args.compute_dtype)},
        "deepspeed": trainer.is_deepspeed_enabled,  # it casts the weights, where others cast while computing
        "device": trainer.args.device.type,
        "attention": config._attn_implementation,
        "forward": "packed" if trainer.packed else "two_stage",
        "logps": "mean" if finetuning_args.pref_loss in LENGTH_NORMALISED else "sum",
    }
    if model_args.train_from_scratch or model_args.resize_vocab:  # weights that are drawn, not read
        facts["seed"] = trainer.args.seed
    return json.loads(json.dumps(facts, default=str))


def digest(path: str, model_args) -> dict[str, str]:
    """SHA-256 by name of the files that make a model: weights, configuration, code. `path`: a folder or a hub name."""
    folder = Path(path)
    if not folder.is_dir():
        options = dict(
            cache_dir=model_args.cache_dir, revision=model_args.model_revision, token=model_args.hf_hub_token
        )
        names = ("config.json", "adapter_config.json")
        found = [cached_file(path, n, **options, _raise_exceptions_for_missing_entries=False) for n in names]
        folder = Path(next(file for file in found if file)).parent
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin", ".py")]
    files += [f for f in (folder / "config.json", folder / "adapter_config.json") if f.exists()]
    return {file.name: _file_digest(file) for file in files}


def _file_digest(file: Path) -> str:
    if file.is_symlink() and file.resolve().parent.name == "blobs":  # the hub's cache names files by their content
        return file.resolve().name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def row_key(row: dict) -> str:
    """A row as the reference sees it: its short prompt and both responses."""
    digest = hashlib.sha256()
    for name in SEEN:
        ids = np.asarray(row[name], dtype=np.int64)
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    return digest.hexdigest()[:32]


# ---- where scores are kept


class Store:
    """Scores of one identity: `identity.json` and, a file per writer, lines of `{"row", "chosen", "rejected"}`."""

    def __init__(self, facts: dict):
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self.facts, self.folder = facts, cache_folder() / name
        self.path, self.stream = self.folder / f"{uuid.uuid4().hex}.jsonl", None

    def open(self) -> None:
        """Make the folder, or see that it is what its name says."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "identity.json").exists() and not any(self.folder.glob("*.jsonl")):
                draft = self.folder / f"{uuid.uuid4().hex}.tmp"
                draft.write_text(json.dumps(self.facts, indent=1, sort_keys=True))
                os.replace(draft, self.folder / "identity.json")
        except OSError as error:
            raise OSError(
                f"Reference scores cannot be kept in {self.folder} ({error.strerror}); set SOLOPO_CACHE to a folder "
                "that can be written, or `solopo_reference: online`."
            ) from error

    def check(self) -> None:
        """Refuse scores of another model."""
        try:
            theirs = json.loads((self.folder / "identity.json").read_text())
        except (OSError, ValueError):
            theirs = {}
        differ = sorted(key for key in self.facts.keys() | theirs.keys() if self.facts.get(key) != theirs.get(key))
        if differ:
            raise ValueError(
                f"{self.folder} holds reference scores of another model or setting ({', '.join(differ)} differ); "
                "remove the folder to score anew."
            )

    def read(self) -> dict[str, tuple[float, float]]:
        """All scores; a line that was cut off when its writer was killed is no score."""
        scores = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    scores.setdefault(entry["row"], (entry["chosen"], entry["rejected"]))
                except (ValueError, KeyError, TypeError):
                    continue
        return scores

    def write(self, keys: list[str], logps_B2: Tensor) -> None:
        """Append scores to this writer's file, at once."""
        if self.stream is None:
            self.stream = self.path.open("w")
        for key, (chosen, rejected) in zip(keys, logps_B2.tolist(), strict=True):
            self.stream.write(json.dumps({"row": key, "chosen": chosen, "rejected": rejected}) + "\n")
        self.stream.flush()


def cache_folder() -> Path:
    """`SOLOPO_CACHE`, or beside the hub's cache."""
    return Path(os.environ.get("SOLOPO_CACHE") or Path(HF_HOME) / "solopo") / "reference"


# ---- scoring


def add_reference_logps(trainer, model_args, finetuning_args, load: Callable[[], torch.nn.Module] | None) -> None:
    """Give every row of the trainer's data sets the columns `REFERENCE`, from disk or by scoring.

    Args:
        load: Loads a `ref_model` from elsewhere; None where the policy, as it starts, is the reference.
    """
    if trainer.is_fsdp_enabled:
        raise ValueError("`solopo_reference: cached` does not run under FSDP; set `online`, or use DeepSpeed ZeRO-3.")
    store = Store(
        _from_main(identity(trainer, model_args, finetuning_args) if trainer.args.process_index == 0 else None)
    )
    if trainer.args.local_process_index == 0:
        store.open()
    trainer.accelerator.wait_for_everyone()
    store.check()

    splits = data_sets(trainer.train_dataset, trainer.eval_dataset)
    keys = {name: [row_key(row) for row in split.select_columns(SEEN)] for name, split in splits.items()}
    places = {}  # of the distinct rows: data set and index
    for name in splits:
        for index, key in enumerate(keys[name]):
            places.setdefault(key, (name, index))
    known = store.read()
    logps_N2 = torch.tensor([known.get(key, (UNKNOWN, UNKNOWN)) for key in places], dtype=torch.float32)
    logps_N2 = _agree(logps_N2.to(trainer.args.device))
    missing = logps_N2.isinf().any(1).nonzero().squeeze(1).tolist()
    logger.info_rank0(
        f"Reference log-probs: {len(places) - len(missing)} rows are in {store.folder}, {len(missing)} to score."
    )
    if missing:
        logps_N2 = _score(trainer, load, store, splits, list(places.items()), logps_N2, missing)
    scores = dict(zip(places, logps_N2.tolist(), strict=True))
    for name, split in splits.items():
        for column, side in zip(REFERENCE, zip(*(scores[key] for key in keys[name]), strict=True), strict=True):
            split = split.add_column(column, np.asarray(side, dtype=np.float32))
        splits[name] = split
    trainer.train_dataset = splits.pop(("train", ""), None)
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {name: split for (_, name), split in splits.items()}
    else:
        trainer.eval_dataset = next(iter(splits.values()), None)


def _score(trainer, load, store, splits, rows, logps_N2: Tensor, missing: list[int]) -> Tensor:
    """Score the missing rows, each rank its share of the batches; equally many on every rank, as ZeRO-3 needs it."""
    args = trainer.args
    size, rank, world = args.per_device_eval_batch_size, args.process_index, args.world_size
    batches = [missing[i : i + size] for i in range(0, len(missing), size)]
    batches += batches[-1:] * (-len(batches) % world)
    mine = batches[rank::world]
    model = trainer.model if load is None else load()
    with _ready_to_score(trainer, model, own=load is None) as scorer, tqdm(
        total=len(missing), desc="Scoring the reference", unit="row", disable=args.disable_tqdm or rank > 0
    ) as bar:  # fmt: skip
        for batch in mine:
            features = [splits[name][index] for _, (name, index) in (rows[n] for n in batch)]
            logps_B2 = trainer.score_pair(scorer, features).float()
            _check_finite(logps_B2, features)
            store.write([rows[n][0] for n in batch], logps_B2)
            logps_N2[batch] = logps_B2.to(logps_N2.device)
            bar.update(min(len(batch) * world, bar.total - bar.n))
    del model
    torch_gc()
    return _agree(logps_N2)


def _check_finite(logps_B2: Tensor, features: list[dict]) -> None:
    bad = [f["row"] for f, finite in zip(features, logps_B2.isfinite().all(1).tolist(), strict=True) if not finite]
    if bad:
        raise FloatingPointError(
            f"The reference's log-prob of {', '.join(bad)} is not finite; look at the model and its dtype (`bf16` "
            "rather than `fp16`), and at the row."
        )


@contextmanager
def _ready_to_score(trainer, model, own: bool):
    """A model that can run forwards without gradients: on its device, sharded as the recipe says, its adapter off.

    DeepSpeed: an engine without optimizer, as the host makes one for a reference model, taken off again afterwards.
    """
    training, engine = model.training, None
    if trainer.is_deepspeed_enabled:
        from trl.models.utils import prepare_deepspeed

        engine = prepare_deepspeed(model, trainer.accelerator)
    elif not hasattr(model, "hf_device_map"):
        model.to(trainer.args.device)
    as_reference = model.disable_adapter() if own and hasattr(model, "disable_adapter") else nullcontext()
    model.eval()
    try:
        with torch.no_grad(), as_reference, trainer.accelerator.autocast():
            yield engine or model
    finally:
        if engine is not None:
            for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
                hook.remove()
            engine.destroy()
        model.train(training)


def _agree(logps_N2: Tensor) -> Tensor:
    """Every rank's scores together; where two ranks have one, the larger of two roundings, the same everywhere."""
    if dist.is_initialized():
        dist.all_reduce(logps_N2, op=dist.ReduceOp.MAX)
    return logps_N2


def _from_main(facts: dict | None) -> dict:
    return broadcast_object_list([facts])[0]
