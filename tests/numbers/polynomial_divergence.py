"""Fits a polynomial with plain gradient descent. The learning rate is too large."""

import torch
import torch.nn as nn


class Polynomial(nn.Module):
    def __init__(self, degree=4):
        super().__init__()
        self.degree = degree
        self.coefficients = nn.Linear(degree + 1, 1, bias=False)

    def forward(self, x):
        powers = torch.stack([x**k for k in range(self.degree + 1)], dim=1)
        return self.coefficients(powers).squeeze(1)


def main():
    torch.manual_seed(2)
    x = torch.linspace(-4, 4, 64)
    y = 0.5 * x**3 - 2 * x + torch.randn(64)
    model = Polynomial()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    # -
    # + optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for step in range(14):
        prediction = model(x)
        loss = ((prediction - y) ** 2).mean()  # <- origin
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{step:3d} {loss.item():.4e}")


main()
