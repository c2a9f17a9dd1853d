"""A pytest plugin (`python -m pytest -p tests.pure`) under which overlayfs_py runs uncompiled.

It has to be loaded by `-p`: a compiled module that was imported before can't be replaced.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec, SourceFileLoader
from types import ModuleType


class SourceOnly:
    """A finder that gives the modules of overlayfs_py from their source, whatever stands compiled beside it."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "overlayfs_py":
            return None
        for folder in sys.path if path is None else path:
            spec = FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(fullname)
            if spec is not None and spec.loader is not None:
                return spec
        return None


def install() -> None:
    """Put the finder before all others. Raises RuntimeError if a compiled module is there already."""
    compiled = [
        name
        for name, module in sys.modules.items()
        if name.startswith("overlayfs_py.") and isinstance(module.__loader__, ExtensionFileLoader)
    ]
    if compiled:
        raise RuntimeError(f"imported before tests.pure could keep them uncompiled: {', '.join(compiled)}")
    sys.meta_path.insert(0, SourceOnly)


install()
