"""Gradient scaling used wrongly."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from cases import Cases, Guard
from cases.training import rows, sgd

CASES = Cases(family="scaler")
case = CASES.case


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def loss_of(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return model(rows()).float().square().mean()


@case(
    "half-model-with-a-scaler",
    "AMP303",
    source=("https://github.com/Lightning-AI/pytorch-lightning/issues/5140",),
    also=("AMP201",),
    remedies=2,
    marks={"raise": "raise", "cast": "cast"},
    evidence={"count": 4, "optimized": 4, "parameters": ["body.weight", "body.bias", "head.weight", "head.bias"]},
)
def half_model_with_a_scaler(guard: Guard, repaired: int) -> None:
    model = Net()
    if repaired != 1:
        model.half()  # <- cast
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", enabled=repaired != 2)
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)  # <- raise
        scaler.update()


@case(
    "half-after-a-validation",
    "AMP303",
    source=(
        "https://github.com/huggingface/diffusers/issues/6442",
        "https://github.com/huggingface/diffusers/issues/9973",
        "https://github.com/ultralytics/ultralytics/issues/1253",
    ),
    remedies=2,
    module="head",
    evidence={"count": 2, "optimized": 4, "parameters": ["head.weight", "head.bias"]},
)
def half_after_a_validation(guard: Guard, repaired: int) -> None:
    import copy

    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")

    def validate() -> None:
        evaluated = copy.deepcopy(model) if repaired == 1 else model
        evaluated.head.half()

    with guard(model, optimizers=(optimizer,), scaler=scaler):
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.unscale_(optimizer)  # <- raise
            scaler.step(optimizer)
            scaler.update()
            validate()
            if repaired == 2:
                model.float()


@case(
    "optimizer-of-another-model",
    "AMP304",
    source=("https://github.com/huggingface/accelerate/issues/328",),
    also=("AMP309",),
    evidence={"reason": "not-the-models", "optimized": 4, "gradients_elsewhere": 4},
)
def optimizer_of_another_model(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    model = Net()
    if repaired:
        optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)  # <- raise
        scaler.update()


@case(
    "constant-loss",
    "AMP304",
    source=("https://github.com/ecmwf/WeatherGenerator/issues/356",),
    remedies=2,
    evidence={"reason": "no-gradient", "gradients_elsewhere": 0},
)
def constant_loss(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        for matched in (False, True):
            optimizer.zero_grad()
            constant = not matched and repaired != 2
            loss = torch.zeros((), requires_grad=True) if constant else loss_of(model)
            if constant and repaired == 1:
                continue
            scaler.scale(loss).backward()
            scaler.step(optimizer)  # <- raise
            scaler.update()


@case(
    "frozen-parameters",
    "AMP304",
    remedies=2,
    evidence={
        "reason": "frozen",
        "gradients_elsewhere": 2,
        "without_gradient": {"frozen": ["body.weight", "body.bias"]},
    },
)
def frozen_parameters(guard: Guard, repaired: int) -> None:
    model = Net()
    model.body.requires_grad_(False)
    if repaired == 1:
        model.body.requires_grad_(True)
    part = model.head if repaired == 2 else model.body
    optimizer, scaler = sgd(part.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)  # <- raise
        scaler.update()


@case("detached-part", "AMP304", remedies=2, evidence={"reason": "no-gradient", "gradients_elsewhere": 2})
def detached_part(guard: Guard, repaired: int) -> None:
    class Detached(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            body = self.body(x)
            return self.head(body if repaired == 2 else body.detach())

    model = Detached()
    optimizer = sgd((model.head if repaired == 1 else model.body).parameters())
    scaler = torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)  # <- raise
        scaler.update()


@case(
    "unscaled-twice",
    "AMP306",
    source=(
        "https://github.com/huggingface/transformers/issues/24449",
        "https://github.com/huggingface/transformers/issues/23905",
        "https://github.com/hiyouga/LlamaFactory/issues/77",
    ),
    reason="unscaled-twice",
)
def unscaled_twice(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        if not repaired:
            scaler.unscale_(optimizer)  # <- raise
        scaler.step(optimizer)
        scaler.update()


@case(
    "skipped-batch-without-update",
    "AMP306",
    source=(
        "https://github.com/espnet/espnet/pull/2362",
        "https://github.com/Haian-Jin/LVSM/pull/19",
    ),
    reason="unscaled-twice",
)
def skipped_batch_without_update(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        for batch in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.unscale_(optimizer)  # <- raise
            if batch == 0:
                if repaired:
                    scaler.update()
                continue
            scaler.step(optimizer)
            scaler.update()


@case("unscaled-after-step", "AMP306", reason="unscaled-late")
def unscaled_after_step(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        if repaired:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        if not repaired:
            scaler.unscale_(optimizer)  # <- raise
        scaler.update()


@case("stepped-twice", "AMP306", reason="stepped-twice")
def stepped_twice(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.step(optimizer)  # <- raise
            if repaired:
                scaler.update()


@case("never-scaled", "AMP306", reason="never-scaled")
def never_scaled(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        loss = loss_of(model)
        (scaler.scale(loss) if repaired else loss).backward()
        scaler.step(optimizer)  # <- raise
        scaler.update()


@case("update-before-step", "AMP306", reason="early-update")
def update_before_step(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        if repaired:
            scaler.step(optimizer)
        scaler.update()  # <- raise


@case(
    "device-for-a-scale",
    "AMP312",
    source=("https://github.com/MIC-DKFZ/nnUNet/issues/2735",),
    evidence={"argument": "init_scale", "value": "'cpu'"},
    remedies=2,
)
def device_for_a_scale(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    if repaired == 1:
        scaler = torch.amp.GradScaler("cpu")
    elif repaired == 2:
        scaler = torch.cpu.amp.GradScaler(init_scale=65536.0)
    else:
        scaler = torch.cpu.amp.GradScaler("cpu")  # type: ignore[arg-type]
    with guard(model, optimizers=(optimizer,)):
        scaler.scale(loss_of(model)).backward()  # <- raise
        scaler.step(optimizer)
        scaler.update()


@case(
    "fused-optimizer-clipping",
    "AMP308",
    source=(
        "https://github.com/Lightning-AI/pytorch-lightning/issues/15501",
        "https://github.com/Lightning-AI/pytorch-lightning/pull/15555",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/21435",
        "https://github.com/Lightning-AI/litgpt/issues/2042",
    ),
    needs=("lightning",),
    trains=False,
    remedies=2,
    marks={},
)
def fused_optimizer_clipping(guard: Guard, repaired: int) -> None:
    from lightning.fabric.plugins.precision import MixedPrecision as Fabric
    from lightning.pytorch.plugins.precision import MixedPrecision

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=repaired != 1)
    plugin = MixedPrecision("16-mixed", "cpu")
    assert Fabric is not MixedPrecision
    with guard(model, optimizers=(optimizer,), scaler=plugin.scaler):
        plugin.clip_gradients(optimizer, 0.0 if repaired == 2 else 1.0)


@case(
    "clipped-while-scaled",
    "AMP305",
    source=(
        "https://github.com/Lightning-AI/pytorch-lightning/issues/18089",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/9694",
        "https://github.com/TorchSSL/TorchSSL/pull/59",
        "https://github.com/pytorch/pytorch/issues/40907",
    ),
    marks={"call": "clip"},
    crashes=False,
)
def clipped_while_scaled(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        if repaired:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # <- clip
        scaler.step(optimizer)
        scaler.update()


@case(
    "first-step-skipped",
    "AMP310",
    source=(
        "https://github.com/Lightning-AI/pytorch-lightning/issues/16228",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/18828",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/21339",
        "https://github.com/pytorch/pytorch/issues/44511",
        "https://github.com/huggingface/transformers/issues/11106",
    ),
    marks={"call": "step"},
    crashes=False,
)
def first_step_skipped(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    factor = 1.0 if repaired else float("inf")
    with guard(model, optimizers=(optimizer,), scaler=scaler), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaler.scale(loss_of(model) * factor).backward()
        scaler.step(optimizer)  # <- step
        scaler.update()
        scheduler.step()
        assert bool([one for one in caught if "lr_scheduler.step()" in str(one.message)]) is not bool(repaired)


@case("one-loss-unscaled", "AMP311", marks={"call": "backward"}, crashes=False)
def one_loss_unscaled(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        penalty = model.head.weight.square().mean()
        (scaler.scale(penalty) if repaired else penalty).backward()  # <- backward
        scaler.step(optimizer)
        scaler.update()


@case(
    "critic-without-a-loss-yet",
    "AMP304",
    evidence={"reason": "no-gradient", "optimized": 2, "gradients_elsewhere": 4},
    remedies=2,
)
def critic_without_a_loss_yet(guard: Guard, repaired: int) -> None:
    """Another network than the one that trains, which no optimizer was meant to hold."""
    model, critic = Net(), nn.Linear(2, 1)
    trained, waiting = sgd(model.parameters()), sgd(critic.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(trained, waiting), scaler=scaler):
        loss = loss_of(model)
        if repaired == 2:
            loss = loss + critic(model(rows())).mean()
        scaler.scale(loss).backward()
        scaler.step(trained)
        if repaired != 1:
            scaler.step(waiting)  # <- raise
        scaler.update()


@case(
    "device-type-for-a-scaler",
    "AMP312",
    evidence={"argument": "device_type"},
    trains=True,
)
def device_type_for_a_scaler(guard: Guard, repaired: int) -> None:
    """The device that was asked for stays."""
    model = Net()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        if repaired:
            scaler = torch.amp.GradScaler(device="cpu", init_scale=256.0)
        else:
            scaler = torch.amp.GradScaler(device_type="cpu", init_scale=256.0)  # type: ignore[call-arg]  # <- raise
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
