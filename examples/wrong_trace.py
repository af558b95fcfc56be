"""Wrong on purpose, then repaired: Mask2Former's silent export failure (https://github.com/open-mmlab/mmdetection/issues/11371).

Its deformable attention calls a compiled kernel past PyTorch's dispatcher. `torch.jit.trace` cannot see the kernel, and
freezes its answer to the example into the graph: the export is exact on the example and useless on everything else.
NumPy stands in for the kernel here. AmpCheck names the module, the line and what to do; the second export does it.

    pip install ampcheck
    python examples/wrong_trace.py
"""

import warnings

import numpy as np
import torch
from torch import nn

import ampcheck


def sample_kernel(value: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sample ``value`` [batch, keys, channels] at ``where`` [batch, queries, points] in 0 to 1, between two keys each,
    and mix by ``weights`` [batch, queries, points]: what a CUDA kernel does in one go."""
    v, x, w = (tensor.detach().numpy() for tensor in (value, where * (value.shape[1] - 1), weights))
    low = np.clip(np.floor(x).astype(int), 0, v.shape[1] - 2)
    part = (x - low)[..., None].astype(v.dtype)
    batch = np.arange(len(v))[:, None, None]
    sampled = v[batch, low] * (1 - part) + v[batch, low + 1] * part
    return torch.from_numpy((sampled * w[..., None]).sum(2))


def sample_plain(value: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same in tensor operations."""
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

    # The fix of AMP602, as printed.
    with ampcheck.plain_kernels({"__main__:sample_kernel": sample_plain}), torch.no_grad():
        right = torch.jit.trace(model, example)
    print(ampcheck.compare(model, right, example))


if __name__ == "__main__":
    main()
