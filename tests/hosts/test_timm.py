"""timm's train script under `python -m ampcheck.integrations.timm`, training on scikit-learn's digits."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

import timm
from timm import utils

import ampcheck.integrations.timm
from ampcheck import RULES, AmpChecker, FindingsError
from ampcheck.integrations.timm import FIXES, install

HERE = Path(__file__).parent
SCRIPT = HERE / "timm_train.py"
SHIM = ("-m", "ampcheck.integrations.timm")
# Whether this machine computes natively in a dtype, and whether the first loss scale is too high, is not what these
# tests are about.
CHECKED = (*SHIM, "--ignore", "AMP107,AMP310")
BFLOAT16 = ("--amp", "--amp-dtype", "bfloat16")
SHORT = ("--images", "16", "--epochs", "1")


@dataclass
class Run:
    status: int
    stdout: str
    stderr: str
    directory: Path

    @property
    def lines(self) -> list[str]:
        """What AmpCheck said in one line each."""
        return [line.removeprefix("ampcheck  ") for line in self.stderr.splitlines() if line.startswith("ampcheck  ")]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.directory / "ampcheck.json").read_text())

    @property
    def findings(self) -> dict[str, dict[str, Any]]:
        return {finding["code"]: finding for finding in self.report["findings"]}


class Python:
    """Runs programs; see timm_runs.py."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.directory = directory
        self.count = 0

    def __call__(self, *command: str | Path, cwd: Path | None = None) -> Run:
        return self.all([command], cwd=cwd)[0]

    def all(
        self, commands: list[tuple[str | Path, ...]], envs: list[dict[str, str]] | None = None, cwd: Path | None = None
    ) -> list[Run]:
        self.count += 1
        programs, directories = [], []
        for i, command in enumerate(commands):
            directory = self.directory / f"run{self.count}-{i}"
            directory.mkdir()
            directories.append(directory)
            programs.append(
                {
                    "command": [str(word).replace("OUT", str(directory)) for word in command],
                    "cwd": str(cwd or directory),
                    "env": envs[i] if envs else {},
                    "stdout": str(directory / "stdout"),
                    "stderr": str(directory / "stderr"),
                }
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(programs) + "\n")
        self.process.stdin.flush()
        statuses = json.loads(self.process.stdout.readline())
        return [
            Run(status, (path / "stdout").read_text(), (path / "stderr").read_text(), path)
            for status, path in zip(statuses, directories, strict=True)
        ]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Python]:
    pytest.importorskip("timm.task", reason="this timm's train script is an older one")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "timm_runs.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
    )
    with process:
        yield Python(process, tmp_path_factory.mktemp("timm"))
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize(
    ("flags", "source", "precision", "watched"),
    [
        ("", "no --amp", "true float32 on cpu", "none under autocast"),
        (
            "--amp --amp-dtype bfloat16",
            "--amp --amp-dtype bfloat16",
            "mixed bfloat16 on cpu, loss scaling off",
            r"\d+ under autocast bfloat16",
        ),
        ("--amp", "--amp", "mixed float16 on cpu, loss scaling on", r"\d+ under autocast float16"),
        (
            "--model-ema --grad-accum-steps 2 --amp --amp-dtype=bfloat16 --model test_efficientnet",
            "--amp --amp-dtype bfloat16",
            "mixed bfloat16 on cpu, loss scaling off",
            r"\d+ under autocast bfloat16",
        ),
    ],
    ids=["float32", "bfloat16", "float16", "efficientnet"],
)
def test_a_healthy_run_is_three_lines(python: Python, flags: str, source: str, precision: str, watched: str) -> None:
    run = python(*CHECKED, SCRIPT, *SHORT, *flags.split(), "--output", "OUT")
    assert run.status == 0, run.stderr
    fit, training, evaluation = [line for line in run.lines if not line.startswith("not judged")]
    assert re.fullmatch(rf"{precision} · [\d.]+ [kM] parameters float32 · \d+ modules · no findings", fit)
    assert re.fullmatch(rf"watched training step · \d+ module calls, {watched} · no findings", training)
    assert re.fullmatch(rf"watched evaluation step · \d+ module calls, {watched} · no findings", evaluation)
    assert run.report["host"] == {"name": "timm", "version": timm.__version__}
    assert run.report["precision"]["source"] == source


