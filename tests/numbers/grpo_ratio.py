"""Policy optimisation with a clipped importance ratio over padded completions."""

import torch
import torch.nn as nn
import torch.nn.functional as F

CLIP = 0.2


class Policy(nn.Module):
    def __init__(self, vocab=30, dim=24):
        super().__init__()
        self.emb = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, dim, batch_first=True)
        self.lm = nn.Linear(dim, vocab)

    def log_probs(self, tokens):
        h, _ = self.rnn(self.emb(tokens[:, :-1]))
        return F.log_softmax(self.lm(h), -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def policy_loss(new, old, advantage, mask):
    ratio = torch.exp(new - old)  # <- origin
    # -
    # + ratio = torch.exp((new - old).clamp(max=20.0))
    clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
    per_token = -torch.min(ratio * advantage[:, None], clipped * advantage[:, None])
    return torch.where(mask, per_token, torch.zeros_like(per_token)).sum() / mask.sum()


def rollout(policy, step, batch=6, length=10):
    g = torch.Generator().manual_seed(3000 + step)
    tokens = torch.randint(1, 30, (batch, length), generator=g)
    with torch.no_grad():
        old = policy.log_probs(tokens)
    lengths = torch.randint(4, length - 1, (batch,), generator=g)
    mask = torch.arange(length - 1)[None] < lengths[:, None]
    if step == 6:
        old[2, -1] = -200.0  # the sampler reports a floor for tokens after the end
    advantage = torch.randn(batch, generator=g)
    advantage[2] = 1.0
    return tokens, old, advantage, mask


def main():
    torch.manual_seed(30)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for step in range(10):
        tokens, old, advantage, mask = rollout(policy, step)
        for _ in range(1):
            loss = policy_loss(policy.log_probs(tokens), old, advantage, mask)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        print(f"update {step}: loss {loss.item():+.5f}")


main()
