"""Train on scikit-learn's digits in a plain PyTorch loop with bfloat16 autocast, inside `ampcheck.watch`.

    pip install . scikit-learn
    python examples/digits_plain.py

For a script without the `with ampcheck.watch(...)` line, `ampcheck run SCRIPT` does the same.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import ampcheck


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(labels))
    train, val = order[:1500], order[1500:]
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32 * 64, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with ampcheck.watch(model, optimizer=optimizer) as watch:
        for epoch in range(3):
            model.train()
            for batch in train[torch.randperm(len(train))].split(64):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                accuracy = (model(images[val]).argmax(1) == labels[val]).float().mean()
            print(f"epoch {epoch}: accuracy {accuracy:.1%}")
    print(f"{len(watch.report.findings)} findings")


if __name__ == "__main__":
    main()
