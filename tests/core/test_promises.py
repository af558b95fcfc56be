"""The promises: each a test that can fail, and where it is not plain that it can, a test of that too."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import io
import pathlib
import pickle
import subprocess
import sys
import textwrap
import traceback

import pytest
import torch
from loops import CNN, MACHINE, Block, batches, evaluate, found, random_state, same, sgd, traces_left, train
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import ampcheck
from ampcheck import checker as checker_module
from ampcheck.observe.probes.aliases import AliasProbe
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.graph import GraphProbe
from ampcheck.observe.probes.modules import ModuleProbe
from ampcheck.rules import RULES

RECIPES = {
    "fp16": (CNN, sgd, torch.float16, True),
    "bf16": (CNN, sgd, torch.bfloat16, False),
    "fp32": (CNN, sgd, None, False),
    "transformer-bf16": (Block, lambda model: torch.optim.AdamW(model.parameters()), torch.bfloat16, False),
    "transformer-fp16": (Block, lambda model: torch.optim.AdamW(model.parameters()), torch.float16, True),
}


def result(recipe, guard=None, *, steps=20, on_start=lambda: None):
    """Train and evaluate by a recipe from one seed; all that must not depend on AmpCheck."""
    make, optimize, dtype, scaled = RECIPES[recipe]
    torch.manual_seed(1)
    model = make()
    optimizer = optimize(model)
    scaler = torch.amp.GradScaler("cpu", growth_interval=5) if scaled else None
    with guard(model, optimizer, scaler) if guard else contextlib.nullcontext():
        on_start()
        losses = train(model, optimizer, steps=steps, dtype=dtype, scaler=scaler)
        evaluated = evaluate(model, None if make is Block else dtype)
        losses += train(model, optimizer, steps=2, dtype=dtype, scaler=scaler)
    return {
        "losses": losses,
        "evaluated": evaluated,
        "model": model.state_dict(),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
        "random": random_state(),
    }


@pytest.fixture(scope="module")
def alone():
    """The results without AmpCheck, computed once."""
    results = {}

    def of(recipe):
        if recipe not in results:
            torch.manual_seed(0)
            results[recipe] = result(recipe)
        return results[recipe]

    return of


def watched(told, **options):
    def guard(model, optimizer, scaler):
        options.setdefault("ignore", MACHINE)
        return ampcheck.watch(model, optimizer=optimizer, scaler=scaler, emit=told.append, **options)

    return guard


# 1. Bit-identical training.


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_the_same_to_the_bit(recipe, alone):
    told = []
    with_ampcheck = result(recipe, watched(told, watch_steps=2))
    assert sum("watched" in line for line in told) == 2
    for name, value in alone(recipe).items():
        assert same(value, with_ampcheck[name]), name


def test_comparison_sees_one_bit_and_one_random_number(alone):
    expected = alone("bf16")
    moved = copy.deepcopy(expected["model"])
    weight = moved["conv.weight"].view(torch.int32)
    weight[0, 0, 0, 0] ^= 1
    assert not same(expected["model"], moved)
    other = result("bf16", on_start=lambda: torch.rand(1))
    assert not same(expected["random"], other["random"])
    assert not same(expected["losses"], other["losses"])


# 2. It never makes training fail.


class Fault(Exception):
    """What is injected."""


def raising(*args, **kwargs):
    raise Fault("injected")


def inside(owner, name):
    """``owner.name`` with the fault inside of what contains it, as a bug in its body would be."""
    function = owner.__dict__[name]
    if not hasattr(function, "__wrapped__"):
        return raising
    rewrapped = type(function)(
        function.__code__, function.__globals__, name, function.__defaults__,
        tuple(
            cell if cell.cell_contents is not function.__wrapped__ else type(cell)(raising)
            for cell in function.__closure__
        ),
    )  # fmt: skip
    rewrapped.__kwdefaults__ = function.__kwdefaults__
    return rewrapped


CALLBACKS = [
    *((AutocastProbe, name) for name in ("_made", "_entered", "_left", "__enter__", "__exit__")),
    *((ModuleProbe, name) for name in ("__enter__", "__exit__")),
    *((GraphProbe, name) for name in ("_begins", "_ended")),
]


def assert_goes_on(recipe, alone, told, **options):
    __tracebackhide__ = True
    with_fault = result(recipe, watched(told, **options))
    for name, value in alone(recipe).items():
        assert same(value, with_fault[name]), name
    (warning,) = [line for line in told if "internal-error" in line]
    assert warning.startswith("warning[AMP900] internal-error: ")
    assert "Fault: injected" in warning


@pytest.mark.parametrize(("owner", "name"), [c for c in CALLBACKS if not c[1].startswith("__")], ids=str)
def test_fault_in_a_probe(owner, name, monkeypatch, alone):
    monkeypatch.setattr(owner, name, inside(owner, name))
    told: list[str] = []
    assert_goes_on("bf16", alone, told)


@pytest.mark.parametrize("when", ["entered", "left"])
def test_fault_in_the_code_of_a_module_call(when, monkeypatch, alone):
    """It is no function of ours that could be broken: what it uses is."""

    class Broken(list):
        append = raising if when == "entered" else list.append
        pop = raising if when == "left" else list.pop

    class Local:
        @property
        def stack(self):
            return Broken()

    monkeypatch.setattr("ampcheck.observe.probes.modules._Local", Local)
    assert_goes_on("bf16", alone, [])


@pytest.mark.parametrize("name", ["data", "numpy"])
def test_fault_where_an_alias_is_made(name, monkeypatch):
    monkeypatch.setattr(AliasProbe, "_note", raising)
    told: list[str] = []
    model = CNN()
    with ampcheck.watch(model, emit=told.append) as watch:
        loss = model(torch.ones(2, 1, 8, 8)).sum()
        alias = loss.detach()
        _ = alias.data if name == "data" else alias.numpy()
        loss.backward()
    assert found(watch.report) == {"AMP900": "warning"}


@pytest.mark.parametrize("owner", [ModuleProbe, GraphProbe, AliasProbe])
@pytest.mark.parametrize("name", ["__init__", "__enter__"])
def test_fault_in_setting_up_a_probe(owner, name, monkeypatch, alone):
    monkeypatch.setattr(owner, name, raising)
    assert_goes_on("bf16", alone, [])


@pytest.mark.parametrize("owner", [ModuleProbe, GraphProbe, AliasProbe])
def test_fault_in_removing_a_probe(owner, monkeypatch, alone):
    leave = owner.__exit__

    def leave_and_raise(self, *exc):
        leave(self, *exc)
        raising()

    monkeypatch.setattr(owner, "__exit__", leave_and_raise)
    assert_goes_on("bf16", alone, [])


@pytest.mark.parametrize("code", [rule.code for rule in RULES if rule.code != "AMP900"])
def test_fault_in_a_rule(code, alone, monkeypatch):
    broken = tuple(dataclasses.replace(rule, judge=raising, needs=()) if rule.code == code else rule for rule in RULES)
    monkeypatch.setattr("ampcheck.rules.judging.RULES", broken)
    told: list[str] = []
    model = nn.Linear(3, 2)
    with ampcheck.watch(model, optimizer=sgd(model), emit=told.append) as watch:
        model(torch.ones(1, 3)).sum().backward()
    assert found(watch.report) == {"AMP900": "warning"}
    assert len([line for line in told if "AMP900" in line]) == 1


@pytest.mark.parametrize(
    "name",
    [
        "walk",
        "environment",
        "examine_optimizer",
        "unwrapped",
        "judge",
        "gather",
        "fit_line",
        "step_line",
        "WatchedStep",
    ],
)
def test_fault_in_the_checkers_parts(name, monkeypatch, alone):
    if name == "judge":
        real, calls = checker_module.judge, []

        def judge(trace, rules):
            calls.append(trace)
            return raising() if len(calls) == 1 else real(trace, rules)

        monkeypatch.setattr(checker_module, name, judge)
    else:
        monkeypatch.setattr(checker_module, name, raising)
    assert_goes_on("bf16", alone, [])


@pytest.mark.parametrize("name", ["_alive", "autocast_state", "dtype_name"])
def test_fault_in_the_watch(name, monkeypatch, alone):
    monkeypatch.setattr(f"ampcheck.loops.watch.{name}", raising)
    torch.manual_seed(0)
    told: list[str] = []

    def guard(model, optimizer, scaler):
        return ampcheck.watch(model, optimizer=None, scaler=scaler, emit=told.append, ignore=MACHINE)

    recipe = "fp32" if name == "dtype_name" else "bf16"
    with_fault = result(recipe, guard)
    for key, value in alone(recipe).items():
        assert same(value, with_fault[key]), key


def test_fault_in_what_the_watch_says_before_attaching(monkeypatch, capfd):
    """The fault comes before the host's ``emit`` is known: standard error has the one warning."""
    monkeypatch.setattr("ampcheck.loops.watch._alive", raising)
    model = CNN()
    with ampcheck.watch(model) as watch:
        train(model, sgd(model))
    assert found(watch.report) == {"AMP900": "warning"}
    assert capfd.readouterr().err.count("AMP900]") == 1


