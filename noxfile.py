"""The tests against the oldest and the newest versions of what AmpCheck runs on.

``nox`` runs all sessions, ``nox -l`` lists them, ``nox -s "lightning(2.2)"`` runs one. An interpreter that is not
installed is skipped. With uv on the path environments are made in seconds.
"""

from __future__ import annotations

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
OLDEST = ("torch==2.4.1", "numpy<2", "setuptools<80")


def check(session: nox.Session, *requirements: str, tests: tuple[str, ...]) -> None:
    session.install("-e", ".[test]", *requirements)
    environment = {"OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "1"}
    session.run("python", "-m", "pytest", "-q", *(session.posargs or tests), env=environment)


def of(host: str, *more: str) -> tuple[str, ...]:
    return f"tests/hosts/test_{host}.py", f"tests/hosts/test_replay_{host}.py", *more


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def core(session: nox.Session) -> None:
    """The checker alone, on the newest PyTorch that the Python has."""
    check(session, "torch", "numpy", tests=CORE + PLAIN)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The checker alone, on the oldest PyTorch."""
    check(session, *OLDEST, tests=CORE + PLAIN)


@nox.session(python="3.11")
@nox.parametrize("version", ["2.2.0", "newest"], ids=["2.2", "newest"])
def lightning(session: nox.Session, version: str) -> None:
    """Both of Lightning's packages."""
    pins = (f"lightning=={version}", f"pytorch-lightning=={version}", *OLDEST)
    tests = of("lightning", "tests/distributed/test_lightning_ddp.py")
    check(session, *(("lightning", "pytorch-lightning") if version == "newest" else pins), "timm", tests=tests)


@nox.session(python="3.11")
def pytorch_lightning(session: nox.Session) -> None:
    """The package `pytorch_lightning` without the package `lightning`."""
    check(session, "pytorch-lightning", "timm", tests=of("lightning"))


@nox.session(python="3.11")
@nox.parametrize("package", ["mmengine==0.10.0", "mmengine", "onedl-mmengine"], ids=["0.10", "newest", "onedl"])
def mmengine(session: nox.Session, package: str) -> None:
    """MMEngine, and the fork of it that is maintained."""
    # The fork imports OpenCV and does not ask for it.
    check(session, package, *(OLDEST if "==" in package else ("opencv-python-headless",)), "timm", tests=of("mmengine"))


@nox.session(python="3.11")
@nox.parametrize("version", ["8.2.0", "newest"], ids=["8.2", "newest"])
def ultralytics(session: nox.Session, version: str) -> None:
    """Ultralytics, with the launch of several processes."""
    pins = ("ultralytics==8.2.0", "torchvision==0.19.1", *OLDEST)
    tests = of("ultralytics", "tests/distributed/test_ultralytics_ddp.py")
    check(session, *(("ultralytics", "cloudpickle>=3.1.1") if version == "newest" else pins), tests=tests)


@nox.session(python="3.11")
@nox.parametrize("version", ["0.9.0", "newest"], ids=["0.9", "newest"])
def timm(session: nox.Session, version: str) -> None:
    """timm, under train scripts of its own kind."""
    pins = (f"timm=={version}", "torchvision==0.19.1", *OLDEST)
    check(session, *(("timm",) if version == "newest" else pins), tests=of("timm", "tests/hosts/test_timm_older.py"))
