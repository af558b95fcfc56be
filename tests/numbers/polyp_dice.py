import torch
import torch.nn as nn


def double_conv(cin, cout):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class UNetSmall(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = double_conv(3, 8)
        self.pool = nn.MaxPool2d(4)
        self.bottom = double_conv(8, 16)
        self.up = nn.Upsample(scale_factor=4)
        self.final = nn.Conv2d(24, 1, 1)

    def forward(self, x):
        e = self.enc(x)
        b = self.up(self.bottom(self.pool(e)))
        return self.final(torch.cat([e, b], dim=1))


class SoftDiceLoss:
    def __init__(self, smooth=1.0):
        self.smooth = smooth

    def __call__(self, logits, target):
        prob = torch.sigmoid(logits)
        # -
        # + prob = torch.sigmoid(logits.float())
        target = target.to(prob.dtype)
        inter = (prob * target).sum(dim=(1, 2, 3))
        total = prob.sum(dim=(1, 2, 3)) + target.sum(dim=(1, 2, 3))  # <- origin
        return 1 - ((2 * inter + self.smooth) / (total + self.smooth)).mean()


def batches(n, size=288):
    g = torch.Generator().manual_seed(8)
    for k in range(n):
        images = torch.rand(2, 3, size, size, generator=g)
        masks = torch.zeros(2, 1, size, size)
        masks[:, :, 60:120, 60:120] = 1
        if k == 4:
            masks[1] = 1.0  # a close-up: everything is foreground
        yield images, masks


torch.manual_seed(2)
model = UNetSmall()
dice = SoftDiceLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

for step, (images, masks) in enumerate(batches(7)):
    with torch.autocast("cpu", dtype=torch.float16):
        out = model(images)
        loss = dice(out, masks)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    print(f"step {step} dice loss {loss.item():.4f}")
