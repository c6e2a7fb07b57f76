"""Draw at random by a seed and a name, so that the order of what is drawn changes nothing."""

import hashlib


def draw(seed: int, id: str) -> bytes:
    """A random number that depends on nothing but the seed and the question, for choosing whatever the order."""
    return hashlib.sha256(f"{seed} {id}".encode()).digest()
