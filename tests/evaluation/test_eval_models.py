"""Which models a recipe means: folders, adapters, checkpoints in order, and names that tell them apart."""

import json
import tracemalloc

import pytest
from toy import recipe_in, weights

from solopo_plugin.evaluation.models import find_models
from solopo_plugin.qa.files import DataError
from solopo_plugin.qa.generate.calls import Model


def whole(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ({"config.json": "{}", "model.safetensors": weights()} | files).items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def lora(folder, base, file="adapter_model.safetensors", **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 8} | config))
    if file:
        (folder / file).write_bytes(weights())
    return folder


def found(tmp_path, models, **keys) -> list[Model]:
    return find_models(recipe_in(tmp_path, models, **keys))


def test_a_list_of_names_and_folders(tmp_path):
    base, run_b = whole(tmp_path / "base"), lora(tmp_path / "b" / "final", "org/Big-7B")
    got = found(tmp_path, ["org/Big-7B", str(base), str(run_b)])
    assert got == [
        Model("org/Big-7B", name="Big-7B", alone=False),
        Model(str(base), name="base", alone=False),
        Model("org/Big-7B", str(run_b), name="final", alone=False),
    ]
    (only,) = found(tmp_path, "org/Big-7B")
    assert (only.name, only.place) == ("Big-7B", "org/Big-7B") and got[2].place == str(run_b)


def test_a_dict_names_them(tmp_path):
    got = found(tmp_path, {"before": "org/x", "after/all": str(whole(tmp_path / "m"))})
    assert [ref.name for ref in got] == ["before", "after_all"]
    with pytest.raises(DataError, match="Two of the models are called a_b; name them"):
        found(tmp_path, {"a/b": "org/x", "a:b": "org/y"})
    with pytest.raises(DataError, match="`models` must name a folder or a model of the hub, got 3 for 'a'"):
        found(tmp_path, {"a": 3})


def test_names_use_as_much_of_the_path_as_it_takes(tmp_path):
    paths = [str(whole(tmp_path / run / "checkpoint-8")) for run in ("x", "y")] + [str(whole(tmp_path / "other"))]
    assert [ref.name for ref in found(tmp_path, paths)] == ["x-checkpoint-8", "y-checkpoint-8", "other"]
    with pytest.raises(DataError, match="other is named 2 times in the evaluation recipe; once is enough."):
        found(tmp_path, [paths[2], paths[2] + "/"])


def test_checkpoints_in_order_of_steps(tmp_path):
    run = tmp_path / "run"
    whole(run)  # the final model, which equals the last checkpoint, is not asked twice
    for step in (100, 20, 3):
        whole(run / f"checkpoint-{step}")
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-7").touch()  # no folder
    got = found(tmp_path, None, checkpoints=str(run))
    assert [(ref.name, ref.step) for ref in got] == [(f"checkpoint-{n}", n) for n in (3, 20, 100)]
    with pytest.raises(DataError, match=r"`with_base` does not know what .*run was trained from; give it as"):
        found(tmp_path, None, checkpoints=str(run), with_base=True)
    base = whole(tmp_path / "base")
    got = found(tmp_path, ["org/x"], checkpoints=str(run), with_base=True, model_name_or_path=str(base))
    assert [ref.name for ref in got] == ["x", "base", "checkpoint-3", "checkpoint-20", "checkpoint-100"]


def test_the_base_of_two_runs_is_asked_once(tmp_path):
    base = whole(tmp_path / "models" / "base")
    for run in ("orpo", "solo"):
        lora(tmp_path / run / "checkpoint-5", str(base))
    got = found(tmp_path, None, checkpoints=[str(tmp_path / "orpo"), str(tmp_path / "solo")], with_base=True)
    assert [ref.name for ref in got] == ["base", "orpo-checkpoint-5", "solo-checkpoint-5"]


def test_checkpoints_of_an_adapter(tmp_path):
    base, run = whole(tmp_path / "models" / "base"), tmp_path / "run"
    for step in (10, 5):
        lora(run / f"checkpoint-{step}", str(base))
    got = found(tmp_path, None, checkpoints=[str(run)], with_base=True)
    assert got == [
        Model(str(base), name="base", alone=False),
        Model(str(base), str(run / "checkpoint-5"), "checkpoint-5", 5, alone=False),
        Model(str(base), str(run / "checkpoint-10"), "checkpoint-10", 10, alone=False),
    ]
    moved = found(tmp_path, None, checkpoints=[str(run)], model_name_or_path="org/moved")
    assert [ref.path for ref in moved] == ["org/moved"] * 2


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", ".", "a/b", "a\\b", "x\0y", "a,b", "-", "\n", "x" * 300])
def test_files_of_a_model_stay_in_their_folder_whatever_it_is_called(tmp_path, name):
    base = whole(tmp_path / "base")
    (ref,) = found(tmp_path, {name: str(base)})
    path = tmp_path / "answers" / f"{ref.name}.jsonl"
    path.parent.mkdir()
    path.touch()
    assert [p.name for p in path.resolve().parent.iterdir()] == [path.name] and path.parent == path.resolve().parent