def test_fault_in_emit(alone):
    """Nothing can be said any more, but by Python's own warning."""

    def guard(model, optimizer, scaler):
        return ampcheck.watch(model, optimizer=optimizer, scaler=scaler, emit=raising)

    with pytest.warns(RuntimeWarning) as caught:
        with_fault = result("bf16", guard)
    assert [str(w.message) for w in caught if "AmpCheck" in str(w.message)] == [
        "AmpCheck switched itself off: Fault: injected"
    ]
    for name, value in alone("bf16").items():
        assert same(value, with_fault[name]), name


def test_report_that_cannot_be_written(alone, tmp_path):
    (tmp_path / "file").write_text("")
    told: list[str] = []
    with_fault = result("bf16", watched(told, report=tmp_path / "file" / "report.json"))
    for name, value in alone("bf16").items():
        assert same(value, with_fault[name]), name
    assert len([line for line in told if "could not be written" in line]) == 1
    assert not any("AMP900" in line for line in told)


def test_fault_while_diagnosing(monkeypatch):
    monkeypatch.setattr(checker_module, "examine", raising)
    told: list[str] = []
    model = CNN()
    error = ZeroDivisionError("the user's")
    with pytest.raises(ZeroDivisionError) as caught, ampcheck.watch(model, emit=told.append):  # noqa: PT012
        train(model, sgd(model), steps=1)
        raise error
    assert caught.value is error
    assert len([line for line in told if "AMP900" in line]) == 1


