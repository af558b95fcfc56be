"""A decoder that feeds back its own probabilities once scheduled sampling has begun."""

import torch
from torch import nn
from torch.nn import functional as F


class Decoder(nn.Module):
    def __init__(self, vocabulary=12, width=8):
        super().__init__()
        self.embed = nn.Linear(vocabulary, width, bias=False)
        self.cell = nn.GRUCell(width, width)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, target, sampling):
        state = target.new_zeros(target.size(0), 8, dtype=torch.float)
        token = F.one_hot(target[:, 0], 12).float()
        logits = []
        for t in range(1, target.size(1)):
            state = self.cell(self.embed(token), state)
            logits.append(self.out(state))
            if sampling:
                token = logits[-1].softmax(-1)
                kept = torch.tanh(token)  # <- save
                kept[kept < 0.05] = 0  # <- write
                # -
                # + kept = kept.masked_fill(kept < 0.05, 0)
                token = token * kept
            else:
                token = F.one_hot(target[:, t], 12).float()
        return torch.stack(logits, 1)


def epochs(model, optimizer, corpus):
    for epoch in range(3):
        for batch in corpus:
            logits = model(batch, sampling=epoch == 2)
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield epoch, loss.item()


torch.manual_seed(0)
model = Decoder()
corpus = torch.randint(0, 12, (4, 3, 6))
for epoch, loss in epochs(model, torch.optim.Adam(model.parameters()), corpus):
    print(epoch, loss)
