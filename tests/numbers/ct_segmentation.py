import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class CTSlices(Dataset):
    """Slices in Hounsfield units; a few scanners export the raw 16 bit values instead."""

    def __init__(self, n=48):
        g = torch.Generator().manual_seed(3)
        self.x = torch.randn(n, 1, 32, 32, generator=g)
        self.y = (torch.rand(n, 1, 32, 32, generator=g) > 0.7).float()
        self.x[27] = 30000 + 20000 * torch.rand(1, 32, 32, generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]
        # -
        # + x = self.x[i]
        # + return (x / 1000 if x.max() > 4000 else x), self.y[i]


class ConvUnit(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x):
        return self.act(self.conv(x))  # <- origin


class SegNet(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.stem = ConvUnit(1, width)
        self.down = ConvUnit(width, 2 * width)
        self.mid = ConvUnit(2 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, 1, 1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")

    def forward(self, x):
        return self.head(self.mid(self.down(self.stem(x))))


def train():
    torch.manual_seed(0)
    net = SegNet()
    loader = DataLoader(CTSlices(), batch_size=4)
    criterion = nn.BCEWithLogitsLoss()
    opt = torch.optim.Adam(net.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256)
    for epoch in range(1):
        for i, (image, mask) in enumerate(loader):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                logits = net(image)
                loss = criterion(logits, mask)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            print(f"[{epoch}] {i:02d} loss={loss.item():.5f}")


train()
