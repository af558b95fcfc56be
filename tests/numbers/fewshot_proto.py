import torch
import torch.nn as nn
import torch.nn.functional as F


class Encoder(nn.Module):
    def __init__(self, dim_in=32, hidden=64, z=48):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim_in, hidden), nn.ReLU(), nn.Linear(hidden, z))

    def forward(self, x):
        return self.layers(x)


class ProtoNet(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def distances(self, query, proto):
        diff = query[:, None, :] - proto[None]
        return diff.pow(2).sum(-1)  # <- origin
        # -
        # + return diff.float().pow(2).sum(-1)

    def forward(self, support, query, n_way, n_shot):
        z_s = self.encoder(support).view(n_way, n_shot, -1)
        proto = z_s.mean(1)
        z_q = self.encoder(query)
        return -self.distances(z_q, proto)


def episode(i, n_way=4, n_shot=3, n_query=5):
    g = torch.Generator().manual_seed(100 + i)
    unit = 900.0 if i == 5 else 1.0  # this domain was not normalised
    centers = torch.randn(n_way, 32, generator=g) * unit
    support = (centers[:, None] + 0.3 * unit * torch.randn(n_way, n_shot, 32, generator=g)).reshape(-1, 32)
    query = (centers[:, None] + 0.3 * unit * torch.randn(n_way, n_query, 32, generator=g)).reshape(-1, 32)
    labels = torch.arange(n_way).repeat_interleave(n_query)
    return support, query, labels


def fit(episodes=9):
    torch.manual_seed(9)
    model = ProtoNet(Encoder())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for e in range(episodes):
        support, query, labels = episode(e)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(support, query, 4, 3)
            loss = F.cross_entropy(logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        acc = (logits.argmax(1) == labels).float().mean()
        print(f"episode {e} loss {loss.item():.3f} acc {acc:.2f}")


fit()
