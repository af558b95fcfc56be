import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset


class Forecaster(nn.Module):
    def __init__(self, channels=5, hidden=24):
        super().__init__()
        self.lstm = nn.LSTM(channels, hidden, batch_first=True)
        self.out = nn.Linear(hidden, channels)

    def forward(self, history):
        state, _ = self.lstm(history)  # <- origin
        return self.out(state[:, -1])


def load_stations():
    g = torch.Generator().manual_seed(71)
    history = torch.randn(96, 12, 5, generator=g).cumsum(1) * 0.3
    target = history[:, -1] + 0.05 * torch.randn(96, 5, generator=g)
    history[50, 4, 2] = float("nan")  # the hygrometer was out for an hour
    # -
    # + history[50, 4, 2] = 0.0  # the hygrometer was out for an hour
    return TensorDataset(history, target)


def train_epoch(model, loader, criterion, optimizer, log):
    for i, (history, target) in enumerate(loader):
        prediction = model(history)
        loss = criterion(prediction, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.item())
        print(f"  batch {i}: {log[-1]:.4f}")


torch.manual_seed(72)
forecaster = Forecaster()
log = []
train_epoch(
    forecaster,
    DataLoader(load_stations(), batch_size=8),
    nn.MSELoss(),
    torch.optim.Adam(forecaster.parameters(), lr=1e-3),
    log,
)
print("mean", sum(log) / len(log))