def test_selection_does_not_silence_a_fault(monkeypatch):
    monkeypatch.setattr(checker_module, "walk", raising)
    told: list[str] = []
    ampcheck.AmpChecker(select="AMP1", ignore="AMP9").attach(CNN(), emit=told.append)
    assert len(told) == 1
    assert told[0].startswith("warning[AMP900]")


def test_switched_off_stays_off(monkeypatch):
    """A host attaches again when the scaler is known, and diagnoses and detaches: one warning it is."""
    told: list[str] = []
    checker = ampcheck.AmpChecker(report=False)
    with monkeypatch.context() as patched:
        patched.setattr(checker_module, "walk", raising)
        assert checker.attach(CNN(), emit=told.append) is None
    assert checker.attach(CNN(), emit=told.append) is None
    assert not checker.watching
    with checker.training_step(), checker.evaluation_step():
        pass
    checker.diagnose(RuntimeError("expected scalar type Float but found Half"))
    checker.detach()
    assert len(told) == 1


def test_after_a_fault_the_next_run_is_watched(monkeypatch):
    told: list[str] = []
    checker = ampcheck.AmpChecker(report=False, ignore=MACHINE)
    with monkeypatch.context() as patched:
        patched.setattr(checker_module, "walk", raising)
        checker.attach(CNN(), emit=told.append)
    checker.detach()
    report = checker.attach(CNN(), emit=told.append)
    assert checker.watching
    assert report.findings == ()
    checker.detach()


@pytest.mark.parametrize(("owner", "name"), [(GraphProbe, "_begins"), (AutocastProbe, "_made")])
def test_fault_that_is_not_contained_would_end_training(owner, name, monkeypatch):
    """That the faults above can be seen: the same, thrown past what contains them."""
    monkeypatch.setattr(owner, name, raising)
    model = CNN()
    checker = ampcheck.AmpChecker(report=False)
    checker.attach(model, emit=lambda text: None)
    with pytest.raises(Fault), checker.training_step():
        train(model, sgd(model), steps=1)
    checker.detach()


def test_fault_that_is_not_caught_would_end_training(monkeypatch):
    monkeypatch.setattr(ampcheck.watch, "_contained", lambda self, hook: hook)
    monkeypatch.setattr("ampcheck.loops.watch._alive", raising)
    with pytest.raises(Fault):
        result("bf16", lambda model, *_: ampcheck.watch(model))


