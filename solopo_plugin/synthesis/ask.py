"""Ask a model for questions about passages; reads passages.jsonl, writes asked.jsonl."""

from pathlib import Path

from .recipe import DataRecipe


def run(recipe: DataRecipe, work: Path) -> dict:
    """Ask for questions; returns what was asked and answered."""
    raise NotImplementedError
