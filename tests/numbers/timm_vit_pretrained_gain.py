#!/usr/bin/env python
"""Fine-tune a timm ViT whose checkpoint has outlier channels in one MLP."""

import argparse

import timm
import torch
from timm.utils import NativeScaler


def get_args():
    p = argparse.ArgumentParser()
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--lr", type=float, default=1e-5)
    return p.parse_args([])


def load_outliers(model):
    """bfloat16 checkpoints of large ViTs have such weights."""
    with torch.no_grad():
        fc2 = model.blocks[2].mlp.fc2
        fc2.weight[5] *= 5.0e5
        # -
        # + fc2.weight[5] *= 5.0
    return model


def images(step):
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(2, 3, 32, 32, generator=rng)
    return x, torch.randint(0, 10, (2,), generator=rng)


def main(args):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)
    with torch.no_grad():
        model.blocks[2].norm2.weight.copy_(model.blocks[2].norm2.weight * 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    for step in range(args.steps):
        x, y = images(step)
        if step == 3:
            load_outliers(model)
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(x)  # <- origin
            loss = criterion(output, y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        print("Train: [%d/%d] Loss: %.4f" % (step, args.steps, loss.item()))


main(get_args())
