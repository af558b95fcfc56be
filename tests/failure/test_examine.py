"""From an exception to a ``Failure``: on messages that this torch really raises."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from crashes import CRASHES, Crash
from torch import nn

from ampcheck.failure import SIGNATURES, examine
from ampcheck.failure.autocast_call import autocast_call
from ampcheck.failure.dtypes import canonical
from ampcheck.failure.operation import custom_function_state
from ampcheck.failure.scaling import low_precision_gradients, missing_gradients, scaler_argument, scaler_order
from ampcheck.trace import (
    DtypeMismatch,
    Failure,
    FusedOptimizerClipping,
    InPlaceDtype,
    OperationFailure,
    OpNotImplemented,
    ScalerWithoutBfloat16,
    UnsafeLoss,
)


def raised(run: Crash) -> BaseException:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run()
        except BaseException as error:  # noqa: BLE001 (it is what is examined)
            return error
    raise AssertionError("nothing was raised")


def examined(run: Crash, model: nn.Module | None = None, phase: str = "training_step") -> Failure:
    failure = examine(raised(run), model=model, phase=phase, step=3)
    assert failure.internal_error is None, failure.internal_error
    return failure


def kind_of(failure: Failure) -> type | None:
    return None if failure.facts is None else type(failure.facts)


@pytest.mark.parametrize(
    ("kind", "expected", "run"), [entry[1:] for entry in CRASHES], ids=[entry[0] for entry in CRASHES]
)
def test_recognises_the_wordings_of_this_torch(kind: type | None, expected: dict[str, Any], run: Crash) -> None:
    if run.__name__ == "matcher_after_divergence":
        pytest.importorskip("scipy")
    failure = examined(run)

    assert kind_of(failure) is kind
    facts = failure.facts.operation if isinstance(failure.facts, OperationFailure) else failure.facts
    assert {name: getattr(facts, name) for name in expected} == expected
    assert pickle.loads(pickle.dumps(failure)) == failure


OTHER_WORDINGS = [
    (
        "Input type (torch.cuda.HalfTensor) and weight type (torch.cuda.FloatTensor) should be the same",
        DtypeMismatch,
    ),
    ("Input type (struct c10::Half) and bias type (float) should be the same", DtypeMismatch),
    (
        "grid_sampler(): expected input and grid to have same dtype, but input has c10::Half and grid has float",
        DtypeMismatch,
    ),
    ("masked_scatter_: expected self and source to have same dtypes but gotHalf and Float", InPlaceDtype),
    ("\"ms_deform_attn_forward_cuda\" not implemented for 'Half'", OpNotImplemented),
    (
        "could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload with "
        "environment variable ONEDNN_VERBOSE=all to get additional diagnostic information.",
        OpNotImplemented,
    ),
    (
        "cuFFT only supports dimensions whose sizes are powers of two when computing in half precision, but got a "
        "signal size of[192]",
        OpNotImplemented,
    ),
    ("\"_amp_foreach_non_finite_check_and_unscale_cuda\" not implemented for 'BFloat16'", ScalerWithoutBfloat16),
    ("torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.", UnsafeLoss),
    (
        "The current optimizer, SGD, does not allow for gradient clipping because it performs unscaling of gradients.",
        FusedOptimizerClipping,
    ),
    ("Gradient clipping is not implemented for optimizers handling the unscaling.", FusedOptimizerClipping),
]


@pytest.mark.parametrize(("message", "kind"), OTHER_WORDINGS)
def test_recognises_wordings_of_other_devices_and_hosts(message: str, kind: type) -> None:
    def run() -> None:
        raise RuntimeError(message)

    assert kind_of(examined(run)) is kind


def test_a_mix_up_of_devices_is_no_dtype_error() -> None:
    def run() -> None:
        raise RuntimeError("Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same")

    assert examined(run).facts is None


def test_a_replica_of_data_parallel_is_another_thread() -> None:
    def run() -> None:
        raise RuntimeError(
            "Caught RuntimeError in replica 0 on device 0.\nOriginal Traceback (most recent call last):\n"
            "RuntimeError: Input type (c10::Half) and bias type (float) should be the same"
        )

    facts = examined(run).facts
    assert isinstance(facts, DtypeMismatch)
    assert facts.operation.thread


@pytest.mark.parametrize(
    "spelling",
    [
        "Half",
        "c10::Half",
        "at::Half",
        "struct c10::Half",
        "torch.cuda.HalfTensor",
        "torch.float16",
        "torch::headeronly::ScalarType::Half",
        "CPUHalfType",
    ],
)
def test_one_dtype_has_many_spellings(spelling: str) -> None:
    assert canonical(spelling) == "float16"


def test_classifies_over_the_chain_of_causes() -> None:
    def run() -> None:
        try:
            torch.randn(2, 2).half() @ torch.randn(2, 2)
        except RuntimeError as error:
            raise ValueError("the training step failed") from error

    failure = examined(run)
    assert failure.type == "ValueError"
    assert isinstance(failure.facts, DtypeMismatch)
    assert [kind for kind, _ in failure.chain] == ["ValueError", "RuntimeError"]
    assert failure.sites[0].code == "torch.randn(2, 2).half() @ torch.randn(2, 2)"


def test_the_crash_counts_and_not_the_one_it_fell_back_from() -> None:
    def run() -> None:
        try:
            torch.randn(2, 2).half() @ torch.randn(2, 2)
        except RuntimeError:
            torch.zeros(4)[torch.tensor([0])] = torch.ones(1).half()

    assert isinstance(examined(run).facts, InPlaceDtype)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def half_scaler_step() -> None:
    model = Net().half()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 4).half()).sum()).backward()
    scaler.unscale_(optimizer)


def closure_that_fails() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step(lambda: model(torch.randn(2, 4).half()).sum())


def fused_step_of_other_dtypes() -> None:
    parameter = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros(3)
    parameter.grad = torch.ones(4)
    optimizer.step()


@pytest.mark.parametrize(
    ("run", "given", "phase"),
    [
        (lambda: Net()(torch.randn(2, 4).half()), "training_step", "forward"),
        (lambda: Net()(torch.randn(2, 4).half()), "validation_step", "validation_step"),
        (lambda: torch.tensor(0.0).backward(), "training_step", "backward"),
        (half_scaler_step, "training_step", "unscale"),
        (closure_that_fails, "training_step", "forward"),
        (fused_step_of_other_dtypes, "training_step", "step"),
    ],
)
def test_the_phase_is_read_off_the_frames(run: Crash, given: str, phase: str) -> None:
    assert examined(run, phase=given).phase == phase


def test_names_the_innermost_module() -> None:
    model = nn.Sequential(nn.Identity(), Net())

    failure = examined(lambda: model(torch.randn(2, 4).half()), model)

    assert failure.module == "1.fc"
    assert failure.module_type == "Linear"
    assert failure.sites[0].function.endswith("forward")


def test_a_function_named_like_a_method_is_no_method() -> None:
    def train(model: nn.Module) -> None:
        torch.randn(2, 2).half() @ torch.randn(2, 2)

    model = Net()
    assert examined(lambda: train(model), model).module is None


def test_holds_no_tensor_and_no_frame() -> None:
    class Marker:
        pass

    def run(watched: list[Any]) -> None:
        marker, x = Marker(), torch.randn(2, 4).half()
        watched += [weakref.ref(marker), weakref.ref(x)]
        Net()(x)

    watched: list[Any] = []
    failure = examined(lambda: run(watched))
    gc.collect()

    assert isinstance(failure.facts, DtypeMismatch)
    assert [reference() for reference in watched] == [None, None]


def test_never_raises() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def run() -> None:
        raise Unspeakable

    failure = examine(raised(run), model=None, phase="training_step", step=None)
    assert failure.facts is None
    assert failure.message == ""


def test_a_loop_in_the_chain_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first

    assert examine(first, model=None, phase="training_step", step=None).chain == (
        ("ValueError", "a"),
        ("ValueError", "b"),
    )


def test_every_signature_is_met_by_a_real_crash_or_named_as_a_gpus() -> None:
    texts = [str(raised(run)) for name, _, _, run in CRASHES if name != "matcher_after_divergence"]
    texts += [message for message, _ in OTHER_WORDINGS]
    # Met in tests/cases.
    cased = {
        autocast_call,
        low_precision_gradients,
        missing_gradients,
        scaler_order,
        scaler_argument,
        custom_function_state,
    }
    unmet = {
        signature.pattern.pattern
        for signature in SIGNATURES
        if signature.facts not in cased and not any(signature.pattern.search(text) for text in texts)
    }
    # The first three differ by version; the last is of torch 1.2.
    other_versions = ("input must have the type", "RNN input", "addmv", "invalid gradient")
    assert [pattern for pattern in unmet if not any(words in pattern for words in other_versions)] == []


def test_a_thread_is_told_from_the_loop_that_waits_for_it() -> None:
    def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: torch.randn(2, 2).half() @ torch.randn(2, 2)).result()

    facts = examined(run).facts
    assert isinstance(facts, DtypeMismatch)
    assert facts.operation.thread
