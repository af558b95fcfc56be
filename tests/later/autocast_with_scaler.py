"""Mixed precision with a scaler; label smoothing of the probabilities starts after some steps."""

import torch
from torch import nn

torch.manual_seed(0)
device = "cpu"
model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
scaler = torch.amp.GradScaler(device, init_scale=16.0)
for step in range(9):
    x, y = torch.randn(16, 12, device=device), torch.randint(0, 5, (16,), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        probabilities = model(x).softmax(-1)  # <- save
        if step > 4:
            probabilities += 1e-2  # <- write
            # -
            # + probabilities = probabilities + 1e-2
        loss = -probabilities.log().gather(1, y[:, None]).mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
