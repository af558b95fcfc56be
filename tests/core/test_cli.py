"""The command line: a script under `ampcheck run` cannot tell, and bad input is one line and status 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import HOSTS

import ampcheck
from ampcheck.cli import main
from ampcheck.rules import RULES

ENV = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

# Trains under a region that does nothing, loads by a spawned worker, and ends with a status of its own.
SCRIPT = """
from __future__ import annotations
import argparse, json, sys
import torch
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.full((3,), float(index))

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--fail-on")
    parser.add_argument("-m", type=int)
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args()
    print(json.dumps([vars(args), sys.argv, sys.path[0], __file__, __name__, sys.modules["__main__"].__file__]))
    print(__spec__, __annotations__, sorted(globals()))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    for batch in DataLoader(Squares(), batch_size=2, num_workers=1, multiprocessing_context="spawn"):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch).sum()
        loss.backward()
        print(loss.item())
    sys.exit(7)

if __name__ == "__main__":
    main()
"""

FAILS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)

    def forward(self, x):
        with torch.autocast(device="cpu"):
            return self.inner(x)

def train(model):
    try:
        model(torch.ones(1, 3))
    except TypeError as error:
        raise SystemError("training stopped") from error

print("before")
train(torch.nn.Sequential(Net()))
"""


class Running:
    """A program that runs while others do."""

    def __init__(self, *command: str, cwd: Path, env: dict[str, str] = ENV) -> None:
        self._process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def result(self, timeout: float = 200) -> SimpleNamespace:
        try:
            out, err = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, err = self._process.communicate()
            raise AssertionError(f"still running after {timeout} s:\n{out}\n{err}") from None
        return SimpleNamespace(out=out, err=err, status=self._process.returncode)


