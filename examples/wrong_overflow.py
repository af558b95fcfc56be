"""Wrong on purpose: attention scores are scaled after the product, which float16 cannot hold once the weights grew.

The loss is NaN from one step on, and nothing says so: the gradient scaler skips every step. The script does not mention
AmpCheck; the command adds it:

    pip install . scikit-learn
    ampcheck run examples/wrong_overflow.py
"""

import math

import torch
from sklearn.datasets import load_digits
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, width) for _ in range(3))

    def forward(self, rows):
        query, key, value = self.query(rows), self.key(rows), self.value(rows)
        scores = query @ key.transpose(1, 2)
        return (scores / math.sqrt(query.shape[-1])).softmax(-1) @ value


class DigitsNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        return self.head(self.attention(images).mean(1))


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8)
    labels = torch.tensor(labels)
    torch.manual_seed(0)
    model = DigitsNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for start in range(0, 1088, 64):
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(images[start : start + 64])
            loss = nn.functional.cross_entropy(logits, labels[start : start + 64])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


if __name__ == "__main__":
    main()
