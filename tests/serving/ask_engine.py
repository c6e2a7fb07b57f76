"""Ask vLLM's offline engine, in the environment that has it beside the host: `python ask_engine.py FOLDER`.

FOLDER/recipe.json: a data recipe, run up to its answers. FOLDER/asked.json: model, adapter and prompts to be answered
greedily; the answers go to FOLDER/said.json. In fp32 and eagerly, so that they are those of transformers.
"""

import json
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
    asked, said = json.loads((folder / "asked.json").read_text()), {}
    sampling = Sampling(**asked["sampling"], backend="vllm")
    for adapter in (None, asked["adapter"]):
        calls = [Call(name, (0,), prompt) for name, prompt in asked["prompts"].items()]
        replies = generate(sampling, Model(asked["model"], adapter, window=1024), calls)
        said[str(adapter)] = {reply.id: [*reply.answers[0], reply.prompt_tokens] for reply in replies}
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