PYTHON = sys.executable
AMPCHECK = str(Path(sys.executable).with_name("ampcheck"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same two scripts under `python` and under `ampcheck`, all at once."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "sub").mkdir()
    (folder / "sub" / "train.py").write_text(SCRIPT)
    (folder / "fails.py").write_text(FAILS)
    args = ["sub/train.py", "--json", "mine.json", "--fail-on", "never", "-m", "3", "--", "--select", "x y"]
    started = {
        "python": Running(PYTHON, *args, cwd=folder),
        "ampcheck": Running(AMPCHECK, "run", "--json", "report.json", "--ignore", "AMP107", *args, cwd=folder),
        "python fails": Running(PYTHON, "fails.py", cwd=folder),
        "ampcheck fails": Running(PYTHON, "-m", "ampcheck", "run", "--json", "failed.json", "fails.py", cwd=folder),
    }
    results = {name: running.result() for name, running in started.items()}
    return SimpleNamespace(folder=folder, **{name.replace(" ", "_"): result for name, result in results.items()})


def test_script_cannot_tell(runs):
    assert runs.ampcheck.out == runs.python.out
    assert len(runs.python.out.splitlines()) == 4
    assert runs.ampcheck.status == runs.python.status == 7
    assert not (runs.folder / "mine.json").exists()


def test_what_ampcheck_says_goes_to_standard_error(runs):
    lines = runs.ampcheck.err.splitlines()
    assert lines[0].startswith("ampcheck  mixed float16 on cpu, loss scaling off · 8 parameters float32 · 2 modules · ")
    assert any(line.startswith("ampcheck  watched training step · 4 module calls, 4 under autocast ") for line in lines)
    assert any(line.startswith("warning[AMP301] missing-grad-scaler: ") for line in lines)
    assert lines[-1].startswith("ampcheck  not judged: AMP105 (no evaluation step was watched)")
    assert runs.python.err == ""


def test_json_report(runs):
    report = json.loads((runs.folder / "report.json").read_text())
    assert_schema(report)
    assert report["schema"] == "ampcheck/1"
    assert report["ampcheck"] == ampcheck.__version__
    assert report["torch"] == torch.__version__
    assert report["precision"]["mode"] == "mixed"
    assert re.fullmatch(r"the autocast region at train\.py:\d+", report["precision"]["source"])
    assert [finding["code"] for finding in report["findings"]] == ["AMP301"]
    assert report["not_judged"] == [{"code": "AMP105", "reason": "no evaluation step was watched"}]
    assert report["failure"] is None
    assert all(0 < module.pop("headroom_bits") < 24 for module in report["modules"])
    assert report["modules"] == [
        {
            "name": "", "type": "Sequential", "parameters": {}, "buffers": {}, "calls": 2, "autocast": "float16",
            "inputs": ["float32"], "outputs": ["float16"],
        },
        {
            "name": "0", "type": "Linear", "parameters": {"float32": 2}, "buffers": {}, "calls": 2,
            "autocast": "float16", "inputs": ["float32"], "outputs": ["float16"],
        },
    ]  # fmt: skip


def test_json_report_of_a_failure(runs):
    report = json.loads((runs.folder / "failed.json").read_text())
    assert_schema(report)
    (finding,) = (finding for finding in report["findings"] if finding["code"] == "AMP102")
    assert finding["severity"] == "error"
    assert finding["module"] == "0"
    assert {site["file"] for site in finding["sites"]} == {"fails.py"}
    assert report["failure"]["type"] == "SystemError"
    assert report["failure"]["message"] == "training stopped"


def test_traceback_is_the_scripts_with_the_note_at_its_end(runs):
    assert runs.ampcheck_fails.out == runs.python_fails.out == "before\n"
    assert runs.ampcheck_fails.status == runs.python_fails.status == 1
    shown = runs.ampcheck_fails.err
    assert "Traceback (most recent call last):" in shown
    traceback = shown[shown.index("Traceback") :]
    traceback, _, note = traceback.partition("\nampcheck: what is known of this failure\n")
    assert without_carets(traceback) == without_carets(runs.python_fails.err)
    assert note.startswith("error[AMP102] autocast-bad-argument: ") or "error[AMP102]" in shown
    assert not re.search(r'File ".*(ampcheck|runpy|core)/', shown)


def without_carets(traceback: str) -> list[str]:
    """The lines of a traceback but for PyTorch's frames, which differ where hooks are called."""
    lines = [line for line in traceback.rstrip().splitlines() if not re.fullmatch(r"[\s~^]+", line)]
    kept, skip = [], False
    for line in lines:
        if line.startswith("  File "):
            skip = "/torch/" in line
        elif not line.startswith("    "):
            skip = False
        if not skip:
            kept.append(line)
    return kept


SCHEMA = {
    "schema": str,
    "ampcheck": str,
    "torch": str,
    "host": (dict, type(None)),
    "precision": dict,
    "findings": list,
    "not_judged": list,
    "failure": (dict, type(None)),
    "modules": list,
}
FINDING = {
    "code": str, "name": str, "severity": str, "message": str, "module": (str, type(None)), "sites": list,
    "evidence": dict, "fix": str, "host_fix": (str, type(None)),
}  # fmt: skip
SITE = {"role": str, "file": str, "line": int, "function": str}
MODULE = {
    "name": str, "type": str, "parameters": dict, "buffers": dict, "calls": int, "autocast": (str, type(None)),
    "inputs": list, "outputs": list,
}  # fmt: skip


def assert_schema(report):
    """The form of the JSON report; later versions may add fields."""
    for rows, form in (
        ([report], SCHEMA),
        (report["findings"], FINDING),
        ([site for finding in report["findings"] for site in finding["sites"]], SITE),
        (report["modules"], MODULE),
        (report["not_judged"], {"code": str, "reason": str}),
        ([report["failure"]] if report["failure"] else [], {"type": str, "message": str, "phase": str}),
    ):
        for row in rows:
            assert {name for name, kind in form.items() if not isinstance(row[name], kind)} == set(), row
    assert set(report["precision"]) >= {"mode", "device_type", "dtype", "scaler", "source"}
    for finding in report["findings"]:
        assert finding["severity"] in ("error", "warning", "info")
        assert {site["role"] for site in finding["sites"]} <= {"write", "save", "raise", "cast", "call"}


# In this process: what the programs below do does not depend on how Python was started.


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """``run("--json", "x", "train.py")`` in a folder of its own; a program's text is written to train.py first."""
    kept = sys.modules["__main__"]
    monkeypatch.setattr(sys, "path", ["/the/first", *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    # A process group that another test began has put its own here.
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.chdir(tmp_path)

    def run_main(*args, program=None):
        if program is not None:
            (tmp_path / "train.py").write_text(textwrap.dedent(program))
        sys.argv = ["ampcheck", *map(str, args)]
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return SimpleNamespace(status=left.value.code, out=out, err=err)

    yield run_main
    sys.modules["__main__"] = kept


WRONG = """
    import torch
    model = torch.nn.Linear(3, 2).to(torch.float64)
    for _ in range(10):
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    model.register_buffer("scale", torch.ones(2))
    print("trained")
"""

SCALED = """
    import torch
    model = torch.nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(10):
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    print("trained")
"""


@pytest.mark.parametrize(
    ("fail_on", "status", "out"),
    [("error", 3, ""), ("warning", 3, ""), ("never", 0, "trained\n"), (None, 0, "trained\n")],
)
def test_fail_on(run, fail_on, status, out):
    options = ["--fail-on", fail_on] if fail_on else []
    told = run("run", *options, "train.py", program=SCALED)
    assert (told.status, told.out) == (status, out)
    assert "error[AMP101]" in told.err
    assert "Traceback" not in told.err
    assert ("stopped by --fail-on" in told.err.splitlines()[-1]) == (status == 3)


def test_select_and_ignore(run):
    assert "AMP101" in run("run", "--select", "AMP1,AMP3", "--watch-steps", "2", "train.py", program=SCALED).err
    told = run("run", "--ignore", "AMP1", "--fail-on", "error", "train.py", program=SCALED)
    assert "AMP101" not in told.err
    assert told.status == 0


def test_module(run, tmp_path):
    package = tmp_path / "trainers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "run.py").write_text("import sys\nfrom . import __name__ as parent\nprint(parent, __name__, sys.argv)\n")
    told = run("run", "-m", "trainers.run", "--json", "mine", "-m")
    assert told.out == f"trainers __main__ {[str(package / 'run.py'), '--json', 'mine', '-m']}\n"
    assert told.status == 0


def test_module_whose_package_cannot_be_imported(run, tmp_path):
    package = tmp_path / "unfinished"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_dependency\n")
    (package / "run.py").write_text("")
    told = run("run", "-m", "unfinished.run")
    assert told.status == 1
    assert told.err.splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_dependency'"


def test_syntax_error_in_the_script(run):
    told = run("run", "train.py", program="x = 1\nreturn = 2\n")
    assert told.status == 1
    assert "train.py" in told.err
    assert "line 2" in told.err
    assert told.err.splitlines()[-1].startswith("SyntaxError: ")
    assert not any(ampcheck.source.lines.is_ours(file) for file in re.findall(r'File "(.*?)"', told.err))


@pytest.mark.parametrize(
    ("leaving", "status"),
    [
        ("sys.exit(7)", 7),
        ("sys.exit()", None),
        ("sys.exit('no data')", "no data"),
        ("raise SystemExit(0)", 0),
        ("pass", 0),
    ],
)
def test_exit_status_is_the_scripts(run, leaving, status):
    told = run("run", "train.py", program=f"import sys\n{leaving}\n")
    assert told.status == status
    assert told.out == ""


def test_script_that_trains_nothing_says_so(run, tmp_path):
    told = run("run", "--json", "report.json", "train.py", program="print('hello')")
    assert told.out == "hello\n"
    assert told.err == "ampcheck  nothing was judged: no training call of a module was seen\n"
    report = json.loads((tmp_path / "report.json").read_text())
    assert_schema(report)
    assert {row["code"] for row in report["not_judged"]} >= {"AMP101", "AMP201"}


def test_chained_exceptions_lose_our_frames_too(run):
    program = """
        import torch
        class Inner(torch.nn.Module):
            def forward(self, x):
                try:
                    return torch.autocast(device="cpu")
                except TypeError:
                    raise ValueError("second")
        torch.nn.Sequential(torch.nn.Linear(1, 1), Inner())(torch.ones(1, 1))
    """
    told = run("run", "train.py", program=program)
    assert told.status == 1
    assert "During handling of the above exception" in told.err
    files = re.findall(r'File "(.*?)"', told.err)
    assert files.count("train.py") + sum(file.endswith("/train.py") for file in files) >= 3
    assert not any(ampcheck.source.lines.is_ours(file) for file in files)


@pytest.mark.parametrize(
    ("args", "about"),
    [
        (["run"], "SCRIPT"),
        (["run", "missing.py"], "missing.py"),
        (["run", "-m", "no_such_module"], "no_such_module"),
        (["run", "-m", "no_such_package.run"], "no_such_package.run"),
        (["run", "-m", ".run"], ".run"),
        (["run", "."], "."),
        (["run", "--select", "AMP999", "train.py"], "AMP999"),
        (["run", "--ignore", "XYZ", "train.py"], "XYZ"),
        (["run", "--fail-on", "info", "train.py"], "info"),
        (["run", "--watch-steps", "-1", "train.py"], "-1"),
        (["run", "--watch-steps", "many", "train.py"], "--watch-steps"),
        (["run", "--json", "no/such/folder/report.json", "train.py"], "no/such/folder/report.json"),
        (["run", "--json", ".", "train.py"], "."),
        (["run", "--unknown", "train.py"], "--unknown"),
        (["explain", "AMP999"], "AMP999"),
        (["explain"], "code"),
        (["no-such-command"], "no-such-command"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_runs(run, args, about):
    told = run(*args, program="open('ran', 'w')")
    assert told.status == 2
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("ampcheck: ")
    assert about in line
    assert not Path("ran").exists()


def test_rules_are_listed(run):
    told = run("rules")
    assert told.status == 0
    assert re.findall(r"AMP\d{3}", told.out) == [rule.code for rule in RULES]


@pytest.mark.parametrize("name", ["AMP101", "amp101", "autocast-not-active"])
def test_explain(run, name):
    told = run("explain", name)
    assert told.status == 0
    assert all(text in told.out for text in ("AMP101", "autocast-not-active", "What it does", "References", "Fix"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_every_rule_can_be_explained(run, rule):
    told = run("explain", rule.code)
    assert told.status == 0
    assert rule.name in told.out


def test_doctor(run):
    told = run("doctor")
    assert told.status == 0
    assert torch.__version__ in told.out
    assert re.search(r"ampcheck\s+\d", told.out)
    assert {*HOSTS} <= set(re.findall(r"^\s*(\S+)", told.out, re.MULTILINE))


def test_help_and_no_arguments(run):
    told = run("--help")
    assert told.status == 0
    assert all(command in told.out for command in ("run", "rules", "explain", "doctor"))
    told = run("run", "--help")
    assert told.status == 0
    assert "--watch-steps" in told.out


# Two processes.

RANKS = """
import os, sys, datetime
import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank = dist.get_rank()
if len(sys.argv) > 1 and rank == 1:
    raise RuntimeError("rank 1 stops")
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
if rank == 1:
    model.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
for _ in range(2):
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(torch.ones(1, 3)).sum()
    loss.backward()
print(f"rank {rank} done", flush=True)
if len(sys.argv) == 1:
    dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(RANKS)
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    options = ["--standalone", "--nproc-per-node", "2"]
    ours = ["-m", "ampcheck", "run", "--ignore", "AMP107"]
    started = [
        Running(torchrun, *options, *ours, "--json", "report.json", "train.py", cwd=folder),
        Running(torchrun, *options, *ours, "train.py", "die", cwd=folder),
    ]
    results = [running.result(timeout=120) for running in started]
    return SimpleNamespace(folder=folder, sound=results[0], dying=results[1])


def test_findings_of_both_ranks_are_told_once(ranks):
    assert ranks.sound.status == 0, ranks.sound.err
    assert sorted(re.findall(r"rank \d done", ranks.sound.out)) == ["rank 0 done", "rank 1 done"]
    err = ranks.sound.err
    assert err.count("warning[AMP301]") == 1
    assert err.count("warning[AMP204]") == 1
    assert "(seen on rank 1 only)" in err
    assert err.count("ampcheck  mixed float16") == 1
    report = json.loads((ranks.folder / "report.json").read_text())
    assert [finding["code"] for finding in report["findings"]] == ["AMP204", "AMP301"]


def test_rank_that_dies_does_not_hang_the_other(ranks):
    assert ranks.dying.status != 0
    assert "rank 1 stops" in ranks.dying.err
    assert ranks.dying.out.strip() in ("rank 0 done", "")