def bad_folder(path, name):
    """A folder with one fault; returns the recipe's keys for it and the sentence."""
    if name == "no such folder":
        return dict(models=[str(path / "x")]), "There is no folder .*/x, which the evaluation recipe names as a model"
    if name == "a file":
        path.write_bytes(b"weights")
        return dict(models=[str(path)]), "which the evaluation recipe names as a model, is a file; give the folder that"
    if name == "no model":
        path.mkdir()
        return dict(models=[str(path)]), "holds no model: neither config.json nor adapter_config.json is there"
    if name == "only checkpoints":
        whole(path / "checkpoint-1")
        return dict(models=[str(path)]), "holds checkpoints and no model of its own; write `checkpoints: "
    if name == "no checkpoint":
        whole(path)
        return dict(checkpoints=[str(path)]), "`checkpoints: .*` holds no checkpoint-.; give the `output_dir` of"
    if name == "checkpoints of nothing":
        return dict(checkpoints=[str(path)]), "`checkpoints: .*` is no folder; give the `output_dir` of a training run"
    if name == "no weights":
        whole(path / "checkpoint-2", **{"training_args.bin": "x"})
        (path / "checkpoint-2" / "model.safetensors").unlink()
        return dict(checkpoints=[str(path)]), r"checkpoint-2 has no weights \(.*\): wait until they are written, or"
    if name == "empty weights":
        whole(path, **{"model.safetensors": ""})
        return dict(models=[str(path)]), "has no weights"
    if name == "DeepSpeed's shards":
        whole(path, **{"zero_to_fp32.py": "x"})
        (path / "model.safetensors").unlink()
        return dict(models=[str(path)]), "has no weights .*: DeepSpeed's zero_to_fp32.py, which is in it, makes them"
    if name == "a missing shard":
        index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
        whole(path, **{"model.safetensors.index.json": index, "model-1.safetensors": "x"})
        (path / "model.safetensors").unlink()
        return dict(models=[str(path)]), "lacks model-2.safetensors, which model.safetensors.index.json names; wait"
    if name in ("both forms", "both forms below", "both forms of old"):
        file = "pytorch_model.bin" if name == "both forms of old" else "model.safetensors"
        index = json.dumps({"weight_map": {"a": "part-1", "b": "gone"}})
        whole(path / "m", **{file: weights(), f"{file}.index.json": index, "part-1": weights()})
        if name == "both forms of old":
            (path / "m" / "model.safetensors").unlink()
        lora(path / "a", str(path / "m"))
        sentence = f"m holds weights twice, in {file} and in the shards that {file}.index.json names, and which are "
        return dict(models=[str(path / ("a" if name == "both forms below" else "m"))]), sentence
    if name == "an index that vLLM goes by":
        whole(path, **{"model.safetensors.index.json": INDEX})
        said = "holds model.safetensors.index.json, by which vLLM goes and whose shards are gone: remove it."
        return dict(models=[str(path)], backend="vllm"), said
    if name == "links to nothing":
        (whole(path) / "model.safetensors").unlink()
        (path / "model.safetensors").symlink_to("gone")
        (path / "model.safetensors.index.json").mkdir()
        return dict(models=[str(path)]), "has no weights"
    if name == "a link to no shard":
        whole(path, **{"model.safetensors.index.json": INDEX})
        (path / "model.safetensors").unlink()
        (path / "model-1.safetensors").symlink_to("gone")
        return dict(models=[str(path)]), "lacks model-1.safetensors, which model.safetensors.index.json names; wait"
    if name == "half an index":
        whole(path, **{"model.safetensors.index.json": '{"weight'})
        return dict(models=[str(path)]), "index.json is no index of weights: the model is half written"
    if name == "half an adapter":
        lora(path, "org/x", file=None)
        return dict(models=[str(path)]), r"has no weights \(adapter_model.safetensors or adapter_model.bin\)"
    if name == "torn weights":
        whole(path, **{"model-1.safetensors": weights("x" * 50)[:-1]})
        return dict(models=[str(path)]), r"model-1.safetensors is not whole: its \d+ bytes are fewer than its tensors"
    if name == "a torn header":
        lora(path, "org/x")
        (path / "adapter_model.safetensors").write_bytes(weights()[:30])
        return dict(models=[str(path)]), "adapter_model.safetensors is not whole: its 30 bytes are"
    if name == "a pointer of git":
        whole(path, **{"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"})
        return dict(
            models=[str(path)]
        ), "model.safetensors is not whole: .* or it is no safetensors file; wait until it is written"
    if name == "an adapter of nothing":
        lora(path, "/nowhere/base")
        return dict(models=[str(path)]), "was trained on /nowhere/base, which is not there; give its place as `model_na"
    if name == "an adapter that is silent":
        lora(path, None)
        return dict(models=[str(path)]), "names no base_model_name_or_path; give it as `model_name_or_path`"
    if name in ("a PiSSA adapter", "a PiSSA checkpoint"):
        lora(path, "org/x", init_lora_weights="pissa_niter_16")
        place = path / "pissa_converted" if name == "a PiSSA adapter" else path.parent / "pissa_converted"
        place.mkdir()
        return dict(models=[str(path)]), f"is an adapter to what `init_lora_weights: pissa_n.* take {place}, which is"
    if name in ("PiSSA by vLLM", "OLoRA by vLLM"):
        lora(path, "org/x", init_lora_weights=name.split()[0].lower())
        said = "put on the whole one: train with `pissa_convert: true` and .*, or set `backend: transformers`"
        return dict(models=[str(path)], backend="vllm"), said
    raise KeyError(name)


