"""Files are known by what is in them: every layout gives the same rows, one by one, with their lines."""

import gzip
import json
import math
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solopo_plugin.qa import sources
from solopo_plugin.qa.files import DataError, excerpt, read_jsonl, split_names
from solopo_plugin.qa.sources import file_rows, source_rows

FUZZ = settings(deadline=None, max_examples=150, derandomize=True, database=None)
ROWS = [{"id": k, "question": f"Where is Åse {k}?", "answers": ["x", "\u2028y"], "share": k / 7} for k in range(3)]


def read(path: Path) -> list[dict]:
    return [load() for _, load in file_rows(path)]


def places(path: Path) -> list[int]:
    """The line at which each row of a file is said to begin."""
    return [int(where.removeprefix(f"{path}:")) for where, _ in file_rows(path)]


def lines_of(rows: list, end: str = "\n") -> str:
    return end.join(json.dumps(row) for row in rows) + end


# ---- what is read

LAYOUTS = {
    "lines": lines_of(ROWS),
    "lines, the last one not ended": lines_of(ROWS).rstrip(),
    "lines with CRLF": lines_of(ROWS, "\r\n"),
    "lines with blank ones": "\n \n" + lines_of(ROWS, "\n\n\t\n"),
    "lines with a byte order mark": "\ufeff" + lines_of(ROWS),
    "a byte order mark on a blank line": "\ufeff\n" + lines_of(ROWS),
    "two such files, one behind the other": ("\ufeff" + lines_of(ROWS[:2])) + ("\ufeff" + lines_of(ROWS[2:])),
    "a list": json.dumps(ROWS),
    "a list on many lines": json.dumps(ROWS, indent=2),
    "a list with CRLF": json.dumps(ROWS, indent="\t").replace("\n", "\r\n"),
    "a list with a byte order mark": "\ufeff  " + json.dumps(ROWS, indent=1),
    "a list far down": "\n" * 3000 + json.dumps(ROWS),
    "objects on many lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects on many lines without a break": "".join(json.dumps(row, indent=2) for row in ROWS),
    "an object with a list": json.dumps({"version": "1", "data": ROWS}),
    "a number before it": json.dumps({"version": 2.0, "data": ROWS}),
    "a number behind it, on many lines": json.dumps({"data": ROWS, "version": 2}, indent=1),
    "nothing but it": json.dumps({"data": ROWS}, indent=4),
    "an object of another make": json.dumps({"meta": {"n": [{"a": 1}]}, "tags": ["a"], "Rows": ROWS, "n": None}),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows_whatever_the_file_is_called(tmp_path, monkeypatch, layout, packed):
    """The name says nothing: JSON lines in a .json, a list in a .jsonl, .JSONL, .ndjson, no suffix at all."""
    monkeypatch.setattr(sources, "_library_rows", no_library)
    content = LAYOUTS[layout].encode()
    names = ("x.json", "x.jsonl", "x.JSONL", "x.ndjson", "x.jsonl.gz", "x.txt", "x.parquet", "x", "one, two.json")
    for name in names:
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if packed else content)
        assert [load() for _, load in source_rows(str(path), "input", None, "train")] == ROWS


def no_library(name: str, *args):
    raise AssertionError(f"{name} was asked of the library that also asks the hub")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json", "rows"])
def test_parquet_is_known_by_its_content_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "_library_rows", no_library)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
    assert [load() for _, load in source_rows(str(tmp_path / name), "input", None, "train")] == ROWS
    assert [where for where, _ in file_rows(tmp_path / name)][1] == f"{tmp_path / name}[1]"


def test_a_single_row_is_a_row_and_not_what_holds_rows(tmp_path):
    """Though it holds a list of objects, as MuSiQue's rows do; of an article of SQuAD the same is true."""
    for row in (
        {"id": 1, "paragraphs": [{"title": "a"}], "question": "?"}, {"paragraphs": [{"qas": []}], "title": "a"},
        {"prompt": "?", "answers": ["a"], "documents": [{"text": "b"}]}, {"a": 1},
        {"evidence": [{"text": "b"}], "question": "?"}, {"context": "c", "qas": [{"id": 1}]},
    ):  # fmt: skip
        for indent in (None, 1):
            (tmp_path / "x").write_text(json.dumps(row, indent=indent))
            assert read(tmp_path / "x") == [row]
            (tmp_path / "x").write_text(json.dumps(row, indent=indent) + "\n" + json.dumps(row, indent=indent))
            assert read(tmp_path / "x") == [row, row]


