"""Check what may stand in an entry of dataset_info.json; tests/test_preflight.py has the sentences of a start."""

import pytest

from solopo_plugin.qa import entries
from solopo_plugin.qa.entries import misshapen


def test_known_names_of_an_entry_are_those_that_the_host_reads():
    """Give the host an entry of every known name; each is in what it makes of it, and nothing else is."""
    from llamafactory.data.parser import DatasetAttr

    attr = DatasetAttr("file", "rows.jsonl")
    parts = {part: {name: f"{part} {name}" for name in names} for part, names in entries.KNOWN.items()}
    others = {key: f"entry {key}" for key in entries.KEYS - entries.URLS - {*parts, "file_name"}}
    attr.join(parts | others)
    given = {**parts["columns"], **parts["tags"], **others}
    assert vars(attr) == given | {"load_from": "file", "dataset_name": "rows.jsonl"}


@pytest.mark.parametrize("key", ["made_of", "file_sha1", "description", "license"])
def test_an_entry_may_have_keys_of_other_programs(key):
    assert misshapen("rows", {"file_name": "rows.jsonl", "columns": {}, "tags": {}, "num_samples": 0, key: 1}) is None
