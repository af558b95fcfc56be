import torch
import torch.nn as nn


class MaskedMeanPool(nn.Module):
    """Mean over the valid tokens."""

    def forward(self, x, valid):
        weights = valid.unsqueeze(-1).to(x.dtype)
        total = (x * weights).sum(1)
        count = torch.clamp(weights.sum(1), min=1e-9)
        # -
        # + count = torch.clamp(weights.sum(1), min=1.0)
        return total / count  # <- origin


class SentenceClassifier(nn.Module):
    def __init__(self, vocab=60, dim=24, classes=5):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim, padding_idx=0)
        self.mix = nn.Linear(dim, dim)
        self.pool = MaskedMeanPool()
        self.classifier = nn.Linear(dim, classes)

    def forward(self, ids):
        valid = ids != 0
        x = torch.tanh(self.mix(self.embedding(ids)))
        return self.classifier(self.pool(x, valid))


def sentences(n_batches, batch=6, length=9):
    g = torch.Generator().manual_seed(44)
    out = []
    for b in range(n_batches):
        ids = torch.randint(1, 60, (batch, length), generator=g)
        for row in range(batch):
            ids[row, 3 + row :] = 0
        out.append((ids, torch.randint(0, 5, (batch,), generator=g)))
    out[5][0][4] = 0
    return out


def train_one_epoch(model, data, optimizer, loss_fn, scaler):
    model.train()
    running = 0.0
    for step, (ids, labels) in enumerate(data):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(ids)
            loss = loss_fn(logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        running += loss.item()
        print(f"batch {step}: running loss {running / (step + 1):.4f}")


torch.manual_seed(45)
model = SentenceClassifier()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
train_one_epoch(model, sentences(9), optimizer, nn.CrossEntropyLoss(), torch.amp.GradScaler("cpu", init_scale=2.0**10))
