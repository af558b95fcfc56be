import torch
import torch.nn as nn
import torch.nn.functional as F


class FrameEncoder(nn.Module):
    def __init__(self, mel=20, dim=32):
        super().__init__()
        self.conv1 = nn.Conv1d(mel, dim, 5, padding=2, bias=False)
        self.conv2 = nn.Conv1d(dim, dim, 3, padding=1, bias=False)

    def forward(self, mel):
        return self.conv2(F.relu(self.conv1(mel)))


class SpeakerNet(nn.Module):
    def __init__(self, speakers=10):
        super().__init__()
        self.encoder = FrameEncoder()
        self.centroids = nn.Parameter(torch.randn(speakers, 32))

    def forward(self, mel):
        frames = self.encoder(mel)
        emb = F.normalize(frames.mean(-1), dim=1)  # <- origin
        # -
        # + emb = F.normalize(frames.mean(-1).float(), dim=1, eps=1e-3)
        weight = F.normalize(self.centroids, dim=1)
        return 16.0 * F.linear(emb, weight)


class Run:
    def __init__(self):
        torch.manual_seed(50)
        self.model = SpeakerNet()
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def utterances(self, step):
        g = torch.Generator().manual_seed(500 + step)
        mel = torch.randn(6, 20, 40, generator=g)
        if step == 3:
            mel[1] = 0.0  # digital silence
        return mel, torch.randint(0, 10, (6,), generator=g)

    def train(self, steps):
        for step in range(steps):
            mel, speaker = self.utterances(step)
            with torch.autocast("cpu", dtype=torch.float16):
                logits = self.model(mel)
            loss = F.cross_entropy(logits.float(), speaker)
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            print(f"step={step} loss={loss.item():.4f}")


Run().train(8)