def test_training_is_the_same_to_the_bit(python: Python) -> None:
    for flags in ((), BFLOAT16, ("--amp", "--grad-accum-steps", "2", "--model-ema")):
        alone, checked = python.all([(SCRIPT, *flags, "--output", "OUT"), (*SHIM, SCRIPT, *flags, "--output", "OUT")])
        assert alone.status == checked.status == 0
        assert alone.stdout.count("step ") == 20
        assert checked.stdout == alone.stdout
        ours = [text for text in checked.stderr.splitlines() if not re.match(r"ampcheck  |\w+\[AMP| {3}", text)]
        assert ours == alone.stderr.splitlines()
        assert (checked.directory / "last.pth.tar").read_bytes() == (alone.directory / "last.pth.tar").read_bytes()


def test_autocast_asked_for_and_not_active(python: Python) -> None:
    run = python(*CHECKED, SCRIPT, *SHORT, *BFLOAT16, "--fault", "amp-ignored", "--output", "OUT")
    assert run.status == 0
    finding = run.findings["AMP101"]
    assert finding["severity"] == "error"
    assert "--amp --amp-dtype bfloat16" in finding["message"]
    assert finding["host_fix"] == FIXES["AMP101"]
    assert "error[AMP101]" in run.stderr
    assert f"   timm  {FIXES['AMP101']}" in run.stderr


def test_another_dtype_than_asked_for(python: Python) -> None:
    run = python(*CHECKED, SCRIPT, *SHORT, *BFLOAT16, "--fault", "dtype", "--output", "OUT")
    finding = run.findings["AMP104"]
    assert finding["severity"] == "error"
    assert "bfloat16" in finding["message"]
    assert "float16" in finding["message"]


def test_low_precision_parameters_under_amp(python: Python) -> None:
    run = python(*CHECKED, SCRIPT, *SHORT, *BFLOAT16, "--fault", "low-precision", "--output", "OUT")
    finding = run.findings["AMP201"]
    assert finding["severity"] == "warning"
    assert "fc" in finding["message"] or "conv1" in finding["message"]
    assert "--model-dtype" in finding["host_fix"]
    assert "test_resnet" not in run.stdout


@pytest.mark.parametrize("fault", ["evaluation", "average"])
def test_evaluation_without_autocast(python: Python, fault: str) -> None:
    flags = (*BFLOAT16, "--fault", fault, "--model-ema")
    run = python(*CHECKED, SCRIPT, *SHORT, *flags, "--output", "OUT")
    assert run.findings["AMP105"]["severity"] == "warning"
    assert "validate(...)" in run.findings["AMP105"]["host_fix"]


