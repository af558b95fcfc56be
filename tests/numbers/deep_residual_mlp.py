"""Tabular regression with a residual MLP; some columns are money and come unscaled."""

import torch
import torch.nn as nn


class ResidualBlock(nn.Module):
    def __init__(self, dim, gain):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)
        nn.init.normal_(self.fc2.weight, std=gain / dim**0.5)

    def forward(self, x):
        h = self.fc2(torch.relu(self.fc1(x)))
        return x + h  # <- origin


class PriceModel(nn.Module):
    def __init__(self, in_dim=16, dim=48, depth=5):
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.trunk = nn.ModuleList(ResidualBlock(dim, gain=3.0) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 1)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.trunk:
            x = layer(x)
        return self.out(self.norm(x.float())).squeeze(-1)


class Trainer:
    def __init__(self, model, lr):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=1000)
        # -
        # + self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(self, x, y):
        self.optimizer.zero_grad()
        with torch.autocast(device_type="cpu", dtype=torch.float16):
            # -
            # + with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            pred = self.model(x)
        loss = torch.nn.functional.smooth_l1_loss(pred.float(), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


def main():
    torch.manual_seed(11)
    x = torch.randn(20 * 16, 16)
    y = x[:, :4].sum(1)
    x[9 * 16 + 5, 3] = 4.0e4
    model = PriceModel()
    trainer = Trainer(model, lr=1e-3)
    for step in range(20):
        batch = slice(step * 16, (step + 1) * 16)
        loss = trainer.step(x[batch], y[batch])
        if step % 4 == 0 or loss != loss:
            print("step", step, "loss", round(loss, 4))


main()
