"""Name the LLaMA-Factory that the plugin was tested with, wrap its functions, and say what to do about another."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from ..qa.provenance import installed
from ..startup import warn_inactive

TESTED = ("0.9.5",)
# torch, torchvision and torchaudio are built against each other; pip does not enforce it (see constraints.txt)
WORKING_SET = {"torch": "2.11", "torchvision": "0.26", "torchaudio": "2.11"}
INSTALL = "pip install " + " ".join(f'"{name}=={v}.*"' for name, v in WORKING_SET.items())


@cache
def tested() -> bool:
    """Return whether the host is one that the patches were tested with; warns once, on stderr, if it is not."""
    if (host := installed("llamafactory")) not in TESTED:
        warn_inactive(
            f"it is tested with LLaMA-Factory {', '.join(TESTED)} and found {host}. "
            f'`stage: solopo` needs: pip install "llamafactory=={TESTED[-1]}"'
        )
    return host in TESTED


def explain(error: BaseException) -> None:
    """Attach to a failed import of the host what to install, if the environment is not a working set."""
    wrong = {n: installed(n) for n, v in WORKING_SET.items() if not installed(n).startswith(v + ".")}
    if wrong and not any(n.startswith("solopo_plugin:") for n in getattr(error, "__notes__", ())):
        found = ", ".join(f"{name} {v}" for name, v in wrong.items())
        error.add_note(
            f"solopo_plugin: LLaMA-Factory cannot be imported and this environment has {found}. Run: {INSTALL}"
        )


def expect_signature(owner: object, name: str, parameters: tuple[str, ...]) -> None:
    """Check, before a function of the host is replaced, that it is there and takes the parameters that we know.

    Raises:
        RuntimeError: The host is not the one the patch was written for.
    """
    from inspect import signature

    function = getattr(owner, name, None)
    found = tuple(signature(function).parameters) if callable(function) else None
    if found != parameters:
        where = f"{getattr(owner, '__name__', owner)}.{name}"
        raise RuntimeError(
            f"{where} is not as in LLaMA-Factory {', '.join(TESTED)}: expected parameters {parameters}, found {found}. "
            f'Put the release back: pip install "llamafactory=={TESTED[-1]}" --force-reinstall --no-deps'
        )


def wrap(*seams: tuple[Any, str, tuple[str, ...], Callable]) -> None:
    """Put functions of ours in the places of functions of the host, once all have turned out to be the known ones.

    A seam is owner, name and parameters of the host's function, and ours, which takes the host's before its arguments.

    Raises:
        RuntimeError: From `expect_signature`; nothing is wrapped.
    """
    for owner, name, parameters, _ in seams:
        expect_signature(owner, name, parameters)
    for owner, name, _, ours in seams:
        setattr(owner, name, _around(getattr(owner, name), ours))


def _around(function: Callable, ours: Callable) -> Callable:
    @wraps(function)
    def wrapper(*args, **kwargs):
        return ours(function, *args, **kwargs)

    vars(wrapper)["ours"] = ours  # says which file replaces a function
    return wrapper
