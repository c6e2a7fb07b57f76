"""Know a model by names, sizes and contents of its files, of large ones by a part."""

import pytest

from solopo_plugin.qa import provenance
from solopo_plugin.qa.provenance import TOKENIZER, WEIGHTS, folder_hash, model_hash

SIZE = 40 << 20  # bytes; a sparse file


@pytest.fixture(params=["model.safetensors", "adapter_model.safetensors"])
def model(tmp_path, request):
    """A folder as a merge or the hub leaves it: nothing but its configuration and weights."""
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / request.param, "wb") as file:
        file.truncate(SIZE)
    return tmp_path


def train(model, start: int, length: int) -> None:
    with open(next(model.glob("*.safetensors")), "r+b") as file:
        file.seek(start)
        file.write(b"1" * length)


def test_a_trained_model_is_known_by_the_middle_of_its_files_too(model):
    before, ends = model_hash(model, WEIGHTS + TOKENIZER), folder_hash(model, WEIGHTS + TOKENIZER)
    train(model, SIZE // 2, SIZE // 32)  # one of 32 layers
    assert model_hash(model, WEIGHTS + TOKENIZER) != before
    assert folder_hash(model, WEIGHTS + TOKENIZER) == ends != before


def test_data_is_read_whole(model):
    before = folder_hash(model, ("*.safetensors",), None)
    train(model, 12345678, 1)
    assert folder_hash(model, ("*.safetensors",), None) != before


def test_a_model_with_code_of_its_own_is_known_by_it_too(model):
    """Count it, since it decides what the model answers; folders without it keep the hashes of before."""
    (model / "modeling_x.py").write_text("one")
    before = model_hash(model, WEIGHTS + TOKENIZER)
    (model / "modeling_x.py").write_text("two")
    assert model_hash(model, WEIGHTS + TOKENIZER) != before


def test_hashes_are_those_of_before(tmp_path):
    """Compare with hashes by which stored answers are known."""
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 16)
    found = folder_hash(tmp_path, WEIGHTS), folder_hash(tmp_path, WEIGHTS, 100), model_hash(tmp_path, WEIGHTS)
    assert [text[:8] for text in found] == ["ad4b65ca", "3ec847cb", "ad4b65ca"]
    assert provenance.PLACES * provenance.PIECE == 4 << 20
