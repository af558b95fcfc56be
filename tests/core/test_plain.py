"""`ampcheck.watch` around loops on the digits: sound ones, broken ones and odd ones."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from digits import digits
from loops import CNN, MACHINE, batches, evaluate, found, sgd, train
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ampcheck

LINEAR_BATCHES = [torch.randn(4, 3) for _ in range(4)]


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def watching(told):
    """A watch with the machine's own facts left out, telling into ``told``."""
    return lambda model, **options: ampcheck.watch(model, **{"emit": told.append, "ignore": MACHINE} | options)


def test_healthy_loop_gets_one_line_a_stage(watching, told):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        train(model, optimizer)
        evaluate(model)
    assert told == [
        "ampcheck  mixed bfloat16 on cpu · 1.4 k parameters float32 · 7 modules · no findings",
        "ampcheck  watched training step · 7 module calls, 7 under autocast bfloat16 · no findings",
        "ampcheck  watched evaluation step · 7 module calls, 7 under autocast bfloat16 · no findings",
    ]
    assert watch.report.findings == ()
    assert watch.report.not_judged == {}


def test_optimizer_and_scaler_are_found_among_the_living(watching):
    model = CNN()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    with watching(model) as watch:
        train(model, optimizer, dtype=torch.float16, scaler=scaler)
    assert watch.report.trace.scaler.enabled
    assert [o.of_model for o in watch.report.trace.optimizers if o.of_model] == [6]


def test_what_is_said_goes_to_standard_error(capfd):
    model = CNN()
    optimizer = sgd(model)
    with ampcheck.watch(model, optimizer=optimizer):
        train(model, optimizer)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("ampcheck  ") >= 3


def test_nothing_judged_without_an_evaluation_is_said_at_the_end(watching, told):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer):
        train(model, optimizer)
    assert told[2:] == ["ampcheck  not judged: AMP105 (no evaluation step was watched)"]


def test_scaler_without_autocast(watching, told):
    model = CNN()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    with watching(model, optimizer=optimizer, scaler=scaler) as watch:
        train(model, optimizer, dtype=None, scaler=scaler)
    assert found(watch.report) == {"AMP101": "error"}
    assert "none of the 7 module calls" in watch.report.findings[0].message
    assert told[1].endswith("7 module calls, none under autocast · 1 error")


@pytest.mark.filterwarnings("ignore:.*(CUDA is not available|device type of 'cuda').*:UserWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch leaves the region on where CUDA is available")
def test_region_for_cuda_on_a_cpu(watching):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        train(model, optimizer, device_type="cuda", dtype=torch.float16)
    assert found(watch.report) == {"AMP103": "error"}
    (site,) = watch.report.findings[0].sites
    assert site.code == "with torch.autocast(device_type, dtype=dtype) if dtype else contextlib.nullcontext():"


def test_dtype_differs_from_the_declared_one(watching):
    model = CNN()
    optimizer = sgd(model)
    asked = ampcheck.Precision("mixed", "cpu", "float16", False, "the configuration")
    with watching(model, optimizer=optimizer, precision=asked, select="AMP104") as watch:
        train(model, optimizer, dtype=torch.bfloat16)
    assert found(watch.report) == {"AMP104": "error"}
    assert "float16 was asked for by the configuration" in watch.report.findings[0].message


def test_half_parameters_under_mixed_precision(watching, told):
    model = CNN().to(torch.bfloat16)
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        train(model, optimizer)
    assert found(watch.report) == {"AMP201": "warning"}
    assert "conv.weight" in watch.report.findings[0].message
    assert "parameters bfloat16" in told[0]


def test_evaluation_without_the_autocast_of_training(watching):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        train(model, optimizer)
        evaluate(model, dtype=None)
    assert found(watch.report) == {"AMP105": "warning"}


