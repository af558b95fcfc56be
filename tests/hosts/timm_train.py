"""A train script as timm's is: its loaders, models, tasks, averages, scaler and flags; on scikit-learn's digits.

``--fault`` makes it one of the forks that get mixed precision wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from timm import utils
from timm.data import create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from digits import digits

_logger = logging.getLogger("train")

FAULTS = ("amp-ignored", "dtype", "low-precision", "evaluation", "average", "autocast", "rank", "interrupt")

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--images", type=int, default=80)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--grad-accum-steps", type=int, default=1)
parser.add_argument("--device", default="cpu")
parser.add_argument("--amp", action="store_true")
parser.add_argument("--amp-dtype", default="float16")
parser.add_argument("--torchcompile", default=None)
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--output", default="")
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--fault", choices=FAULTS)


class DigitImages(torch.utils.data.Dataset):
    def __init__(self, split: str, count: int) -> None:
        self.digits = digits(split, count)
        self.transform = None

    def __len__(self) -> int:
        return len(self.digits.labels)

    def __getitem__(self, index: int):
        pixels = self.digits.images[index, 0].mul(255).to(torch.uint8).numpy()
        return self.transform(Image.fromarray(pixels).convert("RGB")), int(self.digits.labels[index])


class MistypedLoss(nn.Module):
    def forward(self, output, target):
        with torch.autocast(device=output.device.type):
            return nn.functional.cross_entropy(output.float(), target)


def main():
    utils.setup_default_logging()
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)

    model = create_model(args.model, num_classes=10).to(device)
    if args.fault == "low-precision":
        model.to(torch.bfloat16)

    amp_autocast = suppress
    loss_scaler = None
    if args.amp and args.fault != "amp-ignored":
        amp_dtype = torch.bfloat16 if args.amp_dtype == "bfloat16" else torch.float16
        if args.fault == "dtype":
            amp_dtype = torch.float16
        amp_autocast = partial(torch.autocast, device_type=device.type, dtype=amp_dtype)
        if amp_dtype == torch.float16:
            loss_scaler = utils.NativeScaler(device=device.type)

    train_loss_fn = MistypedLoss() if args.fault == "autocast" else nn.CrossEntropyLoss()
    task = ClassificationTask(model, train_loss_fn, device=device, verbose=False)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9)
    if args.model_ema:
        task.setup_ema(decay=0.9)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed()

    loaders = [
        create_loader(
            DigitImages(split, args.images),
            input_size=(3, 32, 32),
            batch_size=args.batch_size,
            is_training=split == "train",
            scale=(0.8, 1.0),
            num_workers=0,
            distributed=args.distributed,
            use_prefetcher=False,
            device=device,
        )
        for split in ("train", "val")
    ]
    output_dir = utils.get_outdir(args.output) if args.output and utils.is_primary(args) else None

    for epoch in range(args.epochs):
        train_one_epoch(
            epoch,
            task.get_trainable_module(),
            loaders[0],
            optimizer,
            args,
            task=task,
            device=device,
            output_dir=output_dir,
            amp_autocast=amp_autocast,
            loss_scaler=loss_scaler,
        )
        evaluated = task.get_eval_model(ema=args.fault == "average")
        kwargs = {} if args.fault in ("evaluation", "average") else {"amp_autocast": amp_autocast}
        metrics = validate(evaluated, loaders[1], nn.CrossEntropyLoss(), args, device=device, **kwargs)
        if utils.is_primary(args):
            print(f"epoch {epoch} loss {metrics['loss'].hex()}")

    if output_dir:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": loss_scaler and loss_scaler.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, os.path.join(output_dir, "last.pth.tar"))


def train_one_epoch(
    epoch,
    model,
    loader,
    optimizer,
    args,
    task=None,
    device=None,
    output_dir=None,
    amp_autocast=suppress,
    loss_scaler=None,
):
    task.get_trainable_module().train()
    optimizer.zero_grad()
    for index, (input, target) in enumerate(loader):
        input, target = input.to(device), target.to(device)
        need_update = (index + 1) % args.grad_accum_steps == 0
        if args.fault == "rank" and args.rank == 1 and index == 1:
            nn.functional.linear(input[:, 0, 0], torch.ones(1, 32, dtype=torch.float16))
        if args.fault == "interrupt" and index == 1:
            raise KeyboardInterrupt
        with amp_autocast():
            loss = task(input, target)["loss"]
        if loss_scaler is not None:
            loss_scaler(loss, optimizer, need_update=need_update)
        else:
            loss.backward()
            if need_update:
                optimizer.step()
        if need_update:
            optimizer.zero_grad()
            task.update_ema(step=index)
        if utils.is_primary(args):
            print(f"step {index} loss {loss.item().hex()}")


def validate(model, loader, loss_fn, args, device=None, amp_autocast=suppress, log_suffix=""):
    losses = utils.AverageMeter()
    model.eval()
    with torch.inference_mode():
        for input, target in loader:
            input, target = input.to(device), target.to(device)
            with amp_autocast():
                loss = loss_fn(model(input), target)
            losses.update(loss.item(), len(target))
    return {"loss": losses.avg}


if __name__ == "__main__":
    main()
