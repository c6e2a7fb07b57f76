"""What runs at interpreter start: `solopo_plugin.pth` imports this file in every Python process of the environment.

It installs one import finder that waits for six modules of LLaMA-Factory and, right after one of them has been
imported, hands it to the file in `solopo_plugin.host` that patches it. Torchrun workers, Ray workers and
LlamaBoard's "Start" are new processes, so patching in a parent would be lost; this is not. Nothing but `sys` and
`os` is imported, and nothing here may raise: an unrelated program must not notice it.
`SOLOPO_PLUGIN=off` (or 0, false, no) leaves the host untouched.
"""

import os
import sys

PATCHES = {
    "llamafactory.hparams.parser": "solopo_plugin.host.arguments",
    "llamafactory.data.parser": "solopo_plugin.host.data",
    "llamafactory.data.loader": "solopo_plugin.host.data",
    "llamafactory.train.tuner": "solopo_plugin.host.stage",
    "llamafactory.webui.interface": "solopo_plugin.host.board",
    "llamafactory.launcher": "solopo_plugin.host.preflight",
}


class HostFinder:
    """Find the modules named in `PATCHES` as everybody else would, and patch them once they are loaded."""

    searching: set[str] = set()  # another finder may ask all finders, ours included

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Return the module's own spec, with a loader that patches it after loading; None for other modules."""
        if name not in PATCHES or name in cls.searching:
            return None
        cls.searching.add(name)
        try:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find and finder is not cls else None
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = PatchingLoader(spec.loader)
                    return spec
        finally:
            cls.searching.discard(name)
        return None


class PatchingLoader:
    """Run a module's own loader, then the patch. A wrapper, for a loader may be shared by modules or read-only."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def exec_module(self, module):
        """Load the module as its own loader does, then hand it to its file in `solopo_plugin.host`."""
        from contextlib import suppress
        from importlib import import_module

        module.__spec__.loader = module.__loader__ = self.loader
        try:
            self.loader.exec_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            with suppress(Exception):  # a package that is not whole
                import_module("solopo_plugin.host.versions").explain(error)
            raise
        try:
            if import_module("solopo_plugin.host.versions").tested():
                import_module(PATCHES[module.__name__]).apply(module)
        except Exception as error:
            warn_inactive(str(error))


said: set[str] = set()  # why the plugin is inactive, over all modules of this process


def warn_inactive(reason: str) -> None:
    """Say on stderr, once, that `stage: solopo` will not be there, and why; the host goes on without it."""
    if reason not in said:
        said.add(reason)
        print(f"[WARNING] solopo_plugin is inactive: {reason}", file=sys.stderr)


def activate() -> None:
    """Install the finder unless switched off; called once by the .pth file."""
    if os.environ.get("SOLOPO_PLUGIN", "").lower() not in ("off", "0", "false", "no"):
        if HostFinder not in sys.meta_path:
            sys.meta_path.insert(0, HostFinder)
