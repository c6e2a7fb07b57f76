"""Tell how many tokens a model was made for."""

import math


def window_of(config) -> float:
    """Return the tokens that a model was made for.

    With YaRN some configurations name the window before it is widened (Qwen2.5's card), others the one after it; of
    other scalings, such as Llama 3.1's, `max_position_embeddings` is the widened one.
    """
    window = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or window
    if rope.get("rope_type") != "yarn" or original == math.inf:
        return window
    return max(window, int(original * (rope.get("factor") or 1)))
