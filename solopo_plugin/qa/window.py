"""Tell how many tokens a model was made for."""

import math

# kinds of rope scaling whose frequencies do not depend on how long a sequence is; `dynamic`'s and `longrope`'s do
ROPES = ("default", "linear", "yarn", "llama3", "proportional")


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


def ropes_by_length(config) -> dict[str, int]:
    """Return the kinds of rope scaling that choose frequencies by the longest sequence of a batch, for all of it.

    With the tokens up to which they choose the same ones.
    """
    of_model = getattr(config, "rope_parameters", None) or {}
    ropes = [r for r in of_model.values() if isinstance(r, dict)] or [of_model]  # one per kind of layer, or one for all
    return {
        kind: rope.get("original_max_position_embeddings") or config.max_position_embeddings
        for rope in ropes
        if (kind := rope.get("rope_type", "default")) not in ROPES
    }
