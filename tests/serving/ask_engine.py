"""Ask vLLM's offline engine, in the environment that has it beside the host: `python ask_engine.py FOLDER`.

FOLDER/recipe.json: a data recipe, run up to its answers. FOLDER/asked.json: {name: settings, adapter, prompts, and so
on}; the answers go to FOLDER/said.json. In fp32 and eagerly, so that greedy answers are those of transformers.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path


def main(folder: Path) -> None:
    import vllm

    from solopo_plugin.qa.generate import generate
    from solopo_plugin.qa.generate.calls import Call, Model
    from solopo_plugin.qa.recipe import Sampling
    from solopo_plugin.synthesis.pipeline import run_pipeline
    from solopo_plugin.synthesis.recipe import make_recipe

    vllm.LLM = partial(vllm.LLM, dtype="float32", enforce_eager=True, enable_chunked_prefill=False)
    recipe = make_recipe(json.loads((folder / "recipe.json").read_text()))
    for stage in ("read", "contexts", "sample"):
        run_pipeline(recipe, stage)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the others in this process: two less to start
    said = {}
    for name, asked in json.loads((folder / "asked.json").read_text()).items():
        ks, schema = tuple(range(asked["n"])), asked["schema"]
        calls = [Call(place, ks, prompt, schema=schema) for place, prompt in asked["prompts"].items()]
        model = Model(recipe.model.path, asked["adapter"], window=1024)
        replies = generate(Sampling(**asked["sampling"], backend="vllm"), model, calls)
        said[name] = {reply.id: [reply.answers, reply.prompt_tokens] for reply in replies}
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
