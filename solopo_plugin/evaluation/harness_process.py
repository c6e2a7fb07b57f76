"""lm-evaluation-harness' own command line, which here also tells of prompts that it cuts for a server to go on with.

    python -m solopo_plugin.evaluation.harness_process run --config config.json

Its other model types, and this one where given answers are scored, write a warning of each into the log by themselves.
lm_eval: 0.4.13.
"""

import logging

from lm_eval.__main__ import cli_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI

log = logging.getLogger("lm_eval")


def tell_of_cuts() -> None:
    """Make `generate_until` warn of each prompt that it is about to cut on the left."""
    generate = LocalCompletionsAPI.generate_until

    def generate_until(self, requests, *args, **kwargs):
        for text, settings in (request.args[:2] for request in requests if self.tokenized_requests):
            tokens = len(self.tok_encode(text, add_special_tokens=self.add_bos_token))
            room = self.max_length - settings.get("max_gen_toks", self._max_gen_toks)
            if room < 1:
                raise ValueError(f"a window of {self.max_length} tokens has no room for a prompt and its answer")
            if tokens > room:
                log.warning(f"Context length ({tokens}) exceeds the window without the answer ({room}). Truncating.")
        return generate(self, requests, *args, **kwargs)

    LocalCompletionsAPI.generate_until = generate_until


if __name__ == "__main__":
    tell_of_cuts()
    cli_evaluate()
