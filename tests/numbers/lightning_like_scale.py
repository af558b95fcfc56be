"""A model with a summed loss and a high, but harmless, loss scale: three skipped steps at the start."""

import torch
from torch import nn


class LitLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 12))

    def training_step(self, batch):
        return nn.functional.mse_loss(self.net(batch), batch, reduction="sum")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class MiniTrainer:
    def __init__(self, max_steps):
        self.max_steps = max_steps
        self.scaler = torch.amp.GradScaler("cpu")
        # -
        # + self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def fit(self, module):
        optimizer = module.configure_optimizers()
        for step in range(self.max_steps):
            batch = torch.randn(8, 12)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = module.training_step(batch)
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad()
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.3f} scale {self.scaler.get_scale()}")


torch.manual_seed(1)
MiniTrainer(60).fit(LitLike())
