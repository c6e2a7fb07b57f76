"""Draw at random by a seed and a name, so that the order of what is drawn changes nothing."""

import hashlib
import random


def digest(*words: object) -> bytes:
    """Return 32 random bytes that depend on nothing but the words, such as a seed and an id; to choose by, sort."""
    return hashlib.sha256(" ".join(map(str, words)).encode()).digest()


def generator(*words: object) -> random.Random:
    """Return random numbers that depend on nothing but the words, such as a seed, a purpose and an id."""
    return random.Random(" ".join(map(str, words)))
