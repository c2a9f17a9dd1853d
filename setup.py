"""Compile the hot modules of the core where a compiler is at hand; everything else is in pyproject.toml."""

from setuptools import Extension, setup

# Each is plain typed Python, with a .pxd beside it where Cython callers want its types. The interpreter runs
# the source of any of them that was not compiled.
COMPILED = (
    "overlayfs_py/core/nodes.py",
    "overlayfs_py/core/marks.py",
    "overlayfs_py/core/layers.py",
    "overlayfs_py/core/merged.py",
)

# The native engine, which there is only compiled.
NATIVE = (
    "overlayfs_py/engines/native/xattrs.pyx",
    "overlayfs_py/engines/native/plain.pyx",
    "overlayfs_py/engines/native/listing.py",
    "overlayfs_py/engines/native/background.pyx",
    "overlayfs_py/engines/native/closing.pyx",
    "overlayfs_py/engines/native/ahead.pyx",
    "overlayfs_py/engines/native/pace.pyx",
    "overlayfs_py/engines/native/pipes.pyx",
    "overlayfs_py/engines/native/warm.pyx",
    "overlayfs_py/engines/native/export.pyx",
    "overlayfs_py/engines/native/direct.pyx",
    "overlayfs_py/engines/native/passthrough.pyx",
    "overlayfs_py/engines/native/session.pyx",
    "overlayfs_py/engines/native/prune.pyx",
    "overlayfs_py/engines/native/answers.pyx",
    "overlayfs_py/engines/native/extensions.pyx",
    "overlayfs_py/engines/native/names.pyx",
    "overlayfs_py/engines/native/attributes.pyx",
    "overlayfs_py/engines/native/opening.pyx",
    "overlayfs_py/engines/native/files.pyx",
    "overlayfs_py/engines/native/copying.pyx",
    "overlayfs_py/engines/native/directories.pyx",
    "overlayfs_py/engines/native/connection.pyx",
    "overlayfs_py/engines/native/device.pyx",
    "overlayfs_py/engines/native/uring.pyx",
)

# Said here, as setuptools drops its own options where CFLAGS is set. The C is Cython's: what gcc warns of there is no
# concern of a reader.
OPTIONS = ["-O2", "-DNDEBUG", "-fwrapv", "-fno-strict-aliasing", "-w"]


def extensions() -> list[Extension]:
    """The extension modules to build, none without Cython; the install goes on without a C compiler."""
    try:
        from Cython.Build import cythonize
    except ImportError:
        return []
    modules = [
        Extension(path.rpartition(".")[0].replace("/", "."), [path], extra_compile_args=OPTIONS)
        for path in COMPILED + NATIVE
    ]
    # An `int` hint read as a C type would clash with the declaration in the .pxd.
    directives = {"language_level": 3, "annotation_typing": False}
    built: list[Extension] = cythonize(  # type: ignore[no-untyped-call]
        modules, build_dir="build/cython", compiler_directives=directives, quiet=True
    )
    for extension in built:
        extension.optional = True
    return built


if __name__ == "__main__":
    setup(ext_modules=extensions())