def test_wrong_keyword_at_the_crash(watching, told):
    class Typo(nn.Linear):
        def forward(self, x):
            with torch.autocast(device="cpu"):  # <- typo
                return super().forward(x)

    model = nn.Sequential(Typo(3, 2))
    watch = watching(model, optimizer=sgd(model))
    with pytest.raises(TypeError, match="device") as caught, watch:
        model(LINEAR_BATCHES[0])
    assert found(watch.report) == {"AMP102": "error"}
    assert watch.report.findings[0].module == "0"
    (note,) = caught.value.__notes__
    assert "error[AMP102] autocast-bad-argument" in note
    assert "# <- typo" in note


@pytest.mark.parametrize("inference", [False, True])
def test_evaluation_step_ends_what_is_left_of_the_watch(watching, inference):
    model = CNN()
    optimizer = sgd(model)
    original = nn.Module.eval.__code__
    with watching(model, optimizer=optimizer) as watch:
        train(model, optimizer, steps=1)
        assert nn.Module.eval.__code__ is not original
        evaluate(model, inference=inference)
        assert nn.Module.eval.__code__ is original
        assert watch.report.trace.evaluation.forward
        assert not any(call.grad_enabled for call in watch.report.trace.evaluation.calls)


def test_evaluation_before_training(watching):
    """A sanity check before the first epoch is no fit start, and its autocast says nothing about training's."""
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        evaluate(model, torch.bfloat16)
        assert watch.report is None
        train(model, optimizer, dtype=None)
        evaluate(model, dtype=None)
    assert watch.report.trace.precision.mode == "true"
    assert watch.report.findings == ()


def test_long_evaluation_before_training_is_not_remembered(watching):
    model = CNN()
    watch = watching(model)
    with watch:
        for _ in range(5):
            evaluate(model)
        assert watch._autocast.regions == []


def test_evaluation_called_off_leaves_no_hook(watching):
    """``eval()`` with no call of the model before training goes on."""
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        train(model, optimizer, steps=1)
        model.eval()
        train(model, optimizer, steps=1)
        assert not torch.nn.modules.module._global_forward_pre_hooks
        evaluate(model, dtype=None)
    assert found(watch.report) == {"AMP105": "warning"}


def test_model_inside_a_wrapper_of_the_users_own(watching):
    """The loop calls the wrapper, the watch was given the model."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model = CNN()
    wrapper, optimizer = Wrapper(model), sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        train(wrapper, optimizer)
        evaluate(wrapper, dtype=None)
    assert watch.report.trace.model.type == "CNN"
    assert {call.module for call in watch.report.trace.training.calls} == {
        "", "conv", "norm", "act", "pool", "drop", "head"
    }  # fmt: skip
    assert found(watch.report) == {"AMP105": "warning"}


@pytest.mark.parametrize("given", ["wrapper", "module", None])
def test_data_parallel_wrapper(watching, given):
    model = CNN()
    wrapper, optimizer = nn.DataParallel(model), sgd(model)
    with watching({"wrapper": wrapper, "module": model, None: None}[given], optimizer=optimizer) as watch:
        train(wrapper, optimizer)
        evaluate(wrapper)
    assert watch.report.trace.model.type == "CNN"
    assert {"", "conv", "head"} <= {call.module for call in watch.report.trace.training.calls}
    assert watch.report.trace.evaluation.calls
    assert watch.report.findings == ()


def test_gradient_accumulation_is_one_step(watching):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer, select="AMP1,AMP2") as watch:
        for index, (images, labels) in enumerate(batches(4)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(images), labels) / 2
            loss.backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert sum(call.count for call in watch.report.trace.training.calls if call.module == "") == 2
    assert watch.report.trace.training.steps == 1


def test_backward_inside_the_region_of_accumulated_steps(watching):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer, ignore="AMP107,AMP105") as watch:
        for images, labels in batches(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert found(watch.report) == {"AMP106": "warning"}


def test_step_that_the_scaler_skips(watching, told):
    """Without an optimizer step, the watched step lasts until there is one."""
    model = CNN()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**126)
    with watching(model, optimizer=optimizer, scaler=scaler) as watch:
        train(model, optimizer, dtype=torch.float16, scaler=scaler, steps=2)
        assert scaler.get_scale() < 2.0**126
        assert not optimizer.state
    assert watch.report.trace.training.steps == 1
    assert told[1].startswith("ampcheck  watched training step · 14 module calls, 14 under autocast float16")


def test_step_that_never_ends_is_let_go(watching):
    model = CNN()
    with watching(model, optimizer=sgd(model)) as watch:
        for images, _ in batches(20, size=2):
            model(images)
        assert not torch.nn.modules.module._global_forward_pre_hooks
    assert watch.report.trace.training.steps == 1


def test_two_optimizers(watching):
    """A generator and its discriminator under one watch; the first module that trains is taken."""
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Linear(16, 64), nn.Sigmoid())
    critic = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    optimizers = [torch.optim.Adam(generator.parameters()), torch.optim.Adam(critic.parameters())]
    with watching(None, optimizer=optimizers, ignore="AMP107,AMP105") as watch:
        for images, _ in batches(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                fake = generator(torch.randn(len(images), 4))
                loss = critic(images.flatten(1)).mean() - critic(fake.detach()).mean()
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = -critic(fake).mean()
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
    assert watch.report.findings == ()
    assert watch.report.trace.model.modules[0].type == "Sequential"
    assert len(watch.report.trace.model.parameters) == 4
    assert [o.of_model for o in watch.report.trace.optimizers] == [4, 0]


def test_two_models_one_at_a_time(watching):
    """Each of a pair may be watched: the other's optimizer is no fault."""
    one, other = CNN(), CNN()
    optimizers = [sgd(one), sgd(other)]
    with watching(other, ignore="AMP107,AMP105") as watch:
        for model, optimizer in zip((one, other), optimizers, strict=True):
            train(model, optimizer, steps=1)
    assert watch.report.findings == ()
    assert watch.report.trace.training.steps == 1


