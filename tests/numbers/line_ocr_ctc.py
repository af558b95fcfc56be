import torch
import torch.nn as nn


class LineReader(nn.Module):
    def __init__(self, height=8, alphabet=12):
        super().__init__()
        self.conv = nn.Conv1d(height, 24, 3, stride=2, padding=1)
        self.rnn = nn.GRU(24, 24, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(48, alphabet + 1)

    def forward(self, lines):
        features = torch.relu(self.conv(lines)).transpose(1, 2)
        states, _ = self.rnn(features)
        return self.fc(states).log_softmax(-1)


def lines(step, batch=5, width=32):
    g = torch.Generator().manual_seed(step + 40)
    image = torch.rand(batch, 8, width, generator=g)
    lengths = torch.randint(2, 6, (batch,), generator=g)
    if step == 4:
        lengths[3] = 15  # a long word in a narrow crop, with repeated letters
    targets = torch.randint(1, 13, (batch, 15), generator=g)
    targets[3, :] = 5
    return image, targets, lengths


class OCRTrainer:
    def __init__(self):
        torch.manual_seed(41)
        self.model = LineReader()
        self.ctc = nn.CTCLoss(blank=0)
        # -
        # + self.ctc = nn.CTCLoss(blank=0, zero_infinity=True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def train(self, steps):
        for step in range(steps):
            image, targets, lengths = lines(step)
            log_probs = self.model(image).transpose(0, 1)
            frames = torch.full((image.size(0),), log_probs.size(0))
            loss = self.ctc(log_probs, targets, frames, lengths)  # <- origin
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            print(f"{step} ctc {loss.item():.4f}")


OCRTrainer().train(8)