def random_value(rng: random.Random, depth: int = 0):
    kinds = ["text", "int", "float", "other"] + ["list", "dict"] * (depth < 4)
    kind = rng.choice(kinds)
    if kind == "text":
        planes = ((32, 127), (160, 0xD7FF), (0x1F300, 0x1F600), (10, 11), (34, 35), (92, 93))
        return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.choice((0, 3, 40))))
    if kind == "int":
        return rng.choice((0, -1, 7, 2**31, 2**63, -(2**63), 10**40))
    if kind == "float":
        return rng.choice((0.1, -0.0, 1e300, 5e-324, rng.random(), 1.0, math.pi * 10 ** rng.randrange(-30, 30)))
    if kind == "list":
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == "dict":
        return {rng.choice("abcde") * rng.randrange(3): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice((None, True, False))


@pytest.mark.parametrize("layout", ["list", "object", "objects"])
@pytest.mark.parametrize("piece", [1, 7, 64, sources.PIECE])
def test_rows_are_those_of_pythons_json_and_their_lines_are_where_they_begin(tmp_path, monkeypatch, layout, piece):
    """Also where a piece ends within a character or a number; types too, as 1 == 1.0 == True."""
    monkeypatch.setattr(sources, "PIECE", piece)
    for seed in range(30):
        rng = random.Random(f"{layout} {seed}")
        rows = [{"id": k, "value": random_value(rng)} for k in range(rng.randrange(5))]
        indent, ascii = rng.choice((None, 0, 3)), rng.random() < 0.5
        texts = [json.dumps(row, indent=indent, ensure_ascii=ascii) for row in rows]
        before, between, behind = {
            "list": ("[\n", ",\n\n", "]"), "object": ('{"n": 1.5,\n"data":[', ", ", "]}\n"),
            "objects": ("\n", "\n", "\n"),
        }[layout]  # fmt: skip
        text, begins = before, []
        for k, row in enumerate(texts):
            text += between * (k > 0)
            begins.append(text.count("\n") + 1)
            text += row
        path = tmp_path / "x"
        path.write_text(text + behind, encoding="utf-8")
        found = read(path)
        assert found == rows and repr(found) == repr(rows)
        assert places(path) == begins


@FUZZ
@given(st.binary(max_size=60), st.sampled_from(['{"data": [{"a": 1}, ', "[", '{"id": 1}\n', '{\n"id": 1}\n', "{", ""]))
def test_whatever_the_bytes_a_file_gives_rows_or_a_sentence(tmp_path_factory, content, before):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(before.encode() + content)
    try:
        for _, load in file_rows(path):
            try:
                assert isinstance(load(), dict)
            except DataError as error:
                assert "\n" not in str(error)
    except DataError as error:
        assert str(error).startswith((str(path), f"Cannot read {path}")) and "\n" not in str(error)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("layout", ["lines", "list", "list on one line", "object"])
def test_a_large_file_is_never_held_in_memory(tmp_path, layout, packed):
    """24 MB of text, of which less than 2 MB exist at a time."""
    row = json.dumps({"id": 1, "paragraphs": [{"title": "t", "text": "word " * 200} for _ in range(6)]})
    n = 24_000_000 // len(row)
    before, between, behind = {
        "lines": ("", "\n", ""), "list": ("[", ",\n", "]"), "list on one line": ("[", ", ", "]"),
        "object": ('{"data": [', ", ", "]}"),
    }[layout]  # fmt: skip
    with (gzip.open if packed else open)(tmp_path / "x", "wt") as file:
        file.write(before + row)
        for _ in range(n - 1):
            file.write(between + row)
        file.write(behind)
    tracemalloc.start()
    try:
        assert sum(len(load()["paragraphs"]) for _, load in file_rows(tmp_path / "x")) == 6 * n
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# ---- what is refused

REFUSED = {
    "torn list": ('[{"id": 1},\n{"id": 2}', ":2: the JSON does not end; is the file complete?"),
    "torn in a text": ('{"data": [{"a": 1},\n{"b": "c', ":2: the JSON does not end; is the file complete?"),
    "torn behind the list": ('{"data": [\n{"a": 1}]', ":2: the JSON does not end; is the file complete?"),
    "more behind the list": ('[{"id": 1}]\n]', ":2: not JSON (parse error: trailing garbage): ']'."),
    "more behind the object": ('{\n"data": [{"a": 1}]}\nxyz', ":3: not JSON (parse error: trailing garbage): 'xyz'."),
    "no comma": ('[{"id": 1}\n{"id": 2}]', ":2: not JSON (parse error: after array element, I expect ',' or ']'): '{"),
    "NaN": ('[{"id": 1},\n{"id": NaN}]', ":2: not JSON (lexical error: invalid char in json text): '{\"id\": NaN}]'."),
    "object on many lines": ('{\n"id": 1,\n"x": y}', ":3: not JSON (lexical error: invalid char in json text): '\"x\""),
    "not UTF-8": (b'[\n"\xe9"]', ":2: not JSON (lexical error: invalid bytes in UTF8 string): "),
    "very deep": ("[\n" + "[" * 5000, ":2: JSON of more than 100 levels, which no row has: "),
    "two lists": ('{"train": [{"a": 1}], "dev": [{"a": 2}]}', " is one JSON object with the lists 'train', 'dev'; wr"),
    "zip": (b"PK\x03\x04\x14\x00", " begins with b'PK\\x03\\x04\\x14\\x00', which is no text; unpack it, or"),
    "zip in gzip": (gzip.compress(b"PK\x03\x04\x14\x00"), " begins with b'PK\\x03\\x04\\x14\\x00', which is no"),
    "bzip2": (b"BZh91AY&SY", " begins with b'BZh91AY&', which is no text; unpack it"),
    "UTF-16": ('[{"id": 1}]'.encode("utf-16"), " begins with b'\\xff\\xfe[\\x00{\\x00\"\\x00', which is no"),
    "parquet, torn": (b"PAR1\x15\x04", " is no parquet file that can be read ("),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_without_rows_is_refused_by_path_line_and_what_is_there(tmp_path, case):
    content, message = REFUSED[case]
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        list(file_rows(path))
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


def test_a_bad_row_leaves_the_others(tmp_path):
    """A line that is no JSON, and an item that is no object, raise when they are parsed."""
    for content, message in (
        ('{"id": 1}\n{"id": 2,\n{"id": 3}\n', "x:2: not a line of JSON (Expecting property name"),
        ('{"id": 1,\n{"id": 2}\n{"id": 3}\n', "x:1: not a line of JSON (Expecting property name"),
        (
            "id,question\n1,a\n",
            "x:1: not a line of JSON (Expecting value: line 1 column 1 (char 0)): 'id,question\\n'.",
        ),
        ('[{"id": 1}, 7, {"id": 3}]', "a row must be a JSON object, got int 7."),
    ):
        (tmp_path / "x").write_text(content)
        rows, refused = [], []
        for _, load in file_rows(tmp_path / "x"):
            try:
                rows.append(load())
            except DataError as error:
                refused.append(str(error))
        assert message in refused[0] and (len(rows) == 2 or content.startswith("id"))


def test_packed_files_that_are_damaged(tmp_path):
    """Cut off, with another checksum, with a block of no known type behind the header of 10 bytes."""
    whole = gzip.compress(LAYOUTS["lines"].encode())
    for content in (whole[: len(whole) // 2], whole[:-8] + bytes(4) + whole[-4:], whole[:10] + b"\xff" + whole[11:]):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=r"^Cannot read \S+x\.jsonl: [^\n]+(\.|complete\?)$"):
            list(file_rows(tmp_path / "x.jsonl"))


# ---- names


ADDRESSES = {  # as it is given -> as a message shows it
    "http://user:SECRET@host/c.jsonl": "http://host/c.jsonl", "http:/user:SECRET@host/c": "http:/host/c",
    "'s3://SECRET@host'": "'s3://host'", "//u:a/SECRET@h": "//h", "(http://u:SECRET@a,http://b)": "(http://a,http://b)",
    "hf://datasets/a/b@main/c.jsonl": "hf://datasets/a/b@main/c.jsonl", "a@b.org, http://c": "a@b.org, http://c",
    "{base:/scratch@b/x}": "{base:/scratch@b/x}",
    "http://h1:8000/v1,http://u:SECRET/x@h2": "http://h1:8000/v1,http://h2", "http://u:a,SECRET@h": "http://h",
}  # fmt: skip


@pytest.mark.parametrize("given", ADDRESSES)
def test_no_message_shows_who_calls_an_address(given):
    assert str(DataError(f"Cannot read {given}.")) == f"Cannot read {ADDRESSES[given]}."


def test_a_file_by_its_address_is_refused_without_its_password():
    with pytest.raises(DataError, match=r"^Cannot read http:/+host/c\.jsonl: there is no such file"):
        list(read_jsonl(Path("http://user:SECRET@host/c.jsonl")))


def test_only_what_is_not_here_goes_to_the_hub(tmp_path, monkeypatch):
    """Files and folders whose names look like those of the hub, or of a reader of the library; and what is a typo."""
    asked = []
    monkeypatch.setattr(sources, "_library_rows", lambda name, place, *args: asked.append((name, place)) or iter(()))
    monkeypatch.chdir(tmp_path)
    Path("rajpurkar").mkdir()
    for name in ("rajpurkar/squad", "json", "x.v2"):
        Path(name).write_text(lines_of(ROWS))
        assert len(list(source_rows(name, "input", None, "train"))) == 3 and asked == []
    Path("parquet").mkdir()
    for name in ("rajpurkar", "parquet", "./parquet"):
        list(source_rows(name, "input", None, "train"))
        assert asked.pop() == (name, os.path.abspath(name))
    for name in ("org/name", "squad", "org/name-v1.0"):
        list(source_rows(name, "input", None, "train"))
        assert asked.pop() == (name, name)
    for name in (
        "x.JSONL",
        "x.ndjson",
        "d/x.jsonl.gz",
        "x.parquet",
        "./x",
        "../x",
        "/org/x",
        "~/x",
        "a/b/c",
        "x.csv",
        "",
        "a b",
    ):
        with pytest.raises(
            DataError, match=r"^`input`: there is no file .*, and it is no name of the hub; check the path\.$"
        ):
            list(source_rows(name, "input", None, "train"))
    os.mkfifo("pipe")
    with pytest.raises(DataError, match=r"^`input: pipe` is neither a file nor a folder; a pipe cannot be read"):
        list(source_rows("pipe", "input", None, "train"))
    assert asked == []


def test_a_folder_of_save_to_disk_is_no_folder_of_rows(tmp_path):
    """Its files of metadata would be read as a row."""
    from datasets import Dataset

    Dataset.from_list([{"id": "a"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"^`input: \S+saved` was written by `save_to_disk`; write its rows as parquet"):
        list(source_rows(str(tmp_path / "saved"), "input", None, "train"))


def test_a_comma_in_the_name_of_what_is_there_parts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.json", "c", "c, d", "e", "b.json", "f,g", "f,g,h"):
        Path(name).touch()
    for text, names in {
        "a,b.json": ["a,b.json"], " a,b.json ": ["a,b.json"], "c,a,b.json": ["c", "a,b.json"],
        "a,b.json , e": ["a,b.json", "e"], "c, d": ["c, d"], "c,d": ["c", "d"], "c , e": ["c", "e"], "x,y": ["x", "y"],
        "x,,y,": ["x", "y"], "": [], " , ": [], "f,g": ["f,g"], "f,g,h": ["f,g,h"], "f,g,h,f,g": ["f,g,h", "f,g"],
        "x,b.json": ["x", "b.json"], "org/x, a,b.json,c, d": ["org/x", "a,b.json", "c, d"], "x" * 5000: ["x" * 5000],
    }.items():  # fmt: skip
        assert split_names(text) == names


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (OSError("no\n  such   host"), "no such host"),
        ("tokenizer " * 4, "tokenizer tokenizer tokenizer tokenizer"),
        ("tokenizer " * 5, "tokenizer tokenizer tokenizer ..."),
        ("x" * 41, "x" * 36 + " ..."),
        ("a " + "x" * 50, "a " + "x" * 34 + " ..."),
    ],
)
def test_what_a_library_says_is_cut_between_two_words_if_it_can_be(said, told):
    assert excerpt(said, 40) == told
