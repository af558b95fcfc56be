"""Train a small network on scikit-learn's digits with Lightning and bfloat16 autocast. AmpCheck is one callback.

pip install '.[lightning]' scikit-learn
python examples/digits_lightning.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from ampcheck.integrations.lightning import AmpCheck


class DigitsNet(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        accuracy = (self(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    train, val = random_split(digits, (0.8, 0.2))
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=3,
        callbacks=[AmpCheck()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsNet(), DataLoader(train, 64, shuffle=True), DataLoader(val, 256))
    print(f"accuracy {trainer.callback_metrics['accuracy']:.1%}")


if __name__ == "__main__":
    main()