def test_a_mistyped_autocast_in_the_loss(python: Python) -> None:
    flags = (SCRIPT, *SHORT, *BFLOAT16, "--fault", "autocast")
    alone, checked = python.all([flags, (*CHECKED, "--json", "OUT/report.json", *flags)])
    assert alone.status == checked.status == 1
    assert checked.stdout == alone.stdout
    shown = checked.stderr[checked.stderr.index("Traceback") :]
    assert "TypeError: autocast.__init__() got an unexpected keyword argument 'device'" in shown
    assert shown.count("Traceback") == 1
    # Under probes torch's own frames are others, so these are left out.
    theirs, ours = (
        [
            frame
            for frame in re.findall(r'File "(.*)", line (\d+), in (\S+)', text)
            if not frame[0].startswith(sys.prefix)
        ]
        for text in (alone.stderr, shown)
    )
    assert ours == [frame for frame in theirs if "runpy" not in frame[0]][-len(ours) :]
    assert [name for _, _, name in ours] == ["<module>", "main", "train_one_epoch", "forward"]
    typed = next(n for n, text in enumerate(SCRIPT.read_text().splitlines(), 1) if "autocast(device=" in text)
    assert ours[-1][:2] == (str(SCRIPT), str(typed))
    note = shown[shown.index("TypeError") :] if sys.version_info >= (3, 11) else checked.stderr
    assert "error[AMP102]" in note
    assert "device_type" in note
    report = json.loads((checked.directory / "report.json").read_text())
    assert report["failure"]["type"] == "TypeError"
    assert [finding["code"] for finding in report["findings"]] == ["AMP102"]
    site = report["findings"][0]["sites"][0]
    assert (Path(site["file"]).name, site["line"]) == ("timm_train.py", typed)


def test_an_interrupt_stays_the_script_s(python: Python) -> None:
    run = python(*SHIM, SCRIPT, *SHORT, "--fault", "interrupt")
    assert run.status == 1
    assert run.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "AMP" not in run.stderr[run.stderr.index("Traceback") :]


def test_a_compiled_model_is_watched_from_outside(python: Python) -> None:
    flags = (SCRIPT, *BFLOAT16, *SHORT, "--torchcompile", "eager", "--output", "OUT")
    alone, checked = python.all([flags, (*CHECKED, *flags)])
    assert checked.status == 0
    assert checked.stdout == alone.stdout
    assert "warn" not in checked.stderr.lower().replace("no findings", "")
    assert (checked.directory / "last.pth.tar").read_bytes() == (alone.directory / "last.pth.tar").read_bytes()
    assert "compiled" in " ".join(entry["reason"] for entry in checked.report["not_judged"])


def test_fail_on_stops_before_the_second_step(python: Python) -> None:
    run = python(*CHECKED, "--fail-on", "error", SCRIPT, *SHORT, *BFLOAT16, "--fault", "amp-ignored")
    assert run.status == 3
    assert run.stdout.count("step ") == 0
    assert "Traceback" not in run.stderr
    assert "AMP101" in run.stderr.splitlines()[-1]


def test_several_updates_are_watched(python: Python) -> None:
    one, two = python.all(
        [(*CHECKED, "--watch-steps", n, SCRIPT, "--images", "32", *BFLOAT16, "--output", "OUT") for n in "13"]
    )
    calls = [
        next(int(re.search(r"(\d+) module calls", line)[1]) for line in run.lines if "training" in line)
        for run in (one, two)
    ]
    assert calls[1] == 3 * calls[0]


def test_two_processes_report_once(python: Python) -> None:
    launched = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            *CHECKED,
            SCRIPT,
            *SHORT,
            *BFLOAT16,
            "--fault",
            "amp-ignored",
            "--output",
            python.directory / "two",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stderr.count("error[AMP101]") == 1
    assert launched.stderr.count("modules · ") == 1
    report = json.loads((python.directory / "two" / "ampcheck.json").read_text())
    assert [finding["code"] for finding in report["findings"]] == ["AMP101"]


