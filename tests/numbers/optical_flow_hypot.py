import torch
import torch.nn as nn


class FlowHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, a, b):
        x = torch.relu(self.conv1(torch.cat([a, b], 1)))
        return self.conv2(x)


def endpoint_error(flow, target, valid):
    du = (flow[:, 0] - target[:, 0]) * valid
    dv = (flow[:, 1] - target[:, 1]) * valid
    return torch.hypot(du, dv).mean()  # <- origin
    # -
    # + return torch.sqrt(du ** 2 + dv ** 2 + 1e-9).mean()


class SyntheticFlow(torch.utils.data.Dataset):
    def __init__(self, n=40, sparse_from=24):
        g = torch.Generator().manual_seed(55)
        self.frames = torch.randn(n, 2, 3, 12, 12, generator=g)
        self.flow = torch.randn(n, 2, 12, 12, generator=g)
        self.valid = torch.ones(n, 12, 12)
        # from here on the ground truth comes from a lidar and is sparse
        self.valid[sparse_from:] = (torch.rand(n - sparse_from, 12, 12, generator=g) > 0.5).float()

    def __len__(self):
        return len(self.flow)

    def __getitem__(self, i):
        return self.frames[i, 0], self.frames[i, 1], self.flow[i], self.valid[i]


def main():
    torch.manual_seed(56)
    head = FlowHead()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(SyntheticFlow(), batch_size=4)
    for i, (a, b, target, valid) in enumerate(loader):
        optimizer.zero_grad()
        loss = endpoint_error(head(a, b), target, valid)
        loss.backward()
        optimizer.step()
        print(f"{i} epe {loss.item():.4f}")


main()
