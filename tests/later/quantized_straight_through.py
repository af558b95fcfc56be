"""A codebook updated by moving averages in forward, in a quantizer that is trained after a warm-up."""

import torch
from torch import nn


class Quantizer(nn.Module):
    def __init__(self, codes=8, width=4):
        super().__init__()
        self.register_buffer("codebook", torch.randn(codes, width))
        self.decay = 0.9
        self.learning = False

    def forward(self, z):
        distance = torch.cdist(z, self.codebook)
        # -
        # + distance = torch.cdist(z, self.codebook.clone())
        index = distance.argmin(1)
        soft = (-distance).softmax(1) @ self.codebook  # <- save
        # -
        # + soft = (-distance).softmax(1) @ self.codebook.clone()
        if self.learning:
            with torch.no_grad():
                for code in index.unique():
                    self.codebook[code].lerp_(z[index == code].mean(0), 1 - self.decay)  # <- write
        return z + (soft - z)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.vq, self.up = nn.Linear(6, 4), Quantizer(), nn.Linear(4, 6)

    def forward(self, x):
        return self.up(self.vq(self.down(x)))


torch.manual_seed(0)
model = Autoencoder()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
step = 0
for epoch in range(4):
    for x in torch.randn(3, 10, 6):
        model.vq.learning = step >= 5
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
