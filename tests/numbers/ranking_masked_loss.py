import torch
import torch.nn as nn


class Scorer(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, docs):
        return self.mlp(docs).squeeze(-1)


class ListwiseLoss(nn.Module):
    """Plackett-Luce likelihood; padded positions are masked."""

    def forward(self, scores, order, valid):
        ranked = scores.gather(1, order)
        ranked = ranked.masked_fill(~valid, float("-inf"))
        tail = torch.logcumsumexp(ranked.flip(1), dim=1).flip(1)
        observation = (tail - ranked.masked_fill(~valid, 0.0)) * valid  # <- origin
        # -
        # + observation = (tail - ranked).masked_fill(~valid, 0.0)
        return observation.sum() / valid.sum()


def queries(step, batch=4, docs=9):
    gen = torch.Generator().manual_seed(777 + step)
    x = torch.randn(batch, docs, 12, generator=gen)
    relevance = torch.rand(batch, docs, generator=gen)
    count = torch.full((batch,), docs)
    if step >= 4:
        count = torch.randint(5, docs, (batch,), generator=gen)
    valid = torch.arange(docs)[None] < count[:, None]
    order = (relevance - 10 * (~valid)).argsort(1, descending=True)
    return x, order, valid


class Experiment:
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.scorer = Scorer()
        self.loss = ListwiseLoss()
        self.opt = torch.optim.Adam(self.scorer.parameters(), lr=1e-3)

    def run(self, steps):
        for step in range(steps):
            x, order, valid = queries(step)
            loss = self.loss(self.scorer(x), order, valid)
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            print(f"step {step} nll {loss.item():.4f}")


Experiment().run(8)
