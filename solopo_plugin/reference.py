"""Compute reference log-probs once (`solopo_reference: cached`): scored before training, kept on disk, given to rows.

The reference is the policy as it starts (its adapter off), so no second model is loaded: the model scores every row by
the step's own forward of the short pair, each rank its share, before the first step. A `ref_model` from elsewhere is
loaded for that and freed. Either way a step runs no reference.

A folder of scores belongs to one identity, which says what the reference is: files and how they are combined, what is
drawn and how, configuration, dtype, form of the forward, versions. In it a score belongs to one row, by a hash of its
tokens (which is template, tokenizer and text); of several rejected responses each pair is such a row. So what a killed
run had scored, another alpha, a sub-set, or other long contexts find their scores, and nothing else does: before they
are trusted, some are scored again.

Shape suffixes: B samples, N distinct rows, 2 chosen and rejected.
"""

import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO
from zipfile import is_zipfile

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HOME
from llamafactory.extras import logging
from llamafactory.extras.misc import is_env_enabled, torch_gc
from torch import Tensor
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from . import __version__
from .attention import base_of
from .data import ANCHOR_FILES, REFERENCE, data_sets, pairs_of
from .distill import Top, load_top, save_top
from .forward import ANCHOR_TOP, Pair
from .losses import LENGTH_NORMALISED
from .qa.files import as_data_error
from .qa.provenance import installed, weight_hashes

SEEN = ["short_prompt_ids", "chosen_ids", "rejected_ids"]  # columns that the reference is shown
UNKNOWN = -torch.inf  # no log-prob of a real row: scores that are not finite are refused
PACKAGES = ("llamafactory", "peft", "torch", "transformers")
logger = logging.get_logger(f"llamafactory.{__name__}")  # under the host's logger, which has the handlers


# ---- what a score belongs to

BY_VALUE = (  # of the host's model arguments; tests/test_reference.py says of every other why it is not here
    "quantization_method", "quantization_bit", "quantization_type", "double_quantization", "rope_scaling",
    "upcast_layernorm", "upcast_lmhead_output", "enable_liger_kernel", "use_v1_kernels", "trust_remote_code",
    "train_from_scratch", "resize_vocab", "add_tokens", "add_special_tokens", "init_special_tokens",
    "use_fast_tokenizer", "split_special_tokens", "low_cpu_mem_usage",
)  # fmt: skip
SWITCHED = re.compile(r"\.(lora_|oft_|modules_to_save\.)")  # parameters that an adapter switches on and off


def identity(trainer, reference, model_args, finetuning_args) -> dict:
    """Say what the reference is: all that a score depends on beside the row. Files count by content, not by path."""
    base, args, elsewhere = base_of(reference), trainer.args, reference is not trainer.model
    zero3, arguments = is_deepspeed_zero3_enabled(), {name: getattr(model_args, name) for name in BY_VALUE}
    if elsewhere:
        adapters = [path.strip() for path in (finetuning_args.ref_model_adapters or "").split(",") if path]
        arguments["quantization_bit"] = finetuning_args.ref_model_quantization_bit
        last = "active" if hasattr(reference, "disable_adapter") else "merged"
    else:
        adapters = model_args.adapter_name_or_path or []
        last = "off" if goes_on(base, model_args, finetuning_args) else "merged"
    states = ["merged"] * (len(adapters) - 1) + [last]
    facts = {
        "versions": {"solopo": __version__, **{name: installed(name) for name in PACKAGES}},
        "weights": weight_hashes(base.config._name_or_path, model_args),
        "adapters": [[s, weight_hashes(a, model_args, adapter=True)] for a, s in zip(adapters, states, strict=False)],
        "arguments": arguments,
        "config": {k: v for k, v in base.config.to_dict().items() if k not in ("_name_or_path", "use_cache")},
        "dtype": {name: str(getattr(args, name)) for name in ("bf16", "fp16", "tf32")}
        | {"weights": Counter(str(p.dtype) for name, p in base.named_parameters() if not SWITCHED.search(name))}
        | {"compute": str(model_args.compute_dtype)},
        "deepspeed": "zero3" if zero3 else trainer.is_deepspeed_enabled,  # it casts the weights
        "device": args.device.type,
        "attention": base.config._attn_implementation,
        "forward": trainer.form.name,
        "logps": "mean" if finetuning_args.pref_loss in LENGTH_NORMALISED else "sum",
    }
    if model_args.train_from_scratch or model_args.resize_vocab:  # weights that are drawn, not read
        facts["drawn"] = {"seed": args.seed, "descriptions": model_args._special_token_descriptions}
    return json.loads(json.dumps(facts, default=str))


