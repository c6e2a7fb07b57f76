"""Keep our lines and the host's in the log of a run of `stage: solopo`, and leave transformers' hundreds out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

ASKED = ("LLAMAFACTORY_VERBOSITY", "TRANSFORMERS_VERBOSITY")  # the user has chosen; the board reads its log
BOARD = "LLAMABOARD_ENABLED"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers to warnings, unless an environment variable says otherwise; what runs later is as before.

    The host sets it to INFO for every stage: each configuration is printed whole, each time that it is read.
    """
    from transformers.utils import logging

    if any(os.environ.get(name) for name in (*ASKED, BOARD)):
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        yield
    finally:
        logging.set_verbosity(before)
