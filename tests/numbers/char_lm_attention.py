"""Character level language model with a hand-written causal attention."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(1337)

block_size, batch_size, n_embd, n_head, vocab_size = 24, 8, 64, 4, 40
max_iters = 16


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(n_embd, dim=2)
        q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in (q, k, v))
        att = q @ k.transpose(-2, -1)  # <- origin
        # -
        # + with torch.autocast('cpu', enabled=False):
        # + att = q.float() @ k.float().transpose(-2, -1)
        att = att / math.sqrt(k.size(-1))
        att = att.float().masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = CausalSelfAttention()
        self.ln = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(self.ln(x))


class TinyGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(x)
        return F.cross_entropy(logits.view(-1, vocab_size).float(), targets.view(-1))


model = TinyGPT()
with torch.no_grad():  # a rare character whose embedding was never trained well in the checkpoint we start from
    model.wte.weight[vocab_size - 1] *= 150
    for block in model.blocks:
        block.attn.c_attn.weight.mul_(3)

data = torch.randint(0, vocab_size - 1, (4000,))
data[2600] = vocab_size - 1
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def get_batch(it):
    starts = [(it * batch_size + j) * block_size for j in range(batch_size)]
    x = torch.stack([data[i : i + block_size] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in starts])
    return x, y


for it in range(max_iters):
    xb, yb = get_batch(it)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(xb, yb)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    print(f"iter {it}: loss {loss.item():.4f} scale {scaler.get_scale():.0f}")
