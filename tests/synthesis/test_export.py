"""Export: rows and entries as the host reads them, other people's data untouched, a second run changes nothing."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from small_work import TOKENIZER, Template, recipe_for, verdicts, write_work

from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.synthesis import export, pairs
from solopo_plugin.synthesis.export import ENTRIES, SCHEMA, SEVERAL, set_member


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Eight questions with a pair on both sides."""
    monkeypatch.setattr(pairs, "load_chat", lambda *_: (TOKENIZER, Template()))
    folder = tmp_path / "work"
    write_work(folder, [verdicts(i, "10") for i in range(8)], [verdicts(i, "01") for i in range(8)])
    return folder


def run(work: Path, **keys) -> dict:
    recipe = recipe_for(work, **keys)
    pairs.run(recipe, work)
    return export.run(recipe, work)[0]


LATE = {  # column: (what all rows but the last hold, what the last one holds)
    "hops": (None, 2), "short_dropped": ([], [1]), "answers": (["1999-01-01"], ["May"]), "pass_rate_long": (None, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("columns", [[*LATE], ["hops"], ["short_dropped"], ["answers"], []])
def test_a_column_that_is_filled_late_can_be_loaded(work, tmp_path, monkeypatch, columns):
    """Write first what first shows a type, where `datasets`, which has seen 10 MB by then, would refuse it."""
    ids = [f"q{n}" for n in range(300)]
    pair = dict.fromkeys(SCHEMA.names[4:]) | {"chosen": "a", "rejected": "b", "set": "solopo", "split": "train"}
    shape = dict(prompt="w " * 20_000, tokens=1, paragraphs=1, evidence=[dict(paragraph=1, start=0, end=1)], dropped=[])
    contexts = [
        {"id": i, "question": "Who?", "answers": ["He"], "hops": None, "short": shape, "long": shape} for i in ids
    ]
    made = {i: export.make_row(pair | {"id": i}, context) for i, context in zip(ids, contexts, strict=True)}
    for n, row in enumerate(made.values()):
        row |= {name: LATE[name][n == 299] for name in columns}
    monkeypatch.setattr(export, "make_row", lambda pair, context: made[pair["id"]])
    write_jsonl(work / "contexts.jsonl", contexts)
    write_jsonl(work / "pairs.jsonl", [pair | {"id": i} for i in ids])
    assert export.run(recipe_for(work), work)[0] == {"toy_solopo.jsonl": 300}
    path = work.parent / "data" / "toy_solopo.jsonl"
    loaded = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["id"] == (["q0", "q299", *ids[1:-1]] if columns else ids)
    for name in columns:
        assert loaded[1][name] == LATE[name][1] and loaded[2][name] in (LATE[name][0], None, ["1999-01-01 00:00:00"])


def test_what_another_export_writes_meanwhile_is_not_ours(work, monkeypatch):
    """Files are hashed while the folder is locked, before and behind the writing."""
    locked = []

    @contextmanager
    def lock(folder):
        locked.append(True)
        yield
        locked.pop()

    def hashes(recipe):
        assert locked
        return row_files(recipe)

    row_files = export.row_files
    monkeypatch.setattr(export, "lock_folder", lock)
    monkeypatch.setattr(export, "row_files", hashes)
    recipe = recipe_for(work)
    pairs.run(recipe, work)
    counts, rows = export.run(recipe, work, {})
    assert counts.keys() <= rows.keys() and rows == row_files(recipe)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_say_where_they_come_from(work):
    counts = run(work, val_size=2)
    assert counts == {
        "toy_solopo.jsonl": 6, "toy_solopo_val.jsonl": 2, "toy_long_po.jsonl": 6, "toy_long_po_val.jsonl": 2,
        "toy_longpo.jsonl": 6, "toy_longpo_val.jsonl": 2,
    }  # fmt: skip
    contexts = {row["id"]: row for row in read_jsonl(work / "contexts.jsonl")}
    folder = work.parent / "data"
    for name, n in counts.items():
        rows = list(read_jsonl(folder / name))
        assert len(rows) == n and all(list(row) == SCHEMA.names for row in rows)
        for row in rows:
            context = contexts[row["id"]]
            assert (row["prompt"], row["long_prompt"]) == (context["short"]["prompt"], context["long"]["prompt"])
            for side, prompt in (("short", row["prompt"]), ("long", row["long_prompt"])):
                texts = [prompt[place["start"] : place["end"]] for place in row[f"{side}_evidence"]]
                i = row["id"][1:]
                assert texts == [f"Person {i} works for firm {i}.", f"Firm {i} sits in Town{i}ville."]
                assert row[f"{side}_tokens"] == context[side]["tokens"]
            assert row["chosen"].endswith(row["answers"][0]) and row["rejected"].endswith("No answer.")
            assert row["pass_rate_short"] == row["pass_rate_long"] == 0.5
    solo, long_po, longpo = (list(read_jsonl(folder / f"toy_{name}.jsonl")) for name in pairs.SETS)
    assert all("Thought 0" in row["chosen"] and "Thought 1" in row["rejected"] for row in solo)
    assert all("Thought 1" in row["chosen"] and "Thought 0" in row["rejected"] for row in long_po)
    assert all("Thought 0" in row["chosen"] and "Thought 0" in row["rejected"] for row in longpo)
    assert [row["id"] for row in solo] == [row["id"] for row in long_po] == [row["id"] for row in longpo]


def test_entries_are_those_of_the_recipes(work):
    """The names that examples/yaml asks for, in the shape of data/dataset_info.json."""
    run(work, val_size=2)
    info = json.loads((work.parent / "data" / "dataset_info.json").read_text())
    assert list(info) == [f"toy_{suffix}{val}" for suffix in ENTRIES for val in ("", "_val")]
    assert info["toy_solopo"] == {
        "file_name": "toy_solopo.jsonl",
        "ranking": True,
        "columns": {"prompt": "prompt", "long_prompt": "long_prompt", "chosen": "chosen", "rejected": "rejected"},
    }
    assert info["toy_sft_long_val"] == {
        "file_name": "toy_long_po_val.jsonl", "columns": {"prompt": "long_prompt", "response": "chosen"}
    }  # fmt: skip
    for suffix in ("short_po", "expand_long_po", "sft_short", "sft_expand_long"):
        assert info[f"toy_{suffix}"]["file_name"] == "toy_solopo.jsonl"


def test_long_is_sampled_on_the_long_context_and_expand_long_on_the_short_one(work):
    """Of PO and of SFT: on the same long prompts, what the model answers to them or to the short ones."""
    run(work)
    folder, info = work.parent / "data", json.loads((work.parent / "data" / "dataset_info.json").read_text())
    for suffix, side in (("long_po", "1"), ("sft_long", "1"), ("expand_long_po", "0"), ("sft_expand_long", "0")):
        entry = info[f"toy_{suffix}"]
        answer = "chosen" if suffix.endswith("po") else "response"
        assert entry["columns"]["prompt"] == "long_prompt" and entry["columns"][answer] == "chosen"
        rows = list(read_jsonl(folder / entry["file_name"]))
        assert rows and all(f"Thought {side}" in row["chosen"] for row in rows), suffix


def test_parquet_holds_the_same_rows(work, tmp_path):
    run(work)
    lines = list(read_jsonl(tmp_path / "data" / "toy_solopo.jsonl"))
    assert "toy_solopo.parquet" in run(work, export_format="parquet")
    path = str(tmp_path / "data" / "toy_solopo.parquet")
    table = load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    assert list(table) == lines
    assert {path.suffix for path in (tmp_path / "data").iterdir()} == {".parquet", ".json"}


def test_a_link_in_the_folder_is_not_followed(work, tmp_path):
    """An export takes the place of the link; what it led to stays as it was."""
    run(work)
    folder, elsewhere = work.parent / "data", tmp_path / "elsewhere.jsonl"
    before = content(folder)
    (folder / "toy_solopo.jsonl").rename(elsewhere)
    (folder / "toy_solopo.jsonl").symlink_to(elsewhere)
    first = elsewhere.read_bytes()
    run(work, seed=7)
    assert elsewhere.read_bytes() == first and not (folder / "toy_solopo.jsonl").is_symlink()
    run(work)
    assert content(folder) == before


def test_twice_changes_nothing_and_less_takes_away_what_is_ours(work):
    folder = work.parent / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text('{"mine": {"file_name": "toy_solopo_notes.txt"}}')
    (folder / "toy_solopo_notes.txt").write_text("mine")
    run(work, val_size=2)
    before = content(folder)
    run(work, val_size=2)
    assert content(folder) == before
    run(work, sample_long=False)
    info = json.loads((folder / "dataset_info.json").read_text())
    names = ("solopo", "short_po", "expand_long_po", "sft_short", "sft_expand_long")
    assert set(info) == {"mine", *(f"toy_{name}" for name in names)}, "of D_long nothing was sampled"
    assert set(content(folder)) == {"dataset_info.json", "toy_solopo_notes.txt", "toy_solopo.jsonl"}
    run(work, val_size=2)
    assert {name: text for name, text in content(folder).items() if name != "dataset_info.json"} == {
        name: text for name, text in before.items() if name != "dataset_info.json"
    }
    assert json.loads((folder / "dataset_info.json").read_text()) == json.loads(before["dataset_info.json"])


@pytest.mark.parametrize(
    "info, sentence",
    [
        ('{"toy_sft_short": {"hf_hub_url": "x/y"}}', "has another data set called `toy_sft_short`; choose another"),
        ('{"toy_solopo": 3}', "has another data set called `toy_solopo`; choose another `dataset_name`"),
        ('["a"]', "is no JSON object in UTF-8; mend it"),
        ('{"a": 1', "is no JSON object in UTF-8; mend it"),
        ('{"caf\xe9": 1}', "is no JSON object in UTF-8; mend it"),
    ],
)
def test_what_is_not_ours_is_not_overwritten(work, info, sentence):
    folder = work.parent / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(info, encoding="latin-1")
    before = content(folder)
    with pytest.raises(DataError, match=sentence):
        run(work)
    assert content(folder) == before


@pytest.mark.parametrize("text", ['{"prompt": "mine"}\n', "no json\n", ""])
def test_a_file_of_that_name_is_not_overwritten(work, text):
    folder = work.parent / "data"
    folder.mkdir()
    (folder / "toy_longpo.jsonl").write_text(text)
    with pytest.raises(DataError, match="toy_longpo.jsonl is there and no export of ours; choose another"):
        run(work)
    assert content(folder) == {"toy_longpo.jsonl": text.encode()}


def test_a_full_disk_leaves_the_old_files(work, monkeypatch):
    run(work)
    folder = work.parent / "data"
    before = content(folder)

    def full(fd):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full"):
        run_export_only(work)
    assert content(folder) == before


def run_export_only(work: Path) -> dict:
    return export.run(recipe_for(work, num_rows=3), work)[0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
STYLES = st.fixed_dictionaries(
    {"indent": st.sampled_from([None, 0, 1, 2, 4, "\t"]), "ensure_ascii": st.booleans()},
    optional={"separators": st.sampled_from([(",", ":"), (" , ", " : ")])},
)
NAMES = st.text(max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4), STYLES, NAMES, st.none() | VALUES.filter(lambda v: v is not None))
def test_one_member_is_set_and_nothing_else_touched(members, style, name, value):
    text = "\n" + json.dumps(members, **style) + "\n\n"
    after = set_member(text, name, value)
    others = {key: old for key, old in members.items() if key != name}
    assert json.loads(after) == (others if value is None else members | {name: value})
    for key, old in others.items():
        assert json.dumps({key: old}, **style)[1:-1].strip() in after
    assert set_member(after, name, value) == after
    if name not in members:
        restored = set_member(after, name, None)
        assert json.loads(restored) == members and (not members or restored == text)


def test_an_entry_that_is_right_stays_as_it_is_written():
    text = '{"a": {"x":1 ,\n\n"y":[ 2]}, "b":3}'
    assert set_member(text, "a", {"y": [2], "x": 1}) == text


def test_windows_line_ends_and_order_stay():
    text = '{\r\n    "b": {"x": [1,  2]},\r\n    "a": 1\r\n}\r\n'
    after = set_member(text, "c", {"y": {"z": 1}})
    assert after == text[:-5] + ',\r\n    "c": {\r\n        "y": {\r\n            "z": 1\r\n        }\r\n    }\r\n}\r\n'
    assert set_member(after, "b", None) == '{\r\n    "a": 1' + after[after.index(',\r\n    "c"') :]


def test_several_rejected_answers(work, tmp_path):
    """A column more, mapped by the entries of this stage alone; ragged where a question has not so many."""
    short = [verdicts(i, "1000"[: 2 + i % 3]) for i in range(8)]
    write_work(work, short, [verdicts(i, "01") for i in range(8)])
    folder = work.parent / "data"
    run(work, val_size=2)
    before, rows = content(folder), list(read_jsonl(folder / "toy_solopo.jsonl"))
    run(work, val_size=2, num_rejected=2)
    lists = list(read_jsonl(folder / "toy_solopo.jsonl"))
    assert [{name: row[name] for name in SCHEMA.names} for row in lists] == rows
    for row in lists:
        assert list(row) == SEVERAL.names and row["all_rejected"][0] == row["rejected"]
        assert len(set(row["all_rejected"])) == len(row["all_rejected"]) == min(2, 1 + int(row["id"][1:]) % 3)
        assert all("No answer." in text for text in row["all_rejected"])
    info = json.loads((folder / "dataset_info.json").read_text())
    mapped = {name.removeprefix("toy_"): entry["columns"].get("rejected") for name, entry in info.items()}
    assert {name for name, column in mapped.items() if column == "all_rejected"} == {
        "solopo", "solopo_val", "longpo", "longpo_val"
    }  # fmt: skip
    assert mapped["short_po"] == mapped["expand_long_po"] == mapped["long_po"] == "rejected"
    jsonl = content(folder)["toy_solopo.jsonl"]
    run(work, val_size=2, num_rejected=2, export_format="parquet")
    loaded = load_dataset("parquet", data_files=str(folder / "toy_solopo.parquet"), cache_dir=str(tmp_path / "cache"))
    assert [json.loads(json.dumps(row)) for row in loaded["train"]] == lists
    run(work, val_size=2, num_rejected=2)
    assert content(folder)["toy_solopo.jsonl"] == jsonl
    run(work, val_size=2)
    assert content(folder) == before  # which other settings have left nothing in
