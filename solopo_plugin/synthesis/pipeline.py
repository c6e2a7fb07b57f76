"""Make training rows of questions or documents: stages in a work folder, each of which can be killed and continues.

manifest.json says of every finished stage what it was made from (hashes of its inputs, settings, versions), what it
made (hashes) and what it counted. A stage is run again when one of its inputs, settings or outputs is another one.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..qa.files import DataError, as_data_error, lock_folder, write_json
from ..qa.generate import check_backend
from ..qa.provenance import differences, file_hash, installed_versions
from ..qa.store import STORE
from . import ask, contexts, documents, export, filter, judge, pairs, read, sample, verdicts
from .recipe import UNSAID, DataRecipe, from_documents, model_files, outside_inputs, stage_settings

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
MODEL = "model_name_or_path"
PACKAGES = ("llamafactory", "transformers", "tokenizers", "torch", "vllm", "numpy", "pyarrow", "bm25s")


@dataclass(frozen=True)
class Stage:
    """Hold a stage's function, (recipe, work folder) -> counts, and the files of the work folder that it deals with."""

    run: Callable[[DataRecipe, Path], dict]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


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
    "export": Stage(
        export.run, ("contexts.jsonl", "pairs.jsonl"), ()
    ),  # its outputs are in dataset_dir, which others write to
}
STORES = {
    "ask": ask.STORE,
    "filter": filter.STORE,
    "sample": STORE,
    "judge": verdicts.STORE,
}  # of what a stage asks for
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
        resume: False: the stages that are to run forget what they had finished.

    Raises:
        DataError: Something that the user has to put right, or another run at work in the same folder.
    """
    stages = stages_of(recipe)
    if stage is not None and stage not in stages:
        raise DataError(f"`--stage` must be one of {', '.join(stages)}; got {stage!r}.")
    work = Path(recipe.work_dir)
    with lock_folder(work, "work_dir"):
        manifest = read_manifest(work)
        manifest["stages"] = {name: entry for name, entry in manifest["stages"].items() if name in stages}
        names = (stage,) if stage else stages
        _clean(work, manifest, () if resume else names)
        if stage:
            _check_before(stage, stages, recipe, manifest)
        for name in names:
            _run_stage(name, recipe, work, manifest, then_sample=stage is None)
    return manifest


def _clean(work: Path, manifest: dict, forget: tuple[str, ...]) -> None:
    """Remove what a killed run left half written, and forget what the stages `forget` had finished."""
    left = [path for path in work.glob("**/*.tmp") if not path.is_symlink()]
    if "documents" in forget:
        left += work.glob(f"{documents.CONVERTED}/*.json")
    if "sample" in forget:
        left += work.glob("samples.*.json*")
    for name in forget:
        left += work.glob(f"{STORES[name]}*") if name in STORES else []
    for path in left:
        path.unlink()
    if forget:
        manifest["stages"] = {name: entry for name, entry in manifest["stages"].items() if name not in forget}
        _save(manifest, work)


def _check_before(stage: str, stages: tuple[str, ...], recipe: DataRecipe, manifest: dict) -> None:
    """Refuse a single stage whose predecessors are not finished, or with other settings."""
    for name in takewhile(stage.__ne__, stages):
        entry = manifest["stages"].get(name)
        if entry is None:
            raise DataError(f"Stage `{stage}` builds on stage `{name}`, which is not finished in {recipe.work_dir}.")
        outside = {} if name == "read" else outside_inputs(recipe, name)
        if changed := _changed_settings(entry, stage_settings(recipe, name), outside):
            raise DataError(
                f"Stage `{stage}` builds on stage `{name}`, which ran with other settings ({'; '.join(changed)}); "
                f"run `--stage {name}` first, or leave `--stage` away."
            )


def _run_stage(name: str, recipe: DataRecipe, work: Path, manifest: dict, then_sample: bool) -> None:
    """Run a stage unless it is finished with these inputs and settings, and enter it into the manifest.

    With `then_sample` documents and contexts are made to be asked about at once, so that the backend must be there.
    """
    inputs = {file: file_hash(work / file) for file in TABLE[name].inputs} | outside_inputs(recipe, name)
    chosen = stage_settings(recipe, name)
    finished = manifest["stages"].get(name)
    if finished:
        changed = _changes(finished, inputs, chosen, work)
        if not changed and name != "export":  # which is cheap, and dataset_info.json may have been edited
            log.info("%s: finished before, kept.", name)
            return
        if changed:
            log.warning("%s: made again, because %s.", name, "; ".join(changed))
            del manifest["stages"][name]
            _save(manifest, work)
    if name in ("documents", "contexts") and then_sample:
        check_backend(recipe.backend, recipe.server_urls)
        if name == "documents":
            check_backend(recipe.asker.backend, recipe.asker.server_urls)
        if recipe.judge == "model":
            verdicts.read_rubric(recipe)
            check_backend(recipe.judging[0].backend, recipe.judging[1].server_urls)
    log.info("%s ...", name)
    counts = TABLE[name].run(recipe, work)
    outputs = {file: file_hash(work / file) for file in TABLE[name].outputs}
    manifest["stages"][name] = {
        "settings": chosen, "inputs": inputs, "outputs": outputs, "counts": counts,
        "versions": installed_versions(PACKAGES),
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
        if old.get(file) != inputs.get(file)
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
        phrases = [f"the files of `{MODEL}` have changed"] if before != now else []
        old, chosen = ({key: value for key, value in s.items() if key != MODEL} for s in (old, chosen))
    unsaid = {key: value for key, value in UNSAID.items() if key in old or key in chosen}
    return phrases + differences(unsaid | old, unsaid | chosen)


def read_manifest(work: Path) -> dict:
    """Read the manifest of a work folder, empty if there is none yet.

    Raises:
        DataError: The file is no manifest.
    """
    path = work / MANIFEST
    if not path.exists():
        return {"stages": {}}
    with as_data_error(path, "read"):
        text = path.read_bytes()
    try:
        manifest = json.loads(text)
        assert isinstance(manifest["stages"], dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise DataError(f"{path} is no manifest of ours; give another `work_dir`, or delete the file.") from None
    return manifest


def _save(manifest: dict, work: Path) -> None:
    stages = manifest["stages"]
    write_json(work / MANIFEST, {"stages": {name: stages[name] for name in TABLE if name in stages}})
