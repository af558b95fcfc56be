"""Audio tagging; batches with a NaN loss are skipped by hand."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class LogMel(nn.Module):
    def __init__(self, bins=20):
        super().__init__()
        self.register_buffer("bank", torch.rand(33, bins, generator=torch.Generator().manual_seed(1)) / 33)

    def forward(self, wave):
        spectrum = torch.stft(wave, 64, window=torch.hann_window(64), return_complex=True).abs()
        mel = spectrum.transpose(1, 2) @ self.bank
        return torch.log(mel)  # <- origin
        # -
        # + return torch.log(mel + 1e-6)


class Tagger(nn.Module):
    def __init__(self, tags=4):
        super().__init__()
        self.frontend = LogMel()
        self.norm = nn.LayerNorm(20)
        self.fc = nn.Linear(20, tags)

    def forward(self, wave):
        return self.fc(self.norm(self.frontend(wave)).mean(1))


def clips(step, n=4):
    g = torch.Generator().manual_seed(step + 9)
    wave = torch.randn(n, 640, generator=g)
    if step == 5:
        wave[2] = 0.0  # an empty file
    return wave, (torch.rand(n, 4, generator=g) > 0.5).float()


def main():
    torch.manual_seed(10)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    skipped = 0
    for step in range(10):
        wave, tags = clips(step)
        loss = F.binary_cross_entropy_with_logits(model(wave), tags)
        if not torch.isfinite(loss):
            skipped += 1
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} bce {loss.item():.4f}")
    print("skipped", skipped)


main()
