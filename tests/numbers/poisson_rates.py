import torch
import torch.nn as nn


class SpikeModel(nn.Module):
    """Log-linear Poisson model of spike counts."""

    def __init__(self, stimuli=5, neurons=7):
        super().__init__()
        self.filters = nn.Linear(stimuli, neurons)

    def forward(self, s):
        return self.filters(s)


def negative_log_likelihood(log_rate, counts):
    return (torch.exp(log_rate) - counts * log_rate).sum(dim=-1).mean()  # <- origin
    # -
    # + return (torch.exp(log_rate.clamp(max=10.0)) - counts * log_rate).sum(dim=-1).mean()


class Session:
    def __init__(self, n=200):
        rng = torch.Generator().manual_seed(64)
        self.s = torch.randn(n, 5, generator=rng)
        self.counts = torch.poisson(torch.exp(0.5 * self.s.sum(1, keepdim=True)).expand(n, 7), generator=rng)
        self.s[131] *= 4000.0  # an artefact of the stimulus monitor

    def __iter__(self):
        for k in range(0, 200, 20):
            yield self.s[k : k + 20], self.counts[k : k + 20]


def main():
    torch.manual_seed(63)
    model = SpikeModel()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    for number, (s, counts) in enumerate(Session()):
        nll = negative_log_likelihood(model(s), counts)
        sgd.zero_grad()
        nll.backward()
        sgd.step()
        print(number, "nll", nll.item())


main()