# 3. The user's exception is theirs.


class Wrong(nn.Module):
    """Fails in its second forward by a dtype that autocast does not mend."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 10)

    def forward(self, images):
        x = self.body(images.flatten(1))
        with torch.autocast("cpu", enabled=False):
            return self.cause(x)

    def cause(self, x):
        try:
            return x.to(torch.float64) @ self.body.weight
        except RuntimeError as error:
            raise RuntimeError(*error.args) from ValueError("the cause")


def frames(error):
    """File, line and name of the frames, without those of PyTorch, which differ where hooks are called."""
    return [
        (frame.filename, frame.lineno, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename
    ]


def frames_of_ours(error):
    return [
        frame for frame in traceback.extract_tb(error.__traceback__) if ampcheck.source.lines.is_ours(frame.filename)
    ]


def failing(guard):
    model = Wrong()
    optimizer = sgd(model)
    with guard(model, optimizer):
        train(model, optimizer, steps=1)


def caught_from(guard):
    try:
        failing(guard)
    except RuntimeError as error:
        return error
    raise AssertionError("nothing was raised")


def test_exception_is_the_users_own():
    told: list[str] = []
    plain = caught_from(lambda *_: contextlib.nullcontext())
    error = caught_from(lambda m, o: ampcheck.watch(m, optimizer=o, emit=told.append))
    assert type(error) is RuntimeError
    assert error.args == plain.args
    assert isinstance(error.__cause__, ValueError)
    assert error.__cause__.args == ("the cause",)
    assert type(error.__context__) is type(plain.__context__)
    assert error.__suppress_context__
    assert frames(error) == frames(plain)
    assert [f.name for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename][-1] == "cause"
    assert frames(error.__context__) == frames(plain.__context__)


def test_same_object_passes_through():
    error = KeyError("mine")

    class Raises(nn.Module):
        def forward(self, x):
            raise error

    model = nn.Sequential(Raises())
    with pytest.raises(KeyError) as caught, ampcheck.watch(model, emit=lambda text: None):
        model(torch.ones(1))
    assert caught.value is error
    assert not getattr(error, "__notes__", [])
    assert not frames_of_ours(error)


class Typo(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, x):
        with torch.autocast(device="cpu"):
            return self.body(x)


def fails_in(model, checker, told):
    """As a host does: the step inside the probes, the failure diagnosed, and raised on."""
    checker.attach(model, emit=told.append)
    try:
        with checker.training_step():
            model(torch.ones(1, 2))
    except TypeError as error:
        checker.diagnose(error)
        raise


def test_note_is_attached_once():
    told: list[str] = []
    checker = ampcheck.AmpChecker(report=False)
    with pytest.raises(TypeError) as caught:
        fails_in(Typo(), checker, told)
    for phase in ("training_step", "fit", "run"):
        checker.diagnose(caught.value, phase=phase)
        ampcheck.AmpChecker(report=False).diagnose(caught.value)
    checker.detach()
    (note,) = caught.value.__notes__
    assert note.startswith("ampcheck: what is known of this failure\nerror[AMP102]")
    # Where Python shows no notes, one line of the log has it.
    logged = [text for text in told if "AMP102" in text]
    assert len(logged) == (0 if hasattr(BaseException, "add_note") else 1)
    assert not frames_of_ours(caught.value)


def test_traceback_through_every_wrapper_has_no_frame_of_ours():
    """A region that cannot be made, an op that fails, a module that fails, inside one another."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(x) + torch.ones(3)

    model = Net()
    told: list[str] = []
    with pytest.raises(RuntimeError) as caught, ampcheck.watch(model, emit=told.append):
        model(torch.ones(1, 2))
    assert not frames_of_ours(caught.value)
    assert frames(caught.value)[-1][2] == "forward"


@pytest.mark.parametrize("leaving", [KeyboardInterrupt(), SystemExit(7), GeneratorExit()])
def test_what_is_no_failure_passes_without_a_note(leaving):
    model = CNN()
    told: list[str] = []
    with pytest.raises(type(leaving)) as caught, ampcheck.watch(model, emit=told.append):  # noqa: PT012
        train(model, sgd(model), steps=1)
        raise leaving
    assert caught.value is leaving
    assert not getattr(leaving, "__notes__", [])


