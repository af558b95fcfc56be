"""A trainer with callbacks, one of which warms up a temperature."""

import torch
from torch import nn
from torch.nn import functional as F


class Callback:
    def on_batch_start(self, trainer, step):
        pass

    def on_logits(self, trainer, logits, step):
        return logits


class Temperature(Callback):
    def __init__(self, warmup):
        self.warmup = warmup

    def on_logits(self, trainer, logits, step):
        if step > self.warmup:
            logits.div_(1.5)  # <- write
            # -
            # + logits = logits / 1.5
        return logits


class LearningRate(Callback):
    def on_batch_start(self, trainer, step):
        for group in trainer.optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 4)


class Trainer:
    def __init__(self, model, callbacks):
        self.model, self.callbacks = model, callbacks
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.step = 0

    def training_step(self, x, y):
        logits = 3 * torch.tanh(self.model(x))
        logits = F.softplus(logits).sigmoid()  # <- save
        for callback in self.callbacks:
            logits = callback.on_logits(self, logits, self.step)
        return F.cross_entropy(logits, y)

    def fit(self, batches):
        for x, y in batches:
            for callback in self.callbacks:
                callback.on_batch_start(self, self.step)
            loss = self.training_step(x, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1


torch.manual_seed(0)
batches = [(torch.randn(8, 5), torch.randint(0, 3, (8,))) for _ in range(12)]
Trainer(nn.Linear(5, 3), [LearningRate(), Temperature(warmup=4)]).fit(batches)