def test_a_rank_that_fails_hangs_no_other(python: Python) -> None:
    env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first, second = python.all(
        [(*CHECKED, SCRIPT, "--epochs", "1", "--fault", "rank")] * 2,
        envs=[{**env, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"],
    )
    assert second.status == 1
    assert "have the same dtype" in second.stderr
    assert first.status == 1
    assert first.stderr.count("no findings") >= 1


def test_a_script_of_another_kind_is_watched_like_any(python: Python, tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text(
        textwrap.dedent("""
            import sys, torch
            model = torch.nn.Linear(4, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            def main():
                for _ in range(2):
                    optimizer.zero_grad()
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss = model(torch.ones(3, 4)).sum()
                    loss.backward()
                    optimizer.step()
                print(__name__, __file__, sys.argv)
                sys.exit(7)
            if __name__ == "__main__":
                main()
        """)
    )
    alone, checked = python.all([(script, "--x"), (*CHECKED, script, "--x")])
    assert checked.stdout == alone.stdout
    assert checked.status == alone.status == 7
    assert "other.py has no train_one_epoch()" in checked.stderr
    assert "1 under autocast bfloat16" in checked.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--select", "AMP999", str(SCRIPT)], "no rule's code begins with 'AMP999'"),
        (["--fail-on", "info", str(SCRIPT)], "fail_on must be"),
        (["--watch-steps", "-1", str(SCRIPT)], "watch_steps must be"),
        (["--json", "nowhere/report.json", str(SCRIPT)], "the report cannot be written to 'nowhere/report.json'"),
        (["missing.py"], "there is no script 'missing.py'"),
        (["--wach-steps", "2", str(SCRIPT)], "--wach-steps"),
        ([], "SCRIPT"),
    ],
)
def test_bad_input_is_one_line_and_status_2(python: Python, arguments: list[str], line: str) -> None:
    run = python(*SHIM, *arguments)
    assert run.status == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert line in run.stderr


def test_install_in_a_fork(python: Python, tmp_path: Path) -> None:
    source = SCRIPT.read_text().replace(
        '__main__":\n',
        '__main__":\n    import ampcheck.integrations.timm as check\n    check.install(ignore="AMP107")\n',
    )
    fork = tmp_path / "fork.py"
    fork.write_text(source.replace("Path(__file__).parents[1]", repr(str(HERE.parent))))
    run = python(fork, *SHORT, *BFLOAT16, "--fault", "evaluation", "--output", "OUT")
    assert run.status == 0, run.stderr
    assert list(run.findings) == ["AMP105"]


class Fork:
    """The functions of a fork, in this process: the words of its arguments are its own."""

    def __init__(self) -> None:
        names = ("test_resnet", "resnet10t")
        self.model = timm.create_model(next(name for name in names if timm.is_model(name)), num_classes=10)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = utils.NativeScaler()
        self.scaler._scaler = torch.amp.GradScaler("cpu")
        self.seen: list[str] = []

    def train_one_epoch(self, epoch, net, batches, opt, **options):
        for images in batches:
            with options["amp_autocast"]():
                loss = net(images).float().sum()
            self.seen.append(self.state())
            options["loss_scaler"](loss * options.get("factor", 1.0), opt)
            opt.zero_grad()
            self.seen.append(self.state())
        return epoch

    def validate(self, net, batches, amp_autocast):
        net.eval()
        with torch.no_grad(), amp_autocast():
            for images in batches:
                net(images)
                self.seen.append(self.state())

    def state(self) -> str:
        hooks = torch.nn.modules.module
        busy = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
        wrapped = {"step", "zero_grad"} & set(vars(self.optimizer)) or self.model._forward_hooks
        return "watched" if busy or wrapped else "free"

    def run(self, checker: AmpChecker, **options: Any) -> None:
        script = type(sys)("fork")
        script.train_one_epoch, script.validate = self.train_one_epoch, self.validate
        assert install(script, checker=checker) is checker
        images = torch.ones(2, 3, 32, 32)
        region = partial(torch.autocast, device_type="cpu", dtype=torch.float16)
        options = {"amp_autocast": region, "loss_scaler": self.scaler, **options}
        assert script.train_one_epoch(5, self.model, [images] * 3, opt=self.optimizer, **options) == 5
        script.validate(self.model, [images] * 2, region)


@pytest.fixture
def checker() -> Iterator[AmpChecker]:
    checker = AmpChecker(ignore="AMP107,AMP310", report=False)
    yield checker
    checker.detach()


def test_only_the_first_update_and_forward_are_watched(checker: AmpChecker) -> None:
    fork = Fork()
    fork.run(checker)
    assert fork.seen == ["watched"] + ["free"] * 7
    assert checker.report is not None
    assert checker.report.findings == ()
    assert str(checker.report.trace.precision) == "mixed float16 on cpu, loss scaling on"
    assert checker.report.trace.precision.source == "the script's `amp_autocast`"


def test_steady_state_calls_nothing_of_ours(checker: AmpChecker) -> None:
    ours = (str(Path(ampcheck.__file__).parent), str(Path(ampcheck.integrations.timm.__file__).parent))
    called: list[str] = []

    class Profiled(Fork):
        def state(self) -> str:
            # From the end of the first update on, until evaluation.
            sys.setprofile(record if len(self.seen) in range(1, 5) else None)
            return super().state()

    def record(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ours):
            called.append(frame.f_code.co_name)

    fork = Profiled()
    try:
        fork.run(checker)
    finally:
        sys.setprofile(None)
    assert called == []
    sys.setprofile(record)
    checker.detach()
    sys.setprofile(None)
    assert "detach" in called


def test_a_skipped_update_ends_with_its_gradients(checker: AmpChecker) -> None:
    fork = Fork()
    fork.run(checker, factor=float("inf"))
    assert fork.seen == ["watched"] + ["free"] * 7


def test_copies_and_pickles_during_a_watch(checker: AmpChecker) -> None:
    fork = Fork()
    states = []

    class Copying(Fork):
        def state(self) -> str:
            twin = pickle.loads(pickle.dumps(copy.deepcopy(self.model)))
            with torch.no_grad():
                twin(torch.ones(2, 3, 32, 32))
            assert "step" not in vars(copy.deepcopy(self.optimizer))
            assert not set(map(type, twin._forward_hooks.values())) & set(map(type, self.model._forward_hooks.values()))
            states.append(super().state())
            return states[-1]

        def validate(self, net, batches, amp_autocast):
            states.append(self.state())
            super().validate(net, batches, amp_autocast)

    fork = Copying()
    fork.run(checker)
    assert states[0] == "watched"
    assert states[6] == "watched"
    assert states[-1] == "free"
    assert checker.report is not None
    assert checker.report.findings == ()


def test_an_exception_passes_as_it_was(checker: AmpChecker) -> None:
    class Failing(Fork):
        def validate(self, net, batches, amp_autocast):
            raise failure

    failure = RuntimeError("mat1 and mat2 must have the same dtype, but got Half and Float")
    fork = Failing()
    with pytest.raises(RuntimeError) as caught:
        fork.run(checker)
    assert caught.value is failure
    assert failure.args == ("mat1 and mat2 must have the same dtype, but got Half and Float",)
    assert failure.__cause__ is None
    assert fork.state() == "free"


def test_a_finding_stops_a_fork_where_it_was_asked_to() -> None:
    fork = Fork()
    fork.model.half()
    checker = AmpChecker(select="AMP201", fail_on="error", report=False)
    with pytest.raises(FindingsError, match="AMP201"):
        fork.run(checker)
    assert fork.seen == []
    checker.detach()


def test_install_takes_a_checker_or_options() -> None:
    with pytest.raises(ValueError, match="ignore"):
        install(checker=AmpChecker(), ignore="AMP107")


def test_install_before_the_functions_is_one_line(caplog: pytest.LogCaptureFixture, checker: AmpChecker) -> None:
    install(type(sys)("fork"), checker=checker)
    assert [record.getMessage() for record in caplog.records] == [
        "ampcheck  fork defines no train_one_epoch() yet, so it is not checked"
    ]


def test_fixes_are_for_rules_and_their_flags_exist() -> None:
    assert {code.partition(":")[0] for code in FIXES} <= {rule.code for rule in RULES}
    for module, name in re.findall(r"`(timm\.\w+)\.(\w+)", " ".join(FIXES.values())):
        assert hasattr(importlib.import_module(module), name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
