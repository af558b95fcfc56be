"""Set prediction of masks with Hungarian matching (a small MaskFormer)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

NUM_QUERIES, SIDE = 6, 96


class HungarianMatcher:
    def __init__(self, weight=1.0):
        self.weight = weight

    @torch.no_grad()
    def __call__(self, pred, gt):
        # + pred = pred.float()
        pos = F.softplus(-pred.flatten(1))
        neg = F.softplus(pred.flatten(1))
        gt = gt.flatten(1).to(pred.dtype)
        cost = torch.einsum("qc,nc->qn", pos, gt) + torch.einsum("qc,nc->qn", neg, 1 - gt)  # <- origin
        return linear_sum_assignment(self.weight * cost.float().numpy())


class MaskHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.queries = nn.Embedding(NUM_QUERIES, 16)

    def forward(self, x):
        feats = self.backbone(x)
        return torch.einsum("qc,bchw->bqhw", self.queries.weight, feats)


def make_sample(g, k):
    image = torch.randn(3, SIDE, SIDE, generator=g)
    masks = torch.zeros(3, SIDE, SIDE)
    for n in range(3):
        top = 4 + 20 * n
        masks[n, top : top + 24, 8:60] = 1
    if k == 7:
        image *= 60.0  # forgot to divide by the standard deviation
    return image, masks


def main():
    torch.manual_seed(5)
    g = torch.Generator().manual_seed(21)
    model, matcher = MaskHead(), HungarianMatcher()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for it in range(12):
        image, masks = make_sample(g, it)
        with torch.autocast("cpu", dtype=torch.float16):
            pred = model(image[None])[0]
            rows, cols = matcher(pred, masks)
            # -
        # + rows, cols = matcher(pred, masks)
        chosen = pred[torch.as_tensor(rows)].float()
        loss = F.binary_cross_entropy_with_logits(chosen, masks[torch.as_tensor(cols)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"it {it} loss {loss.item():.4f}")


main()
