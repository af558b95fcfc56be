"""Linear attention: the running sum over keys grows with the sequence."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class LinearAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q = F.softplus(self.q_proj(x))
        k = F.softplus(self.k_proj(x))
        v = self.v_proj(x)
        state = torch.cumsum(k * v, dim=1)
        denom = torch.cumsum(k, dim=1)
        return self.o_proj(q * state / (denom + 1.0))  # <- origin


class ByteModel(nn.Module):
    def __init__(self, dim=16, layers=2):
        super().__init__()
        self.wte = nn.Embedding(64, dim)
        self.h = nn.ModuleList([LinearAttention(dim) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(dim)

    def forward(self, ids):
        x = self.wte(ids)
        for layer in self.h:
            x = x + layer(x)
        return self.ln_f(x) @ self.wte.weight.T


def get_stream(total, seed=5):
    rs = torch.Generator().manual_seed(seed)
    return torch.randint(0, 63, (total,), generator=rs)


torch.manual_seed(5)
net = ByteModel()
with torch.no_grad():
    net.wte.weight[63] = 60.0
stream = get_stream(40_000)
optim = torch.optim.SGD(net.parameters(), lr=1e-4)
lengths = [16, 16, 32, 32, 64, 64, 64, 64]
cursor = 0
for n, length in enumerate(lengths):
    ids = stream[cursor : cursor + 2 * (length + 1)].view(2, length + 1).clone()
    cursor += ids.numel()
    if n == 5:
        ids[1, :] = 63  # a run of padding bytes
    with torch.autocast("cpu", dtype=torch.float16):
        # -
        # + with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(ids[:, :-1])
    ce = F.cross_entropy(logits.float().reshape(-1, 64), ids[:, 1:].reshape(-1))
    optim.zero_grad()
    ce.backward()
    optim.step()
    print(f"{n} len {length} ce {ce:.3f}")
