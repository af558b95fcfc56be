"""Train a timm model on scikit-learn's digits. The script has the structure of timm's `train.py` and does not mention
AmpCheck; the command adds it:

    pip install '.[timm]' scikit-learn
    python -m ampcheck.integrations.timm examples/digits_timm.py --amp --amp-dtype bfloat16
"""

import argparse
import logging
from contextlib import suppress
from functools import partial

import timm
import timm.optim
import torch
from sklearn.datasets import load_digits
from timm.utils import AverageMeter, NativeScaler, accuracy, random_seed, setup_default_logging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

_logger = logging.getLogger("train")

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--amp-dtype", default="float16", choices=("float16", "bfloat16"))


def train_one_epoch(epoch, model, loader, optimizer, loss_fn, args, amp_autocast=suppress, loss_scaler=None):
    model.train()
    losses = AverageMeter()
    for images, labels in loader:
        images, labels = images.to(args.device), labels.to(args.device)
        with amp_autocast():
            loss = loss_fn(model(images), labels)
        optimizer.zero_grad()
        if loss_scaler is not None:
            loss_scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        losses.update(loss.item(), len(labels))
    _logger.info(f"Train: {epoch}  Loss: {losses.avg:.3f}")


def validate(model, loader, args, amp_autocast=suppress):
    model.eval()
    top1 = AverageMeter()
    with torch.inference_mode():
        for images, labels in loader:
            images, labels = images.to(args.device), labels.to(args.device)
            with amp_autocast():
                output = model(images)
            top1.update(accuracy(output, labels)[0].item(), len(labels))
    _logger.info(f"Test:  Acc@1: {top1.avg:.1f}")


def main() -> None:
    setup_default_logging()
    args = parser.parse_args()
    random_seed(0)
    model = timm.create_model(args.model, num_classes=10).to(args.device)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=2e-3)

    amp_autocast, loss_scaler = suppress, None
    if args.amp:
        amp_autocast = partial(torch.autocast, device_type=args.device, dtype=getattr(torch, args.amp_dtype))
        if args.amp_dtype == "float16":
            loss_scaler = NativeScaler(device=args.device)

    images, labels = load_digits(return_X_y=True)
    pixels = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, size=32)
    train, val = random_split(TensorDataset(pixels.expand(-1, 3, -1, -1), torch.tensor(labels)), (0.8, 0.2))
    loader_train, loader_eval = DataLoader(train, 32, shuffle=True), DataLoader(val, 128)

    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        train_one_epoch(epoch, model, loader_train, optimizer, loss_fn, args, amp_autocast, loss_scaler)
        validate(model, loader_eval, args, amp_autocast)


if __name__ == "__main__":
    main()
