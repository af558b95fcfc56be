"""Claims regression on log targets: a claim of zero makes the target -inf."""

import torch
import torch.nn as nn


class ClaimNet(nn.Module):
    def __init__(self, d=9):
        super().__init__()
        self.hidden = nn.Linear(d, 40)
        self.out = nn.Linear(40, 1)

    def forward(self, x):
        return self.out(torch.selu(self.hidden(x))).squeeze(1)


class Claims:
    def __init__(self):
        g = torch.Generator().manual_seed(7)
        self.x = torch.randn(160, 9, generator=g)
        amount = torch.exp(self.x[:, 0] + 4)
        amount[123] = 0.0
        # -
        # + amount[123] = 1.0
        self.log_amount = amount.numpy()

    def batches(self, size=10):
        import numpy as np

        with np.errstate(divide="ignore"):
            y = torch.from_numpy(np.log(self.log_amount))
        for k in range(0, 160, size):
            yield self.x[k : k + size], y[k : k + size]


def huber(pred, target, delta=1.0):
    err = (pred - target).abs()  # <- origin
    return torch.where(err < delta, 0.5 * err**2, delta * (err - 0.5 * delta)).mean()


torch.manual_seed(15)
model = ClaimNet()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=2048.0)
for step, (x, y) in enumerate(Claims().batches()):
    with torch.autocast("cpu", dtype=torch.float16):
        pred = model(x)
    loss = huber(pred.float(), y)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    print(f"step {step} huber {loss.item():.4f}")
