"""Click-through model; a division in the feature pipeline leaves inf in one row."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Clicks(Dataset):
    def __init__(self):
        r = torch.Generator().manual_seed(11)
        shown = torch.randint(1, 50, (120,), generator=r).float()
        clicked = torch.randint(1, 20, (120,), generator=r).float()
        shown[75] = 0
        # -
        # + shown[75] = 1
        self.dense = torch.stack([clicked / shown, shown / 50, clicked / 20], 1)
        self.cat = torch.randint(0, 30, (120,), generator=r)
        self.y = (clicked > 10).float()

    def __len__(self):
        return 120

    def __getitem__(self, i):
        return {"dense": self.dense[i], "cat": self.cat[i], "y": self.y[i]}


class WideDeep(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom = nn.Linear(3, 16)
        self.table = nn.Embedding(30, 16)
        self.top = nn.Linear(32, 1)

    def forward(self, batch):
        x = torch.relu(self.bottom(batch["dense"]))  # <- origin
        return self.top(torch.cat([x, self.table(batch["cat"])], 1)).squeeze(1)


torch.manual_seed(12)
model, bce = WideDeep(), nn.BCEWithLogitsLoss()
opt = torch.optim.Adagrad(model.parameters(), lr=0.01)
for n, batch in enumerate(DataLoader(Clicks(), batch_size=10)):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logit = model(batch)
    loss = bce(logit.float(), batch["y"])
    opt.zero_grad()
    loss.backward()
    opt.step()
    print("batch", n, "logloss", f"{loss.item():.4f}")
