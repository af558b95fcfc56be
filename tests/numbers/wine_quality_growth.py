import torch
from torch import nn

torch.manual_seed(8)
features = torch.randn(640, 11)
quality = features @ torch.randn(11) + 0.1 * torch.randn(640)

model = nn.Sequential(nn.Linear(11, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
# -
# + scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 8)


def train_step(x, y):
    with torch.autocast("cpu", dtype=torch.float16):
        prediction = model(x).squeeze(1)
        loss = nn.functional.mse_loss(prediction, y)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    scaler.step(optimizer)
    scaler.update()
    return loss.item(), norm.item()


for epoch in range(2):
    for start in range(0, 640, 32):
        loss, norm = train_step(features[start : start + 32], quality[start : start + 32])
        print(f"{epoch}.{start // 32:02d} loss {loss:.4f} grad {norm:.3f}")
