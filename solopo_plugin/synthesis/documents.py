"""Read a folder of documents and split them into passages; writes passages.jsonl.

A passage is {"id": "<relative path>#<n>", "title", "text", "source": "<relative path>", "section": "Heading > Sub",
"place": its number in the document, from 0, "tokens"}.
"""

from pathlib import Path

from .recipe import DataRecipe


def run(recipe: DataRecipe, work: Path) -> dict:
    """Read and split the documents; returns what was read, skipped and left out."""
    raise NotImplementedError
