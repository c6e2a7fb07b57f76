"""Make training rows of questions or documents: stages in a work folder, each of which can be killed and continues.

manifest.json says of every finished stage what it was made from (hashes of its inputs, settings, versions), what it
made (hashes) and what it counted, and which stages have still to "forget" theirs. A stage is run again when one of its
inputs, settings or outputs is another one.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..qa.files import FORGOTTEN, DataError, as_data_error, lock_folder, set_aside, split_names, write_json
from ..qa.generate import check_backend
from ..qa.provenance import differences, file_hash, installed_versions, is_of_model
from ..qa.store import STORE, has_answers
from . import ask, contexts, documents, export, filter, judge, pairs, read, sample, verdicts
from .recipe import UNSAID, DataRecipe, from_documents, model_files, outside_inputs, stage_settings

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
ENTRY = ("settings", "inputs", "outputs", "counts")  # of a finished stage, beside its versions
MODEL = "model_name_or_path"
PACKAGES = ("llamafactory", "transformers", "tokenizers", "torch", "vllm", "numpy", "pyarrow", "bm25s")


@dataclass(frozen=True)
class Stage:
    """Hold a stage's function, (recipe, work folder) -> counts, and the files of the work folder that it deals with.

    A stage that `keeps` something runs each time, since its outputs lie where others may change them: its function also
    takes what it kept the last time, and returns what it keeps beside the counts.
    """

    run: Callable
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keeps: str = ""  # as what the manifest's entry has it


_SAMPLES, _JUDGED = (tuple(f"{kind}.{side}.jsonl" for side in ("short", "long")) for kind in ("samples", "judged"))
_QUESTIONS = ("questions.jsonl", "corpus.jsonl")
TABLE = {
    "documents": Stage(documents.run, (), ("passages.jsonl",)),
    "ask": Stage(ask.run, ("passages.jsonl",), ("asked.jsonl",)),
    "filter": Stage(filter.run, ("asked.jsonl", "passages.jsonl"), _QUESTIONS),
    "read": Stage(read.run, (), _QUESTIONS),
    "contexts": Stage(contexts.run, _QUESTIONS, ("contexts.jsonl",)),
    "sample": Stage(sample.run, ("contexts.jsonl",), _SAMPLES),
    "judge": Stage(judge.run, ("contexts.jsonl", *_SAMPLES), _JUDGED),
    "select": Stage(pairs.run, ("contexts.jsonl", *_JUDGED), ("pairs.jsonl",)),
    "export": Stage(export.run, ("contexts.jsonl", "pairs.jsonl"), (), keeps="rows"),  # in dataset_dir
}
SHOWN = ("contexts.jsonl", *_JUDGED, "pairs.jsonl")  # files that the page about a work folder reads
STORES = {
    "ask": ask.STORE,
    "filter": filter.STORE,
    "sample": STORE,
    "judge": verdicts.STORE,
}  # of what a stage asks for
OF_SQLITE = ("-wal", "-shm", "-journal")  # ends of the files beside a store
HASH = "[0-9a-f]" * 64  # as a pattern of file names
FROM_DOCUMENTS = ("documents", "ask", "filter")  # the stages that make questions, and
FROM_QUESTIONS = ("read",)  # the one that reads them, in their place


def stages_of(recipe: DataRecipe) -> tuple[str, ...]:
    """Return the names of the stages that a recipe runs, in their order."""
    others = FROM_QUESTIONS if from_documents(recipe) else FROM_DOCUMENTS
    return tuple(name for name in TABLE if name not in others)


def run_pipeline(recipe: DataRecipe, stage: str | None = None, resume: bool = True) -> dict:
    """Run what is not finished, all stages or one; returns the manifest.

    Args:
        recipe: Of data.
        stage: Only this stage; those before it must be finished.
        resume: False: every stage that is to run forgets what it had finished, as it begins. From the first stage on
            that asks a model, those that a stopped run did not reach do so in the run that continues it.

    Raises:
        DataError: Something that the user has to put right, or another run at work in the same folder.
    """
    stages = stages_of(recipe)
    if stage is not None and stage not in stages:
        raise DataError(f"`--stage` must be one of {', '.join(stages)}; got {stage!r}.")
    _check_places(recipe, "documents" if "documents" in stages else "rows")
    work = Path(recipe.work_dir)
    with lock_folder(work, "work_dir"):
        manifest = read_manifest(work)
        manifest["stages"] = {name: entry for name, entry in manifest["stages"].items() if name in stages}
        _remove_half_written(work)
        if stage:
            _check_before(stage, stages, recipe, manifest)
        manifest["forget"] = [name for name in manifest.get("forget", []) if name in stages]
        names = (stage,) if stage else stages
        for i, name in enumerate(names):
            if not resume and name in STORES:  # nothing that was to be checked first is left
                manifest["forget"] = sorted({*manifest["forget"], *STORES.keys() & names[i:]})
            _run_stage(name, recipe, work, manifest, resume, then_sample=stage is None)
    return manifest


def _check_places(recipe: DataRecipe, kind: str) -> None:
    """Refuse folders to write to that lie where they would be read, as `kind`, or that a shell would have named."""
    for key, other in (("work_dir", recipe.work_dir), ("dataset_dir", recipe.dataset_dir)):
        if other.startswith("~"):
            raise DataError(f"`{key}: {other}` begins with `~`, which only a shell replaces; write the whole path.")
        place = Path(other).resolve()
        for name in split_names(recipe.input):
            if os.path.isdir(name) and Path(name).resolve() in (place, *place.parents):
                raise DataError(f"`{key}: {other}` lies in `input: {name}` and would be read as {kind}; move it.")


def _remove_half_written(work: Path) -> None:
    """Remove what a killed run left half written of its own files; others may keep theirs in the same folder."""
    names = [MANIFEST, *(file for stage in TABLE.values() for file in stage.outputs)]
    for path in [*(work / f"{name}.tmp" for name in names), *work.glob(f"{documents.CONVERTED}/{HASH}.json.tmp")]:
        if path.is_file() and not path.is_symlink():
            path.unlink()
    shutil.rmtree(work / FORGOTTEN, ignore_errors=True)


def _forget(name: str, work: Path) -> None:
    """Remove what a stage keeps of its work beside its outputs, and would go on from."""
    for path in _kept(name, work):
        with as_data_error(path, "remove"):
            path.unlink(missing_ok=True)


def _kept(name: str, work: Path) -> list[Path]:
    """Return the files of what a stage keeps of its work beside its outputs; not all need be there."""
    files = [work / f"{STORES[name]}{end}" for end in ("", *OF_SQLITE)] if name in STORES else []
    if name == "documents":
        files += work.glob(f"{documents.CONVERTED}/{HASH}.json")
    if name == "sample":
        files += [work / f"samples.{side}.{end}" for side in ("short", "long") for end in sample.OF_EARLIER]
    return files


@contextmanager
def _anew(name: str, work: Path) -> Iterator[None]:
    """Have a stage forget what it would go on from; one that fails before it has made any of it has it again.

    So does one that is refused for a setting, and one whose model or server does not start. The manifest is put back,
    too. A stage that is stopped has forgotten.
    """
    before, kept = read_manifest(work), [path for path in _kept(name, work) if path.exists()]

    def put_back() -> bool:
        if _has_begun(name, work):
            return False
        _forget(name, work)
        if before["stages"]:
            write_json(work / MANIFEST, before)
        if kept and name not in before.get("forget", []):
            log.warning("%s: what it had finished is there again; repeat `--no-resume` to begin anew.", name)
        return True

    with set_aside(kept, work / FORGOTTEN, put_back):
        yield


def _has_begun(name: str, work: Path) -> bool:
    """Return whether a stage has been answered, or has converted, anything."""
    return has_answers(work / STORES[name]) if name in STORES else any(path.exists() for path in _kept(name, work))


def _check_before(stage: str, stages: tuple[str, ...], recipe: DataRecipe, manifest: dict) -> None:
    """Refuse a single stage whose predecessors are not finished, or would be made again without `--stage`."""
    for name in takewhile(stage.__ne__, stages):
        entry = manifest["stages"].get(name)
        if entry is None or name in manifest.get("forget", []):
            raise DataError(f"Stage `{stage}` builds on stage `{name}`, which is not finished in {recipe.work_dir}.")
        work = Path(recipe.work_dir)
        inputs, chosen = _made_from(name, recipe, work)
        own = recipe.ask_prompts and Path(recipe.ask_prompts)  # a prompt that is not there is replaced by ours
        for file, digest in entry["inputs"].items():  # what lay outside the work folder need not be on this machine
            if (file == recipe.input or file not in inputs) and not os.path.exists(file) and Path(file).parent != own:
                inputs[file] = digest
        if changed := _changes(entry, inputs, chosen, work):
            what = "ran with other settings" if _changed_settings(entry, chosen, inputs) else "is out of date"
            raise DataError(
                f"Stage `{stage}` builds on stage `{name}`, which {what} ({'; '.join(changed)}); "
                f"run `--stage {name}` first, or leave `--stage` away."
            )


def _made_from(name: str, recipe: DataRecipe, work: Path) -> tuple[dict[str, str], dict]:
    """Return what a stage is made from: hashes of its inputs as they are now, and its settings."""
    hashes = {file: file_hash(work / file) for file in TABLE[name].inputs}
    return hashes | outside_inputs(recipe, name), stage_settings(recipe, name)


def _run_stage(name: str, recipe: DataRecipe, work: Path, manifest: dict, resume: bool, then_sample: bool) -> None:
    """Run a stage unless it is finished with these inputs and settings, and enter it into the manifest.

    Without `resume` it forgets what it had finished, but not before it has begun. With `then_sample` documents and
    contexts are made to be asked about at once, so that the backend must be there.
    """
    stage, (inputs, chosen) = TABLE[name], _made_from(name, recipe, work)
    finished, marked = manifest["stages"].get(name), name in manifest["forget"]
    if marked and resume:
        log.warning("%s: begins anew, as the run with `--no-resume` that did not reach it was told to.", name)
    resume = resume and not marked
    if finished and resume:
        changed = _changes(finished, inputs, chosen, work)
        if not changed and not stage.keeps:
            finished["inputs"] = {file: inputs.get(file, digest) for file, digest in finished["inputs"].items()}
            log.info("%s: finished before, kept.", name)
            return
        if changed:
            log.warning("%s: made again, because %s.", name, "; ".join(changed))
    if name in ("documents", "contexts") and then_sample:
        check_backend(recipe.backend, recipe.server_urls)
        if name == "documents":
            check_backend(recipe.asker.backend, recipe.asker.server_urls)
        if recipe.judge == "model":
            verdicts.read_rubric(recipe)
            check_backend(recipe.judging[0].backend, recipe.judging[1].server_urls)
    kept = {}
    with nullcontext() if resume else _anew(name, work):
        if finished and not stage.keeps:
            del manifest["stages"][name]
            _save(manifest, work)
        if marked:
            manifest["forget"].remove(name)
            _save(manifest, work)
        log.info("%s ...", name)
        if stage.keeps:
            counts, kept[stage.keeps] = stage.run(recipe, work, finished.get(stage.keeps) if finished else {})
        else:
            counts = stage.run(recipe, work)
    outputs = {file: file_hash(work / file) for file in stage.outputs}
    manifest["stages"][name] = {
        "settings": chosen, "inputs": inputs, "outputs": outputs, "counts": counts,
        "versions": installed_versions(PACKAGES), **kept,
    }  # fmt: skip
    _save(manifest, work)
    log.info("%s: done.", name)


def _changes(finished: dict, inputs: dict, chosen: dict, work: Path) -> list[str]:
    """Say why a finished stage is not up to date, one phrase each."""
    phrases = _changed_settings(finished, chosen, inputs)
    old, models = finished["inputs"], {str(Path(s.get(MODEL) or "")) for s in (finished["settings"], chosen)}
    phrases += [
        f"{file} has changed"
        for file in sorted((old.keys() | inputs.keys()) - models)
        if not is_of_model(old.get(file), inputs.get(file), Path(file))
    ]
    for file, digest in finished["outputs"].items():
        if not (work / file).exists():
            phrases.append(f"{file} is missing")
        elif file_hash(work / file) != digest:
            phrases.append(f"{file} is not as it was written")
    return phrases


def _changed_settings(finished: dict, chosen: dict, inputs: dict) -> list[str]:
    """Say what is set otherwise, one phrase each. A model whose files are known goes by them, wherever they are."""
    old, phrases = finished["settings"], []
    before, now = model_files(old, finished["inputs"]), model_files(chosen, inputs)
    if before and now:
        phrases = [] if is_of_model(before, now, Path(chosen[MODEL])) else [f"the files of `{MODEL}` have changed"]
        old, chosen = ({key: value for key, value in s.items() if key != MODEL} for s in (old, chosen))
    unsaid = {key: value for key, value in UNSAID.items() if key in old or key in chosen}
    return phrases + differences(unsaid | old, unsaid | chosen)


def finished_stages(work: Path) -> dict[str, dict]:
    """Return the manifest's stages of a work folder whose files fit together; the export's may be of earlier rows.

    Files that the page does not read go by what the manifest says of them, and may be deleted.

    Raises:
        DataError: Nothing is selected yet, or a stage ran again, or a file of the page was changed, and what follows
            did not run.
    """
    stages = read_manifest(work)["stages"]
    if "select" not in stages:
        raise DataError(f"{work} is no finished work folder: stage `select` did not run; run scripts/build_data.py.")
    now = {file: digest for name in TABLE if name in stages for file, digest in stages[name]["outputs"].items()}
    now |= {file: file_hash(work / file) if (work / file).exists() else "missing" for file in SHOWN}
    for name in (name for name in TABLE if name in stages and not TABLE[name].keeps):
        known = stages[name]["inputs"] | stages[name]["outputs"]
        for file in TABLE[name].inputs + TABLE[name].outputs:
            if now.get(file) != known.get(file) and file in now and file in known:
                what = "is missing" if now[file] == "missing" else f"has changed since stage `{name}` ran"
                raise DataError(
                    f"{work} is out of date: {file} {what}; run scripts/build_data.py without `--stage`, or give a "
                    "file of rows that was exported."
                )
    return stages


def read_manifest(work: Path) -> dict:
    """Read the manifest of a work folder, empty if there is none yet.

    Raises:
        DataError: The file is no manifest.
    """
    path = work / MANIFEST
    with as_data_error(path, "read"):
        if not path.exists():
            return {"stages": {}}
        text = path.read_bytes()
    try:
        manifest = json.loads(text)
        entries = [entry[key] for entry in manifest["stages"].values() for key in ENTRY]
        whole = isinstance(manifest.get("forget", []), list) and all(isinstance(entry, dict) for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{path} is no manifest of ours; give another `work_dir`, or delete the file.")
    return manifest


def _save(manifest: dict, work: Path) -> None:
    stages = manifest["stages"]
    forget = {"forget": manifest["forget"]} if manifest["forget"] else {}
    write_json(work / MANIFEST, {"stages": {name: stages[name] for name in TABLE if name in stages}} | forget)
