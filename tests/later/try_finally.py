"""A step that always clears its gradients, inside two functions and a context of the user's own."""

import contextlib
import time

import torch
from torch import nn

times = []


@contextlib.contextmanager
def timed():
    began = time.perf_counter()
    try:
        yield
    finally:
        times.append(time.perf_counter() - began)


def loss_of(model, x, hard):
    scores = torch.sigmoid(model(x))  # <- save
    if hard:
        scores.round_()  # <- write
        # -
        # + scores = scores.round()
    return (scores * model[0].weight.mean()).sum()


def train(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, x in enumerate(batches):
        with timed():
            try:
                loss_of(model, x, hard=i >= 5).backward()
                optimizer.step()
            finally:
                optimizer.zero_grad()


torch.manual_seed(0)
train(nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)), torch.randn(9, 4, 3))
