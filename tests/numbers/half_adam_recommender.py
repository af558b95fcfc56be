"""Matrix factorisation with everything in half precision and Adam."""

import torch
import torch.nn as nn


class MatrixFactorization(nn.Module):
    def __init__(self, users=40, items=60, dim=8):
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.item = nn.Embedding(items, dim)
        nn.init.normal_(self.user.weight, std=0.3)
        nn.init.normal_(self.item.weight, std=0.3)

    def forward(self, u, i):
        return (self.user(u) * self.item(i)).sum(-1)


class Ratings:
    def __init__(self, n=480):
        g = torch.Generator().manual_seed(17)
        self.u = torch.randint(0, 40, (n,), generator=g)
        self.i = torch.randint(0, 60, (n,), generator=g)
        self.r = torch.randint(1, 6, (n,), generator=g).half() / 5

    def batches(self, size):
        for k in range(0, len(self.u), size):
            yield self.u[k : k + size], self.i[k : k + size], self.r[k : k + size]


def main():
    torch.manual_seed(3)
    model = MatrixFactorization().half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # -
    # + optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4)
    ratings = Ratings()
    for epoch in range(2):
        for step, (u, i, r) in enumerate(ratings.batches(32)):
            loss = ((model(u, i) - r) ** 2).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 5 == 0:
                print(f"epoch {epoch} step {step} rmse {loss.item() ** 0.5:.4f}")


main()
