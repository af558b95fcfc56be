"""Embeddings put back onto the unit ball before the regularizer's backward, for the epochs after the first."""

import torch
from torch import nn

torch.manual_seed(0)
entities, relations = nn.Embedding(20, 6), nn.Embedding(3, 6)
optimizer = torch.optim.Adagrad([*entities.parameters(), *relations.parameters()], lr=0.1)
triples = torch.stack([torch.randint(0, 20, (30,)), torch.randint(0, 3, (30,)), torch.randint(0, 20, (30,))], 1)


def project_(embedding):
    with torch.no_grad():
        embedding.weight.div_(embedding.weight.norm(dim=1, keepdim=True).clamp(min=1.0))  # <- write


for epoch in range(3):
    for batch in triples.split(10):
        head, relation, tail = batch.unbind(1)
        score = (entities(head) + relations(relation) - entities(tail)).norm(dim=1)
        spread = entities.weight.square().sum(1).mean()  # <- save
        if epoch > 0:
            # -
            project_(entities)
            # -
        loss = score.mean() + 0.01 * spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # + if epoch > 0:
        # +     project_(entities)
