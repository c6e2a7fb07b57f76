"""Say what is wrong with a data set's entry in dataset_info.json before the host reads it.

Keys, columns and tags are the host's (0.9.5) and ours.
"""

import json
from functools import partial
from typing import Any

from .files import did_you_mean

HUBS = {"hf_hub_url", "ms_hub_url", "om_hub_url"}
URLS = {*HUBS, "script_url", "cloud_file_name"}  # win over an entry's `file_name`
ENTRY = {"file_name": str, "num_samples": int | None, "columns": dict, "tags": dict}  # keys of an entry, their types
COLUMNS = (
    "prompt", "query", "response", "history", "messages", "system", "tools", "chosen", "rejected", "kto_tag",
    "long_prompt", "long_messages",
)  # fmt: skip
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
KNOWN = {"columns": (*COLUMNS, "images", "videos", "audios"), "tags": TAGS}
KEYS = {*ENTRY, *URLS, "formatting", "ranking", "subset", "split", "folder"}


def misshapen(name: str, entry: Any) -> str | None:
    """Say what of a data set's entry in dataset_info.json the host cannot read, or would not; None if it reads all.

    It may have keys of other programs, unless they are like one of the host's.
    """
    seen, head = partial(json.dumps, ensure_ascii=False), f"Dataset `{name}`"
    if not isinstance(entry, dict) or not entry.keys() & {"file_name", *URLS}:
        return f"{head} must be an object with a `file_name` in dataset_info.json, got {seen(entry)}."
    for key in sorted(entry.keys() - KEYS):
        if near := did_you_mean(key, KEYS, cutoff=0.75):  # `file_sha1` of old entries is not
            return f"{head}: `{key}` in dataset_info.json is none of the host's keys. {near}If not, rename it."
    if "script_url" in entry and not entry.keys() & HUBS:
        return f"{head}: `script_url` in dataset_info.json is no longer run by `datasets`; save its rows as a file."
    unread = {"file_name"} if entry.keys() & URLS else set()
    for key in (key for key in entry if key in ENTRY.keys() - unread):
        value = entry[key]
        below = isinstance(value, int) and (isinstance(value, bool) or value < 0)
        if below or not isinstance(value, ENTRY[key]):
            return f"{head}: `{key}` in dataset_info.json cannot be {seen(value)}; see docs/data.md."
        for part, text in value.items() if isinstance(value, dict) else ():
            if part not in KNOWN[key]:
                near = did_you_mean(part, KNOWN[key]) or f"Known are {', '.join(KNOWN[key])}."
                return f"{head}: `{part}` under `{key}` in dataset_info.json is nothing that is read. {near.strip()}"
            if text and not isinstance(text, str):
                what = "the name of a column" if key == "columns" else "a text"
                return f"{head}: `{part}` under `{key}` in dataset_info.json must be {what}, got {seen(text)}."
    return None