# 4. Nothing stays behind. (Every test of this folder checks it at its end, see conftest.)


class Stops(nn.Module):
    """Raises where it is told to: in forward, in backward, or in the optimizer's step."""

    def __init__(self, where, error):
        super().__init__()
        self.body = CNN()
        self.where, self.error = where, error

    def forward(self, images):
        output = self.body(images)
        if self.where == "forward":
            raise self.error
        if self.where == "backward":
            output.register_hook(self.stop)
        return output

    def stop(self, *_):
        raise self.error


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=["Exception", "KeyboardInterrupt"])
@pytest.mark.parametrize("where", ["forward", "backward", "step"])
@pytest.mark.parametrize("leave", ["watch", "step"])
def test_nothing_stays_after_a_failure(where, error, leave):
    before = traces_left()
    model = Stops(where, error)
    optimizer = sgd(model)
    if where == "step":
        optimizer.register_step_pre_hook(model.stop)
    checker = ampcheck.AmpChecker(report=False)
    told: list[str] = []
    if leave == "watch":
        guard = ampcheck.watch(model, optimizer=optimizer, emit=told.append)
    else:
        checker.attach(model, optimizers=[optimizer], emit=told.append)
        guard = checker.training_step()
    with pytest.raises(type(error)) as caught, guard:
        train(model, optimizer, steps=1)
    assert caught.value is error
    assert traces_left() == before


def test_failure_in_evaluation_is_the_users_own():
    """PyTorch calls some hooks while the exception passes: none may be removed under its feet."""
    model = CNN()
    optimizer = sgd(model)
    told: list[str] = []
    before = traces_left()
    watch = ampcheck.watch(model, optimizer=optimizer, emit=told.append)
    with pytest.raises(RuntimeError, match="channels"), watch:  # noqa: PT012
        train(model, optimizer)
        model.eval()
        with torch.no_grad():
            model(torch.ones(1, 3, 8, 8))
    assert traces_left() == before


def test_evaluation_that_fails_and_is_tried_again():
    model = CNN()
    optimizer = sgd(model)
    with ampcheck.watch(model, optimizer=optimizer, emit=lambda text: None, ignore=MACHINE) as watch:
        train(model, optimizer)
        model.eval()
        autocast, no_grad = torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad()
        with autocast, no_grad, pytest.raises(RuntimeError, match="channels"):
            model(torch.ones(1, 3, 8, 8))
        evaluate(model)
        assert not torch.nn.modules.module._global_forward_hooks
    assert watch.report.trace.evaluation.calls
    assert watch.report.findings == ()


def test_nothing_stays_after_the_watched_steps():
    model = CNN()
    optimizer = sgd(model)
    before = traces_left()
    during = []
    with ampcheck.watch(model, optimizer=optimizer, emit=lambda text: None):
        images, labels = next(batches(1))
        loss = F.cross_entropy(model(images), labels)
        during.append(traces_left())
        loss.backward()
        optimizer.step()
        evaluate(model)
        during.append(traces_left())
        train(model, optimizer, steps=1)
        assert traces_left() == before
    assert all(state != before for state in during[:1]), "the probes would have been seen"


def test_hooks_of_others_live_through_the_watch():
    """Global hooks that the user adds and removes in between are the user's."""
    model = CNN()
    optimizer = sgd(model)
    calls: list[str] = []
    first = register_optimizer_step_post_hook(lambda *_: calls.append("before"))
    with ampcheck.watch(model, optimizer=optimizer, emit=lambda text: None):
        second = register_optimizer_step_post_hook(lambda *_: calls.append("inside"))
        third = nn.modules.module.register_module_forward_hook(lambda *_: calls.append("module"))
        train(model, optimizer, steps=2)
    assert calls.count("before") == calls.count("inside") == 2
    assert calls.count("module") == 14
    for handle in (first, second, third):
        handle.remove()


