"""Refuse, before anything long begins, a backend that cannot answer and models that cannot be loaded."""

from pathlib import Path

from ..host.preflight import listed, why_not_there
from .files import DataError
from .generate import check_backend
from .provenance import doubtful_weights


def check_ready(backend: str, server_urls: str | dict | None, models: dict[str, str]) -> None:
    """Refuse what cannot be asked from this machine, all in one message.

    Args:
        backend: The recipe's, as its server_urls.
        server_urls: Of `backend: openai`.
        models: Key of the recipe, for the sentence -> a folder or a name of the hub.

    Raises:
        DataError: One sentence, or a numbered list of several.
    """
    found = []
    try:
        check_backend(backend, server_urls)
    except DataError as error:
        found.append(str(error))
    for key, name in models.items():
        if reason := why_not_there(name, {}) or doubtful_weights(Path(name), backend):
            found.append(f"`{key}: {name}` {reason}")
    if found:
        raise DataError(listed(found))
