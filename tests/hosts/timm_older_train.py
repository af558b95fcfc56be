"""A train script as timm's was up to 1.0.22, with model and loss in place of a task; on scikit-learn's digits.

``--fault`` makes it a fork that dies of a misspelled autocast in its loss, or evaluates without autocast.
"""

import argparse
import logging
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from timm import utils
from timm.models import create_model
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from digits import digits, upscaled

_logger = logging.getLogger("train")

parser = argparse.ArgumentParser()
parser.add_argument("--amp", action="store_true")
parser.add_argument("--amp-dtype", default="float16")
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--output", default="")
parser.add_argument("--fault", choices=("autocast", "evaluation"))


class MisspelledLoss(nn.Module):
    def forward(self, output, target):
        with torch.autocast(device="cpu"):
            return nn.functional.cross_entropy(output.float(), target)


def main():
    utils.setup_default_logging()
    args = parser.parse_args()
    torch.set_num_threads(1)
    utils.random_seed(42, 0)
    model = create_model("resnet10t", num_classes=10)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05)
    amp_autocast = suppress
    if args.amp:
        amp_autocast = partial(torch.autocast, device_type="cpu", dtype=getattr(torch, args.amp_dtype))
    loss_fn = MisspelledLoss() if args.fault == "autocast" else nn.CrossEntropyLoss()
    model_ema = utils.ModelEmaV2(model, decay=0.9) if args.model_ema else None
    loaders = []
    for split in ("train", "val"):
        images, labels = digits(split, 16)
        loaders.append(DataLoader(TensorDataset(upscaled(images, 32), labels), 8))
    output_dir = args.output or None
    train_one_epoch(
        0,
        model,
        loaders[0],
        optimizer,
        loss_fn,
        args,
        output_dir=output_dir,
        amp_autocast=amp_autocast,
        model_ema=model_ema,
    )
    validate(model, loaders[1], loss_fn, args, amp_autocast=suppress if args.fault == "evaluation" else amp_autocast)
    if model_ema is not None:
        validate(model_ema.module, loaders[1], loss_fn, args, amp_autocast=amp_autocast, log_suffix=" (EMA)")


def train_one_epoch(
    epoch,
    model,
    loader,
    optimizer,
    loss_fn,
    args,
    output_dir=None,
    amp_autocast=suppress,
    loss_scaler=None,
    model_ema=None,
):
    model.train()
    for index, (input, target) in enumerate(loader):
        with amp_autocast():
            output = model(input)
            loss = loss_fn(output, target)
        optimizer.zero_grad()
        if loss_scaler is not None:
            loss_scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        if model_ema is not None:
            model_ema.update(model)
        print(f"step {index} loss {loss.item().hex()}")


def validate(model, loader, loss_fn, args, amp_autocast=suppress, log_suffix=""):
    model.eval()
    with torch.no_grad():
        for input, target in loader:
            with amp_autocast():
                loss_fn(model(input), target)


if __name__ == "__main__":
    main()
