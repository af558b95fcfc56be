"""The package: what is built, what importing it does, and which part knows which."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from adapters import ADAPTERS, HOSTS, INTEGRATIONS, ROOT

import ampcheck
import ampcheck.integrations

CORE = ROOT / "core"
SOURCES = sorted(CORE.rglob("*.py"))
# `fixes/lightning.py`, `commands/timm.py`: what is beside an adapter is its own.
BESIDE = sorted(path for path in INTEGRATIONS.glob("*/*.py") if path.name != "__init__.py")

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk():
    """The packages that hold Python files, by the names they are imported by."""
    core = {".".join(("ampcheck", *path.parent.relative_to(CORE).parts)) for path in SOURCES}
    return core | {
        ".".join(("ampcheck.integrations", *path.parent.relative_to(INTEGRATIONS).parts))
        for path in INTEGRATIONS.rglob("*.py")
    }


def shipped():
    """The files that a wheel must hold."""
    files = {f"ampcheck/{path.relative_to(CORE).as_posix()}" for path in SOURCES}
    files |= {
        f"ampcheck/integrations/{path.relative_to(INTEGRATIONS).as_posix()}" for path in INTEGRATIONS.rglob("*.py")
    }
    return files | {"ampcheck/py.typed"}


def test_the_list_of_packages_is_the_disks():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_package_is_one():
    for path in {path.parent for path in (*SOURCES, *INTEGRATIONS.rglob("*.py"))}:
        assert (path / "__init__.py").is_file(), path


def test_the_links_are_the_package():
    """What type checkers and editors look into, in place of an installed package."""
    links = ROOT / ".links" / "ampcheck"
    expected = {path for path in CORE.iterdir() if path.name != "__pycache__"} | {INTEGRATIONS}
    assert {path.resolve() for path in links.iterdir()} == {path.resolve() for path in expected}
    assert all(path.is_symlink() and path.name == path.resolve().name for path in links.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("`build` is not installed")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    if has_backend():
        command.insert(3, "--no-isolation")
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return folder


def has_backend():
    """Whether setuptools is here in a version that `build-system.requires` takes."""
    if importlib.util.find_spec("setuptools") is None:
        return False
    import setuptools

    return int(setuptools.__version__.partition(".")[0]) >= 77


@pytest.mark.slow
def test_wheel(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"ampcheck-{ampcheck.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == shipped()
        info = f"ampcheck-{ampcheck.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "ampcheck = ampcheck.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    for extra in (*HOSTS, "all", "test", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


@pytest.mark.slow
def test_sdist(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in (*SOURCES, *INTEGRATIONS.rglob("*.py"))}
    assert expected | {"core/py.typed", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_version_is_stated_once():
    assert PROJECT["project"]["version"] == ampcheck.__version__


# Importing.

PROBE = """
import sys
{before}
import torch
import torch.nn.modules.module as modules, torch.optim.optimizer as optimizers
def state():
    tables = [dict(v) for m in (modules, optimizers) for n, v in vars(m).items()
              if n.startswith("_global") and hasattr(v, "keys")]
    owners = torch.nn.Module, torch.autocast, torch.Tensor, torch.optim.Optimizer, torch.amp.GradScaler
    classes = [dict(vars(c)) for c in owners]
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return tables, classes, modes, sys.excepthook, sys.gettrace(), sys.getprofile(), list(sys.meta_path)
before = state()
import ampcheck
assert state() == before, "importing changed something"
packages = {{name.partition(".")[0] for name in sys.modules}}
print(*sorted(name for name in packages if any(host in name for host in {hosts!r})))
"""


def imported_with(before=""):
    program = PROBE.format(before=before, hosts=HOSTS)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_importing_imports_no_framework_and_does_nothing():
    assert imported_with() == []


def test_that_the_check_above_can_fail():
    """A framework that is imported is seen, here by modules of its name."""
    before = "import types; sys.modules['timm'] = sys.modules['mmengine.hooks'] = types.ModuleType('x')"
    assert imported_with(before) == ["mmengine", "timm"]


# Who knows whom.


def words(tree):
    """Identifiers, strings and imported names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, (ast.Attribute, ast.alias)):
            yield node.attr if isinstance(node, ast.Attribute) else node.name
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, (ast.arg, ast.keyword)):
            yield node.arg or ""


def framework_names(source):
    return [word for word in words(ast.parse(source)) if any(name in word.lower() for name in HOSTS)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CORE)))
def test_core_names_no_framework(path):
    assert framework_names(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["import timm", "x.lightning_module", "'for MMEngine'", "def timm(): ...", "f(timm=1)", "from timm import x"],
)
def test_that_a_framework_would_be_seen(source):
    assert framework_names(source)


def imports(path, package):
    """The modules that a file imports, by absolute name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from ampcheck import checker` is an import of a submodule as well.
            of_packages = (package, *packages_on_disk())
            if node.module not in of_packages[1:] or node.module == package:
                yield node.module
            if node.module in of_packages:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [*ADAPTERS, *BESIDE], ids=lambda path: path.relative_to(INTEGRATIONS).as_posix())
def test_adapters_use_the_public_names_alone(path):
    """No submodule of the core, and of the integrations no other host's."""
    public = {f"ampcheck.{name}" for name in ampcheck.__all__} | {"ampcheck"}
    used = {name for name in imports(path, "ampcheck") if name.partition(".")[0] == "ampcheck"} - public
    assert not [name for name in used if not name.startswith("ampcheck.integrations.")]
    assert {name.rpartition(".")[2] for name in used} <= {path.stem}


def test_each_adapter_has_its_fixes_and_an_extra():
    assert ADAPTERS
    assert [path.stem for path in ADAPTERS] == sorted(path.stem for path in BESIDE if path.parent.name == "fixes")
    assert {path.stem for path in BESIDE} == {*HOSTS}
    extras = PROJECT["project"]["optional-dependencies"]
    assert {*HOSTS} <= extras.keys()
    (everything,) = extras["all"]
    assert {*HOSTS} <= {*re.findall(r"\w+", everything)}


def test_core_imports_no_adapter():
    assert not [path for path in SOURCES if any("integrations" in (name or "") for name in imports(path, "ampcheck"))]


def test_import_contracts(tmp_path):
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("import-linter is not installed")
    command = [str(lint), "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".links")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout
    assert "0 broken" in run.stdout


def test_public_names_exist():
    assert sorted(ampcheck.__all__) == ampcheck.__all__ or set(ampcheck.__all__) <= set(dir(ampcheck))
    for name in ampcheck.__all__:
        assert getattr(ampcheck, name).__doc__
