"""The core's hot modules run compiled by default, and from source under `-p tests.pure`."""

import importlib
import runpy
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILED: tuple[str, ...] = runpy.run_path(str(ROOT / "setup.py"))["COMPILED"]


@pytest.mark.parametrize("path", COMPILED)
def test_a_hot_module_runs_in_the_mode_asked_for(path: str, pytestconfig: pytest.Config) -> None:
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    pure = pytestconfig.pluginmanager.hasplugin("tests.pure")
    expected = SourceFileLoader if pure else ExtensionFileLoader
    assert isinstance(module.__loader__, expected), f"{module.__file__}: run `make build` first"


@pytest.mark.parametrize("path", COMPILED)
def test_a_compiled_module_is_not_older_than_its_source(path: str) -> None:
    source = ROOT / path
    built = list(source.parent.glob(f"{source.stem}.*.so"))
    assert built, "run `make build` first"
    newest_source = max(file.stat().st_mtime for file in (source, source.with_suffix(".pxd")) if file.exists())
    assert min(file.stat().st_mtime for file in built) >= newest_source, "run `make build` first"
