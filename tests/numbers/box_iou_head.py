"""Single-object detector that regresses a box in pixels and is trained with an IoU loss."""

import torch
from torch import nn, optim


def box_area(boxes):
    w = boxes[:, 2] - boxes[:, 0]
    h = boxes[:, 3] - boxes[:, 1]
    return w * h  # <- origin
    # -
    # + return w.float() * h.float()


def iou_loss(pred, target):
    lt = torch.maximum(pred[:, :2], target[:, :2])
    rb = torch.minimum(pred[:, 2:], target[:, 2:])
    wh = (rb - lt).clamp(min=0)
    inter = wh[:, 0].float() * wh[:, 1].float()
    union = box_area(pred) + box_area(target) - inter
    return (1 - inter / union.clamp(min=1.0)).mean()


class BoxNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.box = nn.Linear(48, 4)

    def forward(self, x, size):
        c = self.box(self.features(x)).sigmoid()
        half = 0.25 + 0.25 * c[:, 2:]
        centre = 0.4 + 0.2 * c[:, :2]
        unit = torch.cat([centre - half, centre + half], 1)
        return unit * size[:, None].to(unit.dtype)


def loader(steps, batch=6):
    g = torch.Generator().manual_seed(77)
    for s in range(steps):
        x = torch.randn(batch, 3, 40, 40, generator=g)
        size = torch.full((batch,), 160.0)
        if s == 6:
            size[2] = 640.0  # one full-resolution picture
            size[5] = 800.0
        lo = 0.2 * size[:, None] * torch.rand(batch, 2, generator=g)
        hi = size[:, None] * (0.6 + 0.1 * torch.rand(batch, 2, generator=g))
        yield x, size, torch.cat([lo, hi], 1)


def run():
    torch.manual_seed(4)
    net = BoxNet()
    opt = optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    history = []
    for s, (x, size, gt) in enumerate(loader(11)):
        with torch.autocast("cpu", dtype=torch.float16):
            pred = net(x, size)
            loss = iou_loss(pred, gt)
            # the areas are small numbers for the regulariser
            loss = loss + 1e-4 * (box_area(pred).float().log() - box_area(gt).log()).abs().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        history.append(loss.item())
        print("step %d  loss %.4f" % (s, history[-1]))
    print("last", history[-1])


run()
