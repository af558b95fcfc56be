"""Feature whitening through the eigenvectors of the covariance."""

import torch
import torch.nn as nn


class Whitening(nn.Module):
    def __init__(self, shrink=0.1):
        super().__init__()
        self.shrink = shrink

    def forward(self, z):
        z = z - z.mean(0)
        cov = z.t() @ z / (z.size(0) - 1)
        cov = cov + self.shrink * torch.eye(z.size(1))
        values, vectors = torch.linalg.eigh(cov)  # <- origin
        # -
        return z @ vectors @ torch.diag(values.rsqrt()) @ vectors.t()
        # -
        # + return torch.linalg.solve_triangular(torch.linalg.cholesky(cov), z.t(), upper=False).t()


class WhitenedEncoder(nn.Module):
    def __init__(self, n_in=10, n_out=4):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.white = Whitening()

    def forward(self, x):
        return self.white(self.linear(x))


def two_views(i, n=24):
    rng = torch.Generator().manual_seed(i)
    x = torch.randn(n, 10, generator=rng)
    if i == 9:
        x = x[:1].expand(n, 10).clone()  # a frozen video: the same frame n times
    return x, x + 0.1 * torch.randn(n, 10, generator=rng)


torch.manual_seed(42)
enc = WhitenedEncoder()
opt = torch.optim.Adam(enc.parameters(), lr=1e-3)
for i in range(12):
    a, b = two_views(i)
    loss = (enc(a) - enc(b)).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"iter={i:02d} w-mse={loss.item():.4f}")