FAULTS = ("no such folder", "a file", "no model", "only checkpoints", "no checkpoint", "checkpoints of nothing",
          "no weights", "empty weights", "DeepSpeed's shards", "a missing shard", "half an index", "half an adapter",
          "both forms", "both forms below", "both forms of old", "an index that vLLM goes by", "links to nothing",
          "a link to no shard",
          "torn weights", "a torn header", "a pointer of git",
          "an adapter of nothing", "an adapter that is silent", "a PiSSA adapter", "a PiSSA checkpoint",
          "PiSSA by vLLM", "OLoRA by vLLM")  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_cannot_be(fault, tmp_path):
    keys, sentence = bad_folder(tmp_path / "run", fault)
    with pytest.raises(DataError, match=sentence) as error:
        found(tmp_path, keys.pop("models", None), **keys)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_adapters_that_fit_their_base(tmp_path):
    """Take any initialisation that leaves the weights below, or that peft repeats as in training; also for a look."""
    from solopo_plugin.probe.inside import load

    for kind in (True, "gaussian", "eva", "pissa"):
        assert found(tmp_path, [str(lora(tmp_path / "a", "org/x", init_lora_weights=kind))], backend="transformers")
    with pytest.raises(DataError, match=r"a is an adapter to what `init_lora_weights: loftq` of its .*converted\.$"):
        load(str(lora(tmp_path / "a", "org/x", init_lora_weights="loftq")))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}})
BIN_INDEX = json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}})


@pytest.mark.parametrize("kind", ["shards", "one", "bin", "other", "stale index", "an index of one"])
def test_weights_that_nobody_loads_stop_nothing(kind, tmp_path):
    """As Mistral's own beside those of transformers, or a pointer where the other format was not downloaded.

    And an index that a whole file has outlived: the file alone is loaded.
    """
    files = {
        "shards": {"model.safetensors.index.json": INDEX, "model-1.safetensors": weights(), "pytorch_model-1.bin": ""},
        "one": {"model.safetensors": weights(), "pytorch_model.bin.index.json": BIN_INDEX},
        "bin": {"pytorch_model.bin.index.json": BIN_INDEX, "pytorch_model-1.bin": "x"},
        "other": {"weights.safetensors": weights()},
        "stale index": {"model.safetensors.index.json": INDEX, "pytorch_model.bin.index.json": ""},
        "an index of one": {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "model.safetensors"}})},
    }[kind]
    beside = {} if kind == "other" else {"consolidated.safetensors": POINTER, "other.index.json": "{}"}
    folder = whole(tmp_path / "m", **files | beside)
    if kind in ("shards", "bin", "other"):
        (folder / "model.safetensors").unlink()
    assert [ref.path for ref in found(tmp_path, [str(folder)])] == [str(folder)]


def test_a_file_of_another_kind_is_not_read_whole(tmp_path):
    """Its first bytes would be a header beyond what the format allows, 100 MB; a sparse file takes no place."""
    folder = whole(tmp_path / "m")
    with open(folder / "model.safetensors", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)
    tracemalloc.start()
    with pytest.raises(DataError, match="or it is no safetensors file"):
        found(tmp_path, [str(folder)])
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_what_belongs_to_each_model(tmp_path):
    """Names may be numbers of YAML; a value is a text."""
    keys = dict(backend="openai", server_urls={1: "http://a/v1", "b": 5})
    assert found(tmp_path, {1: "org/x"}, **keys)[0].server_urls == "http://a/v1"
    with pytest.raises(DataError, match="`server_urls` must have a text for the model b, got 5."):
        found(tmp_path, {"b": "org/x"}, **keys)
    with pytest.raises(DataError, match="`server_urls` says nothing of the model c, only of 1, b."):
        found(tmp_path, {"c": "org/x"}, **keys)


def test_where_the_tokenizer_is(tmp_path):
    bare, full = whole(tmp_path / "bare"), whole(tmp_path / "full", **{"tokenizer.json": "{}"})

    def place(path, **keys):
        return found(tmp_path, [str(path)], **keys)[0].tokenizer

    assert place(full, model_name_or_path="org/x") == str(full)
    assert place(bare, model_name_or_path="org/x") == "org/x"
    assert place(bare) == str(bare)
    assert place("org/y", model_name_or_path="org/x") == "org/y"
    assert place("served", backend="openai", model_name_or_path="org/x") == "org/x"