def goes_on(model, model_args, finetuning_args) -> bool:
    """Return whether training goes on with a given adapter: the host merges all before a new one, where it can."""
    can = not is_deepspeed_zero3_enabled() and not getattr(base_of(model), "quantization_method", None)
    return bool(model_args.adapter_name_or_path) and not (finetuning_args.create_new_adapter and can)


def row_key(row: dict) -> str:
    """Return a hash of a row as the reference sees it: its short prompt and both responses."""
    parts = (np.asarray(row[column], dtype=np.int64) for column in SEEN)
    return hashlib.sha256(b"".join(np.int64(len(ids)).tobytes() + ids.tobytes() for ids in parts)).hexdigest()[:32]


# ---- where scores are kept


class Store:
    """Keep the scores of one identity: `identity.json`, and lines of `{"row", "chosen", "rejected"}` in `*.jsonl`.

    `row` is a `row_key`. Several processes may write at once, each to a file of its own. For `solopo_anchor` each row
    has a file besides: the reference's likeliest words at the tokens of the anchored responses.
    """

    def __init__(self, facts: dict, anchored: str | None = None):
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        cache = Path(os.environ.get("SOLOPO_CACHE") or Path(HF_HOME, "solopo"))  # the latter beside the hub's
        self.facts, self.folder = facts, cache / "reference" / name
        self.anchored = anchored  # `chosen` or `both`
        self.stream: TextIO | None = None

    def open(self) -> None:
        """Make the folder, and write into it what its name is the hash of."""
        try:
            (self.tops if self.anchored else self.folder).mkdir(parents=True, exist_ok=True)
            if not (self.folder / "identity.json").exists() and not any(self.folder.glob("*.jsonl")):
                draft = self.folder / f"{uuid.uuid4().hex}.tmp"
                draft.write_text(json.dumps(self.facts, indent=1, sort_keys=True))
                os.replace(draft, self.folder / "identity.json")
        except OSError as error:
            raise ValueError(
                f"Reference scores cannot be kept in {self.folder} ({error.strerror}); set SOLOPO_CACHE to a folder "
                "that can be written, or `solopo_reference: online`."
            ) from error

    def read(self) -> dict[str, tuple[float, float]]:
        """Return all scores by row key; a line that is damaged, as where its writer was killed, is no score."""
        scores: dict[str, tuple[float, float]] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, OverflowError):
                    entry = json.loads(line)
                    pair = float(entry["chosen"]), float(entry["rejected"])
                    if all(abs(logp) < 1e38 for logp in pair):  # finite in fp32
                        scores.setdefault(entry["row"], pair)
        return scores

    @property
    def tops(self) -> Path:
        """Return the folder of the files for the anchor."""
        return self.folder / f"top{ANCHOR_TOP}_{self.anchored}"

    def top(self, key: str) -> Path:
        """Return a row's file for the anchor."""
        return self.tops / f"{key}.npz"

    def tops_of(self, features: list[dict], top: Top | None) -> Iterator[Top]:
        """Yield what belongs in each row's file for the anchor, of what a forward of them gave; nothing without one."""
        if top is None:
            return
        sides = ("chosen", "rejected") if self.anchored == "both" else ("chosen",)
        counts = [len(f[f"{side}_ids"]) for side in sides for f in features]
        ids, logps = (x.split(counts) for x in top)
        for i in range(len(features)):
            of_row = slice(i, None, len(features))
            yield Top(torch.cat(ids[of_row]), torch.cat(logps[of_row]))

    def write(self, keys: list[str], logps_B2: Tensor) -> None:
        """Append scores to this writer's file, at once."""
        with as_data_error(self.folder, "write"):
            if self.stream is None:
                self.stream = (self.folder / f"{uuid.uuid4().hex}.jsonl").open("w")
            for key, (chosen, rejected) in zip(keys, logps_B2.tolist(), strict=True):
                self.stream.write(json.dumps({"row": key, "chosen": chosen, "rejected": rejected}) + "\n")
            self.stream.flush()


