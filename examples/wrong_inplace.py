"""Wrong on purpose: a residual block adds to the output of a ReLU in place.

ReLU keeps its output for the backward pass, so `loss.backward()` fails. PyTorch's message names neither the line that
changed the output nor the module. The script does not mention AmpCheck; the command adds it:

    pip install . scikit-learn
    ampcheck run examples/wrong_inplace.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = F.relu(self.norm(self.conv(x)))
        out += x
        return out


class DigitsNet(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.block = Block(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, images):
        return self.head(self.block(self.stem(images)).mean((2, 3)))


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for batch in torch.randperm(len(labels)).split(64):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
