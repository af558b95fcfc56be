"""Wrong on purpose: `torch.autocast(device=...)`, as in RF-DETR (https://github.com/roboflow/rf-detr/issues/52).

The first step crashes with PyTorch's own TypeError. AmpCheck's note below it shows the line and the right argument.

    pip install '.[lightning]' scikit-learn
    python examples/wrong_autocast_argument.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

try:
    from pytorch_lightning import LightningModule, Trainer
except ModuleNotFoundError:
    from lightning.pytorch import LightningModule, Trainer

from ampcheck.integrations.lightning import AmpCheck


class DigitsNet(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        with torch.autocast(device=images.device.type, dtype=torch.bfloat16):
            return F.cross_entropy(self.layers(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[AmpCheck()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsNet(), DataLoader(digits, 64))


if __name__ == "__main__":
    main()