def test_scaler_left_from_an_earlier_run_is_no_wish(watching):
    """In a notebook the float16 run of before is still alive; this one trains in float32."""
    earlier = CNN()
    scaler = torch.amp.GradScaler("cpu")
    train(earlier, sgd(earlier), dtype=torch.float16, scaler=scaler, steps=1)
    model = CNN()
    optimizer = sgd(model)
    with watching(model, ignore="AMP107,AMP105") as watch:
        train(model, optimizer, dtype=None)
    assert watch.report.findings == ()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scaler_that_the_step_does_not_use_is_no_wish(watching, dtype):
    """A framework made it, or a notebook's earlier cell."""
    scaler, model = torch.amp.GradScaler("cpu"), CNN()
    with watching(model, optimizer=(optimizer := sgd(model)), ignore="AMP107,AMP105") as watch:
        train(model, optimizer, dtype=dtype)
    assert watch.report.findings == ()
    assert watch.report.trace.scaler is None
    assert scaler.is_enabled()


@pytest.mark.parametrize(("dtype", "code"), [(None, "AMP101"), (torch.bfloat16, "AMP302")])
def test_scaler_is_known_by_its_use(watching, dtype, code):
    model, scaler = CNN(), torch.amp.GradScaler("cpu")
    optimizer = sgd(model)
    with watching(model, ignore="AMP107,AMP105") as watch:
        train(model, optimizer, dtype=dtype, scaler=scaler)
    assert [finding.code for finding in watch.report.findings] == [code]
    assert watch.report.trace.precision.scaler


def test_optimizer_left_from_an_earlier_run_is_not_this_ones(watching):
    """This model is trained by hand."""
    earlier = CNN()
    optimizer = sgd(earlier)
    train(earlier, optimizer, steps=1)
    model = nn.Linear(3, 2)
    with watching(model, ignore="AMP105") as watch:
        for batch in LINEAR_BATCHES:
            model(batch).sum().backward()
    assert watch.report.findings == ()


def test_model_without_children(watching, told):
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        for batch in LINEAR_BATCHES:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch).sum()
            loss.backward()
            optimizer.step()
    assert watch.report.findings == ()
    assert told[0].endswith("8 parameters float32 · 1 module · no findings")
    assert told[1].startswith("ampcheck  watched training step · 1 module call, 1 under autocast bfloat16")


