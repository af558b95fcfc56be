"""The tests against the oldest and the newest versions of what AmpCheck runs on.

``nox`` runs all sessions, ``nox -l`` lists them, ``nox -s "lightning(oldest)"`` runs one. An interpreter that is not
installed is skipped. With uv on the path environments are made in seconds.

The hosts are those of ``integrations/``. The oldest version of one is the lower bound of its extra in
``pyproject.toml``; what its tests need besides is its dependency group there.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False

CORE = (
    "tests/core",
    "tests/rules",
    "tests/failure",
    "tests/inplace",
    "tests/test_rule_form.py",
    "tests/test_explain.py",
)
PLAIN = ("tests/distributed/test_data_parallel.py", "tests/distributed/test_sharded.py")
# The oldest PyTorch, whose wheels know no newer Python and no NumPy 2.
OLDEST = ("torch==2.4.1", "torchvision==0.19.1", "numpy<2", "setuptools<80")

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
HOSTS = sorted(path.stem for path in (ROOT / "integrations").glob("*.py") if path.name != "__init__.py")


def check(session: nox.Session, *requirements: str, tests: tuple[str, ...]) -> None:
    session.install("-e", ".[test]", *requirements)
    environment = {"OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "1"}
    session.run("python", "-m", "pytest", "-q", *(session.posargs or tests), env=environment)


def tests_of(host: str) -> tuple[str, ...]:
    places = (f"hosts/test_{host}*.py", f"hosts/test_replay_{host}.py", f"distributed/test_{host}_*.py")
    return tuple(str(path.relative_to(ROOT)) for place in places for path in sorted((ROOT / "tests").glob(place)))


def needs(host: str) -> tuple[str, ...]:
    groups = PROJECT["dependency-groups"]
    return (*PROJECT["project"]["optional-dependencies"][host], *groups.get(host, ()))


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def core(session: nox.Session) -> None:
    """The checker alone, on the newest PyTorch that the Python has."""
    check(session, "torch", "numpy", tests=CORE + PLAIN)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The checker alone, on the oldest PyTorch."""
    check(session, *OLDEST, tests=CORE + PLAIN)


def add(host: str) -> None:
    @nox.session(name=host, python="3.11")
    @nox.parametrize("version", ["oldest", "newest"], ids=["oldest", "newest"])
    def tested(session: nox.Session, version: str) -> None:
        """The adapter, in the real trainer of its host."""
        pinned = (*(need.replace(">=", "==") for need in needs(host)), *OLDEST)
        check(session, *(pinned if version == "oldest" else needs(host)), tests=tests_of(host))


for host in HOSTS:
    add(host)


@nox.session(python="3.11")
def pytorch_lightning(session: nox.Session) -> None:
    """The package `pytorch_lightning` without the package `lightning`."""
    check(
        session,
        "pytorch-lightning",
        "timm",
        tests=("tests/hosts/test_lightning.py", "tests/hosts/test_replay_lightning.py"),
    )


@nox.session(python="3.11")
def onedl_mmengine(session: nox.Session) -> None:
    """The fork of MMEngine that is maintained."""
    # It imports OpenCV and does not ask for it.
    check(session, "onedl-mmengine", "opencv-python-headless", "timm", tests=tests_of("mmengine"))
