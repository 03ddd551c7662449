"""Makes `import sae_lens` enough: activates sae_gated_plugin right after SAELens was imported.

Runs at the start of every interpreter, so it imports nothing that is not loaded anyway. It puts one
finder on sys.meta_path that answers for `sae_lens` alone and goes once that has been imported.
SAE_GATED_PLUGIN_AUTOLOAD=0 switches it off.
"""

# pyright: basic, reportUnusedImport=false
# (typing would be an import more at every start)

import os
import sys


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "sae_lens" or path is not None:
            return None
        # The finder stays: the caller may only want to know whether SAELens is installed.
        for finder in list(sys.meta_path):
            if finder is not _Finder and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        _activate_after(spec.loader)
                    return spec
        return None


def _activate_after(loader):
    execute = loader.exec_module

    def exec_module(module):
        execute(module)
        uninstall()
        try:
            # Where somebody is importing the package right now, it activates itself.
            if "sae_gated_plugin" not in sys.modules:
                import sae_gated_plugin  # noqa: F401
        except (Exception, SystemExit) as error:
            import warnings

            warnings.warn(
                f"sae-gated-plugin could not be activated: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    loader.exec_module = exec_module


def install():
    """Watch for the import of sae_lens. Does nothing the second time, or when it is too late."""
    if os.environ.get("SAE_GATED_PLUGIN_AUTOLOAD") == "0" or "sae_lens" in sys.modules:
        return
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def uninstall():
    """Stop watching."""
    if _Finder in sys.meta_path:
        sys.meta_path.remove(_Finder)


install()
