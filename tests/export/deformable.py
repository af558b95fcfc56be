"""A small deformable-attention model with its kernel in the two forms that libraries ship: a compiled extension called
past the dispatcher, and the same in tensor operations. ``extension`` is the compiled module, once it is built."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F

extension: ModuleType | None = None

SHAPES = torch.tensor([[4, 4], [2, 2]])
STARTS = torch.tensor([0, 16])

# `torch/extension.h` would bring all of PyTorch, and take the compiler three times as long.
SOURCE = r"""
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

at::Tensor deform_attn_forward(at::Tensor value, at::Tensor shapes, at::Tensor starts,
                                  at::Tensor locations, at::Tensor weights, int64_t step) {
  auto v = value.contiguous(), l = locations.contiguous(), w = weights.contiguous();
  const int64_t B = v.size(0), H = v.size(2), C = v.size(3), Q = l.size(1), L = l.size(3), P = l.size(4);
  auto out = at::zeros({B, Q, H * C}, value.options());
  auto V = v.accessor<float, 4>(); auto X = l.accessor<float, 6>(); auto W = w.accessor<float, 5>();
  auto S = shapes.accessor<int64_t, 2>(); auto T = starts.accessor<int64_t, 1>(); auto O = out.accessor<float, 3>();
  for (int64_t b = 0; b < B; b++) for (int64_t q = 0; q < Q; q++) for (int64_t h = 0; h < H; h++)
    for (int64_t k = 0; k < L; k++) for (int64_t p = 0; p < P; p++) {
      const int64_t height = S[k][0], width = S[k][1];
      const float x = X[b][q][h][k][p][0] * width - 0.5f, y = X[b][q][h][k][p][1] * height - 0.5f;
      const int64_t x0 = std::floor(x), y0 = std::floor(y);
      for (int64_t j = y0; j <= y0 + 1; j++) for (int64_t i = x0; i <= x0 + 1; i++) {
        if (i < 0 || j < 0 || i >= width || j >= height) continue;
        const float f = (1 - std::abs(x - i)) * (1 - std::abs(y - j)) * W[b][q][h][k][p];
        for (int64_t c = 0; c < C; c++) O[b][q][h * C + c] += f * V[b][T[k] + j * width + i][h][c];
      }
    }
  return out;
}
at::Tensor cube(at::Tensor x) {
  auto given = x.contiguous(); auto out = at::empty_like(given);
  const float* a = given.data_ptr<float>(); float* b = out.data_ptr<float>();
  for (int64_t i = 0; i < given.numel(); i++) b[i] = a[i] * a[i] * a[i];
  return out;
}
TORCH_LIBRARY(ampcheck_test, m) { m.def("cube(Tensor x) -> Tensor"); }
TORCH_LIBRARY_IMPL(ampcheck_test, CPU, m) { m.impl("cube", &cube); }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("deform_attn_forward", &deform_attn_forward);
  m.def("cube", &cube);
}
"""


def deform_attn_pytorch(value, shapes, starts, locations, weights, step):
    """Multi-scale deformable attention in tensor operations.

    ``value`` is [batch, keys, heads, channels], ``locations`` [batch, queries, heads, levels, points, 2] in 0 to 1,
    ``weights`` the same without the last dimension. Returns [batch, queries, heads * channels].
    """
    batch, _, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    sizes = [(4, 4), (2, 2)]
    sampled = []
    for level, part in enumerate(value.split([16, 4], dim=1)):
        plane = part.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *sizes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    mixed = torch.stack(sampled, dim=-2).flatten(-2)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    return (mixed * weights).sum(-1).view(batch, heads * channels, queries).transpose(1, 2)


def deform_attn(*args):
    return extension.deform_attn_forward(*args)  # past the dispatcher


class DeformableAttention(nn.Module):
    def __init__(self, dim=8, heads=2, levels=2, points=2):
        super().__init__()
        self.form = (heads, levels, points)
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, query, keys):
        batch, queries, _ = query.shape
        heads, levels, points = self.form
        locations = self.offsets(query).sigmoid().view(batch, queries, heads, levels, points, 2)
        weights = self.weights(query).view(batch, queries, heads, -1).softmax(-1)
        weights = weights.view(batch, queries, heads, levels, points)
        value = self.value(keys).view(batch, keys.shape[1], heads, -1)
        mixed = deform_attn(value, SHAPES, STARTS, locations, weights, 64)
        return self.output(mixed)


class Decoder(nn.Module):
    """Two layers of queries looking at a feature pyramid, and a class score for each query."""

    def __init__(self, dim=8):
        super().__init__()
        self.layers = nn.ModuleList(DeformableAttention(dim) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 3)

    def forward(self, query, keys):
        for layer in self.layers:
            query = query + layer(self.norm(query), keys)
        return self.score(query)


class Cube(nn.Module):
    def forward(self, x):
        return extension.cube(x)  # past the dispatcher


class RegisteredCube(nn.Module):
    def forward(self, x):
        return torch.ops.ampcheck_test.cube(x)
