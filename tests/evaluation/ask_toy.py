"""The asking half of an evaluation, of invented questions, as a command line: `main([recipe.yaml, key=value ...])`."""

import sys
from pathlib import Path
from types import ModuleType

import toy

from solopo_plugin.evaluation import run
from solopo_plugin.evaluation.models import find_models
from solopo_plugin.evaluation.recipe import load_recipe

N_QUESTIONS = 80


def main(words: list[str]) -> int:
    module = ModuleType("solopo_plugin.evaluation.benchmarks")
    module.BENCHMARKS = {"plain": toy.benchmark(N_QUESTIONS, words=200)}
    sys.modules[module.__name__] = module
    recipe = load_recipe(words[0], words[1:])
    with run.lock_folder(Path(recipe.output_dir), "output_dir"):
        run.answer_all(recipe, find_models(recipe))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