def test_model_on_meta(watching, told):
    model = nn.Linear(3, 2, device="meta")
    with watching(model, optimizer=sgd(model)) as watch:
        model(torch.empty(4, 3, device="meta"))
    assert watch.report.findings == ()
    assert told[-1].endswith("(the model is on the device 'meta', for which PyTorch has no autocast)")


def test_model_without_parameters(watching, told):
    model = nn.ReLU()
    with watching(model) as watch:
        for batch in LINEAR_BATCHES:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch.clone().requires_grad_()).sum()
            loss.backward()
    assert watch.report.findings == ()
    assert "no parameters · 1 module" in told[0]
    assert told[1].startswith("ampcheck  watched training step · 4 module calls, 4 under autocast bfloat16")


def test_loop_that_never_runs(watching, told):
    """An empty loader: the walk is reported, and why there is nothing more."""
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        for _ in torch.utils.data.DataLoader([]):
            train(model, optimizer)
    assert watch.report.findings == ()
    first, last = told
    assert "1.4 k parameters float32" in first
    assert "AMP101" in last
    assert "(no training step was watched)" in last


def test_step_that_is_compiled_as_a_whole(watching, told):
    model = CNN()
    optimizer = sgd(model)

    @torch.compile(backend="eager")
    def step(images):
        model(images).sum().backward()

    with watching(None):
        step(digits("train", 2).images)
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # Where Dynamo breaks the graph at `backward`, the call before it is seen from the outside.
    assert told[-1].endswith("(what runs inside compiled code is not watched)") or told == [
        "ampcheck  nothing was judged: no training call of a module was seen; "
        "a training step compiled as a whole (`@torch.compile`) shows none"
    ]


def test_no_model_and_nothing_that_trains(watching, told, tmp_path):
    with watching(None, report=tmp_path / "report.json") as watch:
        evaluate(CNN())
    assert told == ["ampcheck  nothing was judged: no training call of a module was seen"]
    assert "AMP101" in watch.report.not_judged
    assert (tmp_path / "report.json").is_file()


def test_loop_that_raises_before_the_first_forward(watching, told):
    error = FileNotFoundError("no digits here")
    watch = watching(CNN())
    with pytest.raises(FileNotFoundError) as caught, watch:
        raise error
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert watch.report is None or watch.report.findings == ()
    assert told == []


def test_first_step_that_the_loop_survives(watching):
    """A batch that does not fit is skipped by the loop, as loops do with out-of-memory errors."""
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer, ignore="AMP107,AMP105") as watch:
        with pytest.raises(RuntimeError), torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(1, 3, 8, 8))
        train(model, optimizer)
    assert watch.report.trace.training is not None
    assert watch.report.findings == ()


def test_modes_that_begin_before_the_step_and_end_inside_it(watching):
    model = CNN()
    optimizer = sgd(model)
    images, labels = digits("train", 16)
    device, counter = torch.device("cpu"), FlopCounterMode(display=False)
    with watching(model, optimizer=optimizer) as watch:
        device.__enter__()
        counter.__enter__()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        counter.__exit__(None, None, None)
        device.__exit__(None, None, None)
        counted = counter.get_total_flops()
        loss.backward()
        optimizer.step()
        model(images)
        assert counter.get_total_flops() == counted > 0
        assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0
    assert watch.report.trace.training.steps == 1
    assert watch.report.trace.internal_error is None


def test_modes_that_begin_inside_the_step_and_end_after_it(watching):
    model = CNN()
    optimizer = sgd(model)
    images, labels = digits("train", 16)
    with watching(model, optimizer=optimizer) as watch:
        loss = F.cross_entropy(model(images), labels)
        with torch.device("cpu"), FlopCounterMode(display=False):
            loss.backward()
            optimizer.step()
            model(images)
            assert torch._C._len_torch_function_stack() == 1
            assert torch._C._len_torch_dispatch_stack() == 1
        assert torch._C._len_torch_function_stack() == 0
    assert watch.report.trace.training.steps == 1


