import torch
import torch.nn as nn
import torch.nn.functional as F

EPS = 1e-8


class TextTower(nn.Module):
    def __init__(self, vocab=100, dim=32):
        super().__init__()
        self.embed = nn.EmbeddingBag(vocab, dim, mode="sum")
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens, offsets):
        return self.proj(self.embed(tokens, offsets))


def l2_normalize(x):
    norm = x.norm(dim=-1, keepdim=True)
    return x / (norm + EPS)  # <- origin


class RetrievalModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = TextTower()
        self.doc = TextTower()
        self.temperature = nn.Parameter(torch.tensor(10.0))

    def forward(self, q, d):
        zq = l2_normalize(self.query(*q))
        zd = l2_normalize(self.doc(*d))
        return self.temperature * zq @ zd.T


def bag(generator, batch=8, empty=None):
    lengths = torch.randint(2, 6, (batch,), generator=generator)
    if empty is not None:
        lengths[empty] = 0  # nothing was left of this document after stop-word removal
        # -
        # + lengths[empty] = 1  # nothing was left of this document after stop-word removal
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
    return torch.randint(0, 100, (int(lengths.sum()),), generator=generator), offsets


def main():
    torch.manual_seed(12)
    gen = torch.Generator().manual_seed(13)
    model = RetrievalModel()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for step in range(10):
        q = bag(gen)
        d = bag(gen, empty=3 if step == 4 else None)
        with torch.autocast("cpu", torch.float16):
            scores = model(q, d)
            loss = F.cross_entropy(scores, torch.arange(8))
        scaler.scale(loss).backward()
        scaler.step(optim)
        scaler.update()
        optim.zero_grad()
        print("step", step, "loss", f"{loss.item():.4f}")


main()
