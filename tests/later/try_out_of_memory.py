"""A step inside try, which skips batches that do not fit into memory."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
embed = nn.Embedding(30, 12)
rnn = nn.LSTM(12, 12, batch_first=True)
out = nn.Linear(12, 30)
parameters = [*embed.parameters(), *rnn.parameters(), *out.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-3)
skipped = 0
for length in (5, 6, 7, 8, 9, 10):
    tokens = torch.randint(0, 30, (3, length))
    try:
        optimizer.zero_grad()
        hidden, _ = rnn(embed(tokens[:, :-1]))
        gate = torch.sigmoid(hidden)  # <- save
        if length > 8:
            gate[:, 8:].zero_()  # <- write
            # -
            # + gate = torch.cat([gate[:, :8], torch.zeros_like(gate[:, 8:])], 1)
        loss = F.cross_entropy(out(hidden * gate).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        skipped += 1