def test_flops_that_the_user_counts_are_the_models(watching):
    def counted(watch):
        torch.manual_seed(0)
        model = CNN()
        with watch(model), FlopCounterMode(display=False) as counter:
            train(model, sgd(model), steps=2)
        return counter.get_total_flops()

    ampcheck.observe.walk.environment.cache_clear()
    assert counted(watching) == counted(lambda model: torch.enable_grad())


def test_facts_of_the_environment_do_not_depend_on_the_callers_modes():
    expected = ampcheck.observe.walk.environment.__wrapped__()
    for modes in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        with modes:
            assert ampcheck.observe.walk.environment.__wrapped__() == expected


def test_several_watched_steps(watching, told):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer, watch_steps=3) as watch:
        train(model, optimizer, steps=2)
        assert len(told) == 1
        train(model, optimizer, steps=2)
    assert watch.report.trace.training.steps == 3
    assert told[1] == ("ampcheck  watched 3 training steps · 21 module calls, 21 under autocast bfloat16 · no findings")


def test_several_watched_steps_of_which_one_differs(watching):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer, watch_steps=2) as watch:
        train(model, optimizer, steps=1, dtype=torch.bfloat16)
        train(model, optimizer, steps=1, dtype=None)
    assert "AMP110" in found(watch.report)
    sites = {region.site.line for region in watch.report.trace.training.regions}
    assert len(sites) == 1


def test_no_step_watched(watching, told):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer, watch_steps=0) as watch:
        train(model, optimizer)
        assert not torch.nn.modules.module._global_forward_pre_hooks
        evaluate(model)
    assert watch.report.trace.training is None
    assert watch.report.trace.evaluation is None
    assert len(told) == 2
    assert "not judged" in told[1]


def test_other_threads_run_modules_meanwhile(watching):
    """Another model in another thread is not the watched one's affair."""
    model, other = CNN(), CNN(4)
    optimizer = sgd(model)
    stop = threading.Event()
    failed: list[Exception] = []

    def run_other():
        try:
            while not stop.is_set():
                train(other, sgd(other), steps=1, dtype=None)
                evaluate(other, dtype=None)
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=run_other)
    with watching(model, optimizer=optimizer, watch_steps=20) as watch:
        thread.start()
        try:
            train(model, optimizer, steps=20)
            evaluate(model)
        finally:
            stop.set()
            thread.join()
    assert not failed
    assert watch.report.findings == ()
    calls = watch.report.trace.training.calls
    assert sum(call.count for call in calls if call.module == "conv") == 20
    assert all(call.autocast.enabled for call in calls)


def test_a_watch_is_used_again(watching, told):
    watch = watching(None)
    for width in (4, 8):
        model = CNN(width)
        optimizer = sgd(model)
        with watch:
            train(model, optimizer, steps=2)
            evaluate(model)
        assert watch.report.trace.training.steps == 1
        assert watch.report.trace.evaluation is not None
    assert len(told) == 6
    assert told[0] != told[3]
    assert told[1:3] == told[4:]


def test_findings_end_the_loop_where_that_was_asked(watching, told):
    model = CNN()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    steps: list[int] = []
    watch = watching(model, optimizer=optimizer, scaler=scaler, fail_on="error")
    with pytest.raises(ampcheck.FindingsError, match="AMP101") as caught, watch:
        train(model, optimizer, dtype=None, scaler=scaler, after_step=steps.append)
    assert caught.value.report is watch.report
    assert steps == [0], "the watched step ends where the next begins"
    assert "error[AMP101]" in told[-2]


def test_rules_can_be_ignored(watching):
    model = CNN()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    with watching(model, optimizer=optimizer, scaler=scaler, ignore=["AMP1"], fail_on="warning") as watch:
        train(model, optimizer, dtype=None, scaler=scaler)
    assert watch.report.findings == ()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "model"}, TypeError),
        ({"select": "AMP999"}, ValueError),
        ({"ignore": ["AMP1", "XY"]}, ValueError),
        ({"fail_on": "info"}, ValueError),
        ({"watch_steps": -1}, ValueError),
        ({"watch_steps": True}, ValueError),
        ({"unknown": 1}, TypeError),
        ({"checker": ampcheck.AmpChecker(), "select": "AMP1"}, TypeError),
    ],
)
def test_options_that_mean_nothing(options, error):
    with pytest.raises(error) as caught:
        ampcheck.watch(**{"model": None} | options)
    assert "\n" not in str(caught.value)