# ---- scoring


def with_reference_logps(trainer, model_args, finetuning_args, load: Callable[[], torch.nn.Module] | None) -> tuple:
    """Return a trainer's training and evaluation sets, every row with the columns `REFERENCE`, from disk or by scoring.

    The trainer is only read. `load` loads a `ref_model` from elsewhere; None where the policy, as it starts, is the
    reference.
    """
    if trainer.is_fsdp_enabled:
        raise ValueError("`solopo_reference: cached` does not run under FSDP; set `online`, or use DeepSpeed ZeRO-3.")
    reference = trainer.model if load is None else load()
    facts = identity(trainer, reference, model_args, finetuning_args) if trainer.args.process_index == 0 else None
    (facts,) = broadcast_object_list([facts])
    store = Store(facts, finetuning_args.solopo_align_on if finetuning_args.solopo_anchor else None)
    if trainer.args.local_process_index == 0:
        store.open()
    trainer.accelerator.wait_for_everyone()

    splits = data_sets(trainer.train_dataset, trainer.eval_dataset)
    keys: dict[tuple[str, str], list[list[str]]] = {}  # of each row's pairs
    rows: dict[str, tuple[Any, int, int]] = {}  # the distinct ones by key: data set, index, number of the pair
    for name, split in splits.items():
        keys[name] = [[row_key(pair) for pair in pairs_of(row)] for row in split.select_columns(SEEN)]
        for index, of_row in enumerate(keys[name]):
            for m, key in enumerate(of_row):
                rows.setdefault(key, (split, index, m))
    known = {key: pair for key, pair in store.read().items() if not store.anchored or is_zipfile(store.top(key))}
    logps_N2 = torch.tensor([known.get(key, (UNKNOWN, UNKNOWN)) for key in rows], dtype=torch.float32)
    logps_N2 = _score(trainer, reference, store, rows, _agree(logps_N2.to(trainer.args.device)))
    if store.anchored and (gone := [key for key in rows if not is_zipfile(store.top(key))]):
        raise ValueError(
            f"{len(gone)} of {len(rows)} files that the anchor needs are not in {store.tops} of this machine; set "
            "SOLOPO_CACHE to a folder that all machines share, or `solopo_reference: online`."
        )
    del reference
    torch_gc()
    _add_columns(splits, keys, dict(zip(rows, logps_N2.tolist(), strict=True)), store)
    train = splits.pop(("train", ""), None)
    evaluated = {name: split for (_, name), split in splits.items()}
    return train, evaluated if isinstance(trainer.eval_dataset, dict) else evaluated.get("")


def _add_columns(splits: dict, keys: dict, scores: dict[str, list[float]], store: Store) -> None:
    """Give every set the columns `REFERENCE`: of each row a list, a number for each of its pairs."""
    for name, rows in keys.items():
        for side, column in enumerate(REFERENCE):
            splits[name] = splits[name].add_column(column, [[scores[key][side] for key in row] for row in rows])
        if store.anchored:
            splits[name] = splits[name].add_column(ANCHOR_FILES, [[str(store.top(key)) for key in row] for row in rows])


