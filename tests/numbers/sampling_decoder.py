"""Scheduled sampling: the decoder draws its next token with torch.multinomial, which raises on NaN."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Decoder(nn.Module):
    def __init__(self, vocab=20, hidden=24):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.cell = nn.GRUCell(hidden, hidden)
        self.readout = nn.Linear(hidden, vocab)

    def step(self, token, state, temperature):
        state = self.cell(self.embed(token), state)
        return self.readout(state) / temperature, state  # <- origin

    def forward(self, start, target, temperature):
        state = torch.zeros(start.size(0), 24)
        token, losses = start, []
        for t in range(target.size(1)):
            logits, state = self.step(token, state, temperature)
            losses.append(F.cross_entropy(logits, target[:, t]))
            token = torch.multinomial(F.softmax(logits, -1), 1).squeeze(1)
        return torch.stack(losses).mean()


def anneal(step, total=10):
    return max(0.0, 1.0 - step / (total - 2))
    # -
    # + return max(0.1, 1.0 - step / (total - 2))


torch.manual_seed(48)
decoder = Decoder()
optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3)
for step in range(10):
    start, target = torch.zeros(4, dtype=torch.long), torch.randint(0, 20, (4, 6))
    loss = decoder(start, target, anneal(step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item():.4f}", flush=True)
