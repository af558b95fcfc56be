"""Encoder-decoder cross attention where the padding mask and the span mask are both added."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def to_additive(mask, dtype):
    return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min


class CrossAttention(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, d, bias=False)
        self.v = nn.Linear(d, d, bias=False)

    def forward(self, x, memory, pad, span):
        scores = torch.bmm(self.q(x), self.k(memory).transpose(1, 2)) * 0.17
        scores = scores + to_additive(pad, scores.dtype)[:, None]
        # -
        scores = scores + to_additive(span, scores.dtype)[:, None]  # <- origin
        # -
        # + scores = scores + to_additive(pad & span, scores.dtype)[:, None]
        probs = F.softmax(scores, dim=-1)  # <- origin
        return torch.bmm(probs, self.v(memory))


class Reader(nn.Module):
    def __init__(self, vocab=80, d=32):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.cross = CrossAttention(d)
        self.head = nn.Linear(d, vocab)

    def forward(self, question, passage, span):
        memory = self.emb(passage)
        x = self.emb(question)
        return self.head(x + self.cross(x, memory, passage != 0, span))


def examples(step, batch=4):
    g = torch.Generator().manual_seed(step)
    question = torch.randint(1, 80, (batch, 5), generator=g)
    passage = torch.randint(1, 80, (batch, 12), generator=g)
    passage[:, 9:] = 0
    span = torch.zeros(batch, 12, dtype=torch.bool)
    span[:, 2:7] = True
    if step == 5:
        span[1] = False
        passage[1] = 0  # the passage was cut off before the span
    return question, passage, span


def train(steps=9):
    torch.manual_seed(29)
    model = Reader()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(steps):
        question, passage, span = examples(step)
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(question, passage, span)
            loss = F.cross_entropy(logits.flatten(0, 1), question.flatten())
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        print(f"step {step} loss {loss.item():.4f}")


train()
