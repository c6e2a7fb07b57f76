"""Record what made the rows under `tokenized_path`, beside them, and compare before they are used.

The host loads whatever stands there and looks at no other argument. Host: 0.9.5.
"""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

from .. import __version__
from ..data import COLUMNS
from ..qa.files import write_json
from ..qa.provenance import file_hash, installed

RECORD = "solopo_made_of.json"
# Arguments that change none of our rows. Whatever else there is, also in another host, is taken to change them.
NO_MATTER = {
    "dataset_dir", "media_dir", "train_on_prompt", "mask_history", "streaming", "buffer_size", "overwrite_cache",
    "preprocessing_batch_size", "preprocessing_num_workers", "eval_num_beams", "ignore_pad_token_for_loss", "packing",
    "neat_packing", "tokenized_path", "data_shared_file_system",
}  # fmt: skip


@contextmanager
def recorded(data_args, training_args, tokenizer, template):
    """Refuse, around the host's `get_dataset`, rows that something else has made; leave a record beside new ones.

    Raises:
        ValueError: The rows have no record (another stage, an earlier release, a run that was killed), or another one.
    """
    if data_args.tokenized_path is None:
        yield
        return
    from llamafactory.extras.misc import has_tokenized_data

    facts, record = made_of(data_args, training_args, tokenizer, template), Path(data_args.tokenized_path) / RECORD
    loaded = has_tokenized_data(data_args.tokenized_path)
    if loaded:
        check(facts, record)
    yield
    if not loaded and training_args.should_save:
        write_json(record, facts)


def check(facts: dict, record: Path) -> None:
    """Refuse rows without a record, and those whose record differs."""
    where, instead = f"`tokenized_path: {record.parent}`", "choose another path, or remove the folder to tokenise anew."
    try:
        theirs = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{where} does not say what its rows were made of: they are another stage's, an earlier release's, or of a "
            f"run that ended while it saved them; {instead}"
        ) from None
    # of another data set not every fact, but its name
    if differ := [n for n in facts.keys() & theirs.keys() if facts[n] != theirs[n]] or facts.keys() ^ theirs.keys():
        values = (f"{name} (there {theirs.get(name)!r:.60}, here {facts.get(name)!r:.60})" for name in sorted(differ))
        raise ValueError(f"{where} holds rows that were made otherwise: {', '.join(values)}; {instead}")


def made_of(data_args, training_args, tokenizer, template) -> dict:
    """Return all that the rows depend on; local files and the tokenizer by content, of the hub only names are known."""
    from llamafactory.data.parser import get_dataset_list

    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = (type(tokenizer).__name__, sorted(tokenizer.special_tokens_map.items()), tokenizer.split_special_tokens)
    facts = {name: value for name, value in vars(data_args).items() if name not in NO_MATTER} | {
        "version of solopo": __version__,
        "version of llamafactory": installed("llamafactory"),
        "columns": COLUMNS,
        "content of the template": _hash(repr(template)),
        "content of the tokenizer": _hash(repr((special, vocabulary))),
    }
    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    attrs = get_dataset_list(names, data_args.dataset_dir)
    for name, attr in zip(names, attrs, strict=True):
        local = attr.load_from in ("file", "script")
        path = Path(data_args.dataset_dir, attr.dataset_name) if local else Path(attr.dataset_name)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        facts |= {f"{key} of {name}": value for key, value in vars(attr).items()}
        facts[f"content of {name}"] = _hash("".join(file_hash(file) for file in files if file.is_file()))
    if data_args.val_size or data_args.mix_strategy != "concat" or any(attr.num_samples for attr in attrs):
        facts["seed"] = training_args.seed
    return json.loads(json.dumps(facts, default=str))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