def contents(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return {
        "state_dict": model.state_dict(),
        "deepcopy": copy.deepcopy(model).state_dict(),
        "pickle": pickle.dumps(model),
        "torch.save": len(buffer.getvalue()),
        "keys": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


class Saved(nn.Module):
    """Looks at itself in the middle of its own forward."""

    def __init__(self):
        super().__init__()
        self.body = CNN()

    def forward(self, images):
        out = self.body(images)
        seen.append(contents(self))
        return out


seen: list[dict] = []


def test_model_can_be_saved_and_copied_during_a_watch():
    seen.clear()
    model = Saved().eval()
    model.train()
    images, _ = next(batches(1))
    model.body.norm.track_running_stats = False
    model(images)
    with ampcheck.watch(model, emit=lambda text: None):
        model(images)
    model(images)
    outside, during, after = seen
    assert same(outside, during)
    assert same(outside, after)


# 6. Offline.


def test_no_socket_is_made():
    program = textwrap.dedent(
        """
        import socket
        import torch
        made = []
        def refuse(*args, **kwargs):
            made.append(args)
            raise OSError("offline")
        socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refuse
        import ampcheck
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ampcheck.watch(model, optimizer=optimizer, report="/dev/null"):
            for _ in range(2):
                model(torch.ones(1, 3)).sum().backward()
                optimizer.step()
            model.eval()
            model(torch.ones(1, 3))
        assert not made
        try:
            socket.socket()
        except OSError:
            assert made, "a socket would have been seen"
            print("offline")
        """
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert run.stdout == "offline\n", run.stderr


# 8. No false alarm.


class Island(nn.Module):
    """Deliberately computes its loss scale in float32."""

    def __init__(self):
        super().__init__()
        self.body = CNN()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("used", torch.ones(10, dtype=torch.bool))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, images):
        self.seen += 1
        logits = self.body(images)
        with torch.autocast("cpu", enabled=False):
            return logits.float() * self.temperature


def frozen_half_backbone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16).to(torch.bfloat16), nn.ReLU(), nn.Linear(16, 10))
    model[1].requires_grad_(False)
    return model


class TrueBf16(CNN):
    def forward(self, images):
        return super().forward(images.to(torch.bfloat16))


LOOK_ALIKES = {
    "float32 island": (Island, torch.bfloat16, None),
    "true bfloat16": (lambda: TrueBf16().to(torch.bfloat16), None, None),
    "disabled scaler": (CNN, torch.bfloat16, lambda: torch.amp.GradScaler("cpu", enabled=False)),
    "disabled scaler, float32": (CNN, None, lambda: torch.amp.GradScaler("cpu", enabled=False)),
    "frozen half backbone": (frozen_half_backbone, torch.bfloat16, None),
    "float16 with a scaler": (CNN, torch.float16, lambda: torch.amp.GradScaler("cpu")),
    "transformer": (Block, torch.bfloat16, None),
    "float32": (CNN, None, None),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_healthy_look_alikes(name):
    make, dtype, scaler = LOOK_ALIKES[name]
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scaler = scaler and scaler()
    with ampcheck.watch(
        model, optimizer=optimizer, scaler=scaler, emit=lambda text: None, ignore=MACHINE, report=False
    ) as watch:
        train(model, optimizer, dtype=dtype, scaler=scaler if scaler and scaler.is_enabled() else None)
        if make is not Block:
            evaluate(model, dtype)
    assert [f for f in watch.report.findings if f.severity > ampcheck.Severity.INFO] == []
    assert not {f.code for f in watch.report.findings} - {"AMP110"}


# 9. Models with in-place activations live.


class InPlaceResidual(nn.Module):
    """In-place activation of a module's output, which full backward hooks do not survive."""

    def __init__(self):
        super().__init__()
        self.body = CNN()
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(10, 10)

    def forward(self, images):
        x = self.body(images)
        return self.head(self.act(x.add_(1)))


def test_in_place_activations_of_module_outputs():
    model = InPlaceResidual()
    optimizer = sgd(model)
    with ampcheck.watch(model, optimizer=optimizer, emit=lambda text: None, ignore="AMP107,AMP105") as watch:
        train(model, optimizer, dtype=None)
    assert watch.report.findings == ()
    handles = [module.register_full_backward_hook(lambda *_: None) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"BackwardHookFunction.* is a view"):
        train(model, optimizer, dtype=None)
    for handle in handles:
        handle.remove()


def test_core_registers_no_backward_hook():
    files = list(pathlib.Path(ampcheck.__file__).resolve().parent.rglob("*.py"))
    assert len(files) > 20
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Attribute, ast.Name))
    }
    assert "on_module_calls" in names
    assert not [name for name in names if name.startswith("register_") and "backward_hook" in name]
    assert not [name for name in names if name.startswith("register_module_")]
