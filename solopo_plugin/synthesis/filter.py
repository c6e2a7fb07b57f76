"""Keep the questions that can be used; reads asked.jsonl and passages.jsonl, writes questions.jsonl and corpus.jsonl.

The two are as the stage `read` writes them. A paragraph of the evidence has the title and the text of its passage.
corpus.jsonl has every passage, with its `source` and its `place`, by which the stage `contexts` knows its document.
"""

from pathlib import Path

from .recipe import DataRecipe


def run(recipe: DataRecipe, work: Path) -> dict:
    """Filter the questions; returns what was kept, and left out for which reason."""
    raise NotImplementedError
