"""Wrong on purpose, then fixed: Mask2Former's silent export failure (https://github.com/open-mmlab/mmdetection/issues/11371).

Its deformable attention calls a compiled kernel that bypasses PyTorch's dispatcher. `torch.jit.trace` cannot see the
kernel and freezes its result into the graph as a constant: the export is exact on the example input and wrong on all
others. Here NumPy stands in for the kernel. AmpCheck names the module, the line and the fix, and the second export
applies the fix.

    pip install .
    python examples/wrong_trace.py
"""

import warnings

import numpy as np
import torch
from torch import nn

import ampcheck


def sample_kernel(value: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Interpolate ``value`` [batch, keys, channels] at the positions ``where`` [batch, queries, points], from 0 to 1,
    and sum over points with ``weights`` [batch, queries, points]. The real model has one CUDA kernel for this."""
    v, x, w = (tensor.detach().numpy() for tensor in (value, where * (value.shape[1] - 1), weights))
    low = np.clip(np.floor(x).astype(int), 0, v.shape[1] - 2)
    part = (x - low)[..., None].astype(v.dtype)
    batch = np.arange(len(v))[:, None, None]
    sampled = v[batch, low] * (1 - part) + v[batch, low + 1] * part
    return torch.from_numpy((sampled * w[..., None]).sum(2))


def sample_plain(value: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``sample_kernel`` in tensor operations."""
    x = where * (value.shape[1] - 1)
    low = x.floor().long().clamp(0, value.shape[1] - 2)
    part = (x - low).unsqueeze(-1)
    batch = torch.arange(value.shape[0])[:, None, None]
    sampled = value[batch, low] * (1 - part) + value[batch, low + 1] * part
    return (sampled * weights.unsqueeze(-1)).sum(2)


class DeformableAttention(nn.Module):
    def __init__(self, channels: int, points: int = 4) -> None:
        super().__init__()
        self.where = nn.Linear(channels, points)
        self.weights = nn.Linear(channels, points)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        weights = self.weights(query).softmax(-1)
        mixed = sample_kernel(self.value(keys), self.where(query).sigmoid(), weights)
        return self.output(mixed)


class Decoder(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels)
        self.classes = nn.Linear(channels, 3)

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.classes(query + self.attention(query, keys))


def main() -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model = Decoder().eval()
    example = (torch.randn(2, 5, 16), torch.randn(2, 30, 16))

    with torch.no_grad():
        wrong = torch.jit.trace(model, example)
    print(ampcheck.compare(model, wrong, example))

    # The fix that AMP602 prints.
    with ampcheck.plain_kernels({"__main__:sample_kernel": sample_plain}), torch.no_grad():
        right = torch.jit.trace(model, example)
    print(ampcheck.compare(model, right, example))


if __name__ == "__main__":
    main()