def _score(trainer, reference, store: Store, rows: dict, known_N2: Tensor) -> Tensor:
    """Score the rows that are not known; first some that are, to see that what is on disk is this reference's."""
    args, keys, places = trainer.args, list(rows), list(rows.values())
    is_known = known_N2.isfinite().all(1)
    known, missing = (mask.nonzero().squeeze(1).tolist() for mask in (is_known, ~is_known))
    size, world = args.per_device_eval_batch_size, trainer.ranks.groups
    again = known[:: -(-len(known) // (size * world)) or 1]  # one batch a rank, spread over all rows
    logger.info_rank0(f"Reference log-probs: {len(known)} rows are in {store.folder}, {len(missing)} to score.")
    live_N2, new_N2 = torch.full_like(known_N2, UNKNOWN), torch.full_like(known_N2, UNKNOWN)
    quiet, on_board = args.disable_tqdm or args.process_index > 0, is_env_enabled("LLAMABOARD_ENABLED")
    bar = tqdm(total=len(missing), desc="Scoring the reference", unit="row", disable=quiet)
    with _ready_to_score(trainer, reference) as scorer, bar:
        for batch, features, logps_B2, top in _scores(trainer, scorer, places, again):
            live_N2[batch] = logps_B2.to(live_N2.device)
            for n, row, live in zip(batch, features, store.tops_of(features, top), strict=False):
                if is_zipfile(file := store.top(keys[n])):  # else another machine has it, which is said below
                    check_top(trainer, reference, store, row, load_top(file), live)
        live_N2 = _agree(live_N2)
        for n in again:
            split, index, m = places[n]
            check_known(trainer, reference, store, pairs_of(split[index])[m], known_N2[n].tolist(), live_N2[n].tolist())
        for number, (batch, features, logps_B2, top) in enumerate(_scores(trainer, scorer, places, missing), 1):
            new_N2[batch] = logps_B2.to(new_N2.device)
            done = min(number * size * world, len(missing))
            if trainer.ranks.rank == 0:  # the first of those that share a row
                for n, of_row in zip(batch, store.tops_of(features, top), strict=False):
                    save_top(store.top(keys[n]), of_row)  # first: a row with a line has its file
                store.write([keys[n] for n in batch], logps_B2)
                bar.update(done - bar.n)
            if on_board and 10 * done // len(missing) > 10 * (done - size * world) // len(missing):  # it shows no bar
                logger.info_rank0(f"Scoring the reference: {done} of {len(missing)} rows.")
        return known_N2.maximum(_agree(new_N2))


def _scores(trainer, scorer, places: list[tuple], wanted: list[int]) -> Iterator[tuple[Any, ...]]:
    """Yield this rank's batches of the wanted rows, as their numbers, the rows, log-probs (B, 2) and likeliest words.

    Each rank has its share of the batches; equally many on every rank, as ZeRO-3 needs it.
    """
    size, rank, world = trainer.args.per_device_eval_batch_size, trainer.ranks.group, trainer.ranks.groups
    batches = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    while len(batches) % world:  # the last one again where ranks would have none
        batches.append(batches[-1])
    for batch in batches[rank::world]:
        features = [pairs_of(split[index])[m] for split, index, m in (places[n] for n in batch)]
        pair: Pair = trainer.score_pair(scorer, features)
        logps_B2 = torch.stack([pair.chosen_B, pair.rejected_B], dim=1).float()
        _check_finite(logps_B2, features)
        yield batch, features, logps_B2, pair.top


def check_known(trainer, reference, store, row: dict, known_2: list[float], live_2: list[float]) -> None:
    """Refuse scores on disk that are further from the live reference's than rounding takes them."""
    for side, known, live in zip(("chosen", "rejected"), known_2, live_2, strict=True):
        bound = rounding(trainer, reference, live, len(row[f"{side}_ids"]))
        if not abs(known - live) <= bound:
            raise ValueError(
                f"{store.folder} has {known:.6g} as the reference's log-prob of {row['name']} ({side}), but the "
                f"reference gives {live:.6g}, and rounding explains {bound:.2g} at most: the scores there are another "
                "model's. Remove the folder to score anew, or set `solopo_reference: online`."
            )


def check_top(trainer, reference, store, row: dict, known: Top, live: Top) -> None:
    """Refuse a file for the anchor that is, on the mean, further from the live reference than rounding takes it."""
    known_NC, live_NC = known.logps_NC, live.logps_NC.float().cpu()
    bound = rounding(trainer, reference, 0.0, 1)
    if known_NC.shape != live_NC.shape or (known_NC - live_NC).nan_to_num().abs().mean() > bound:
        raise ValueError(
            f"{store.tops} has other words, or other log-probs of them, for {row['name']} than the reference gives: "
            "the files there are another model's or other rows'. Remove the folder to score anew, or set "
            "`solopo_reference: online`."
        )


def rounding(trainer, reference, logp: float, tokens: int) -> float:
    """Return how far two scores of one response by one model may be apart, in nats: 16 standard errors (16 is ours).

    Each of the 2 x layers sublayers rounds what it adds, with relative error eps of the dtype that computes, or what
    fp32 loses in a sum of `hidden_size` terms, if that is more: eps32 * sqrt(hidden_size). Independent errors grow as a
    root, over sublayers as over tokens. So a sum of log-probs has standard error eps * sqrt(2 * layers * tokens), for
    logits of order 1, and itself, an fp32 number, eps32 * |logp|. A mean has 1 / tokens of the former. Not in it: a
    router that, near a tie, chooses another expert. Sizes that a configuration does not name are those of a 7B model.
    """
    args, config = trainer.args, base_of(reference).config.get_text_config()
    dtypes = {p.dtype for p in reference.parameters() if p.is_floating_point()}
    dtypes |= {dtype for dtype, used in ((torch.bfloat16, args.bf16), (torch.float16, args.fp16)) if used}
    eps32 = torch.finfo(torch.float32).eps
    width, layers = getattr(config, "hidden_size", 4096), getattr(config, "num_hidden_layers", 32)
    eps = max(eps32 * width**0.5, 2**-10 if args.tf32 else 0, *(torch.finfo(d).eps for d in dtypes))
    share = tokens if trainer.finetuning_args.pref_loss in LENGTH_NORMALISED else 1
    return 16 * (eps * (2 * layers * tokens) ** 0.5 / share + eps32 * abs(logp))


def _check_finite(logps_B2: Tensor, features: list[dict]) -> None:
    if bad := [f["name"] for f, good in zip(features, logps_B2.isfinite().all(1).tolist(), strict=True) if not good]:
        raise FloatingPointError(
            f"The reference's log-prob of {', '.join(bad)} is not finite; look at the model and its dtype (`bf16` "
            "rather than `fp16`), and at the row."
        )


@contextmanager
def _ready_to_score(trainer, model):
    """Give a model that can run forwards without gradients: on its device, sharded as the recipe says, its adapter off.

    DeepSpeed: an engine without optimizer, as the host makes one for a reference model, taken off again afterwards. One
    that the configuration names would cost its memory, and its `auto` scheduler is filled in later.
    """
    training, engine = model.training, None
    if trainer.is_deepspeed_enabled:
        from trl.models.utils import prepare_deepspeed

        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        named = {key: config.pop(key) for key in ("optimizer", "scheduler") if key in config}
        engine = prepare_deepspeed(model, trainer.accelerator)
        config.update(named)
    elif not hasattr(model, "hf_device_map"):
        model.to(trainer.args.device)
    own = model is trainer.model and hasattr(model, "disable_adapter")
    as_reference = model.disable_adapter() if own else nullcontext()
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
    """Merge all ranks' scores; where two ranks scored a row, the larger of two roundings, so that all ranks agree."""
    if dist.is_initialized():
        dist.all_reduce(logps_N2, op=dist.ReduceOp.MAX)
    return logps_N2