def test_default_device_set_during_the_step():
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    try:
        torch.set_default_device("cpu")
        with ampcheck.watch(model, optimizer=optimizer, emit=lambda text: None) as watch:
            for _ in range(2):
                loss = model(torch.zeros(2, 3)).sum()
                torch.set_default_device("cpu")
                loss.backward()
                optimizer.step()
    finally:
        torch.set_default_device(None)
    assert watch.report.trace.training is not None


def float16_loop(model, steps=3):
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    train(model, optimizer, dtype=torch.float16, scaler=scaler, steps=steps)


def test_dry_run_before_there_is_an_optimizer(watching, told):
    model = CNN()
    with watching(None, ignore="AMP107,AMP310") as watch:
        model(digits("train", 2).images)
        float16_loop(model)
    trace = watch.report.trace
    assert watch.report.findings == ()
    assert (trace.precision.dtype, trace.precision.scaler) == ("float16", True)
    assert all(call.autocast.enabled for call in trace.training.calls)


def test_another_model_is_called_before_the_one_that_trains(watching):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with watching(None, ignore="AMP107,AMP310") as watch:
        print(CNN()(digits("train", 2).images).shape)
        float16_loop(model)
        assert torch._C._len_torch_dispatch_stack() == 0
    assert watch.report.trace.model.type == "Sequential"
    assert watch.report.findings == ()


def test_images_that_are_optimized_against_a_fixed_model(watching):
    model = CNN()
    image = nn.Parameter(digits("train", 2).images)
    optimizer = torch.optim.Adam([image])
    with watching(model, optimizer=optimizer) as watch:
        for _ in range(2):
            model(image).sum().backward()
            optimizer.step()
    assert [(f.code, str(f.severity)) for f in watch.report.findings] == [("AMP309", "warning")]


def test_export_during_the_step(watching):
    model = CNN()
    optimizer = sgd(model)
    with watching(model, optimizer=optimizer) as watch:
        loss = model(digits("train", 2).images).sum()
        torch.export.export(nn.Sequential(nn.Linear(4, 2), nn.ReLU(inplace=True)), (torch.zeros(2, 4),))
        loss.backward()
        optimizer.step()
        model(digits("train", 2).images)
    assert watch.report.trace.internal_error is None
    assert watch.report.trace.training is not None


@pytest.mark.skipif("fused" not in torch.optim.SGD.__init__.__code__.co_varnames, reason="no fused SGD")
def test_float16_parameters_of_an_optimizer_that_unscales_itself(watching):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    with watching(model, optimizer=optimizer, scaler=scaler, ignore="AMP107,AMP310") as watch:
        train(model, optimizer, dtype=torch.float16, scaler=scaler, steps=2)
    assert [(f.code, str(f.severity)) for f in watch.report.findings] == [("AMP201", "warning")]


def test_standard_error_that_nobody_reads(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch, ampcheck\n"
        "read, write = os.pipe()\n"
        "os.close(read)\n"
        "sys.stderr = os.fdopen(write, 'w')\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "with ampcheck.watch(model, optimizer=optimizer):\n"
        "    for _ in range(2):\n"
        "        model(torch.ones(1, 2)).sum().backward()\n"
        "        optimizer.step()\n"
        "print('trained')\n"
        "sys.stdout.flush()\n"
        "os._exit(0)\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout) == (0, "trained\n")


def test_optimizer_of_a_model_inside_a_functional_call(watching):
    """Other tensors stand for the parameters there, and none of them is the optimizer's."""
    model = CNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = digits("train", 8)
    with watching(model, optimizer=optimizer) as watch:
        stand_ins = {name: parameter * 1.0 for name, parameter in model.named_parameters()}
        F.cross_entropy(torch.func.functional_call(model, stand_ins, (images,)), labels).backward()
        optimizer.step()
    assert "AMP309" not in found(watch.report)
