"""Transformers, recurrent nets and other models of sequences, sets and graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .recipe import Recipe, Training, classifier

WORDS = 40


def _tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(WORDS, (batch, length))


class Encoder(nn.Module):
    """A classifier of token sequences, with padding where ``padded``."""

    def __init__(self, *, norm_first: bool = False, padded: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.position = nn.Parameter(torch.zeros(1, 12, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=padded)
        self.head = nn.Linear(32, 10)
        self.padded = padded

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens == 0) & (torch.arange(tokens.shape[1]) > 0) if self.padded else None
        x: Tensor = self.encoder(self.embed(tokens) + self.position, src_key_padding_mask=mask)
        return self.head(x.mean(1))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True))


class Block(nn.Module):
    """Causal attention with a cache of keys and values, grouped heads and rotary positions, and a gated MLP."""

    def __init__(self, width: int, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.side = heads, groups, width // heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * groups * self.side, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        batch, length, width = x.shape
        y = self.norms[0](x)
        q = self.q(y).view(batch, length, self.heads, self.side).transpose(1, 2)
        k, v = self.kv(y).view(batch, length, 2, self.groups, self.side).permute(2, 0, 3, 1, 4)
        q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        if cache is not None:
            if cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache.pop(), (k, v), strict=True))
            cache.append((k, v))
        repeats = self.heads // self.groups
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        attended = F.scaled_dot_product_attention(q, k.to(q.dtype), v, is_causal=length > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class LanguageModel(nn.Module):
    """A decoder whose output layer is its embedding."""

    frequencies: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(4) / 4))

    def forward(
        self, tokens: Tensor, caches: list[list[tuple[Tensor, Tensor]]] | None = None, start: int = 0
    ) -> Tensor:
        angles = torch.arange(start, start + tokens.shape[1])[:, None] * self.frequencies
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, (angles.cos(), angles.sin()), caches[number] if caches else None)
        return self.head(self.norm(x))

    def generate(self, tokens: Tensor, count: int) -> Tensor:
        caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.blocks]
        logits, words = self(tokens, caches), [tokens]
        for step in range(count):
            words.append(logits[:, -1:].argmax(-1))
            logits = self(words[-1], caches, tokens.shape[1] + step)
        return torch.cat(words, 1)


def _encoder(**options: bool) -> Callable[[], Training]:
    return lambda: classifier(Encoder(**options), _tokens())


def _translator() -> Training:
    model, source, target = Translator(), _tokens(), _tokens()

    def loss() -> Tensor:
        logits = model(source, target[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), label_smoothing=0.1)

    return Training(model, loss, lambda: model(source, target))


def _language_model() -> Training:
    model, tokens = LanguageModel(), _tokens()

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Training(model, loss, lambda: model.generate(tokens[:, :4], 4), optimizer=optimizer)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], *, packed: bool, bidirectional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.net = kind(16, 24, num_layers=2, batch_first=True, bidirectional=bidirectional, dropout=0.1)
        self.head = nn.Linear(24 * (1 + bidirectional), 10)
        self.packed = packed

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor | PackedSequence = self.embed(tokens)
        if self.packed:
            x = pack_padded_sequence(x, torch.tensor([12, 7]), batch_first=True, enforce_sorted=False)
        x = self.net(x)[0]
        if isinstance(x, PackedSequence):
            x = pad_packed_sequence(x, batch_first=True)[0]
        return self.head(x[:, -1])


class Cells(nn.Module):
    """Recurrent cells, unrolled in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(WORDS, 16), nn.GRUCell(16, 24), nn.Linear(24, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        state = None
        for x in self.embed(tokens).unbind(1):
            state = self.cell(x, state)
        return self.head(state)


def _recurrent(kind: type[nn.RNNBase], *, packed: bool = False, bidirectional: bool = False) -> Callable[[], Training]:
    return lambda: classifier(Recurrent(kind, packed=packed, bidirectional=bidirectional), _tokens())


class Speech(nn.Module):
    """Log probabilities of letters over time."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        self.net = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 12)

    def forward(self, sound: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.net(self.front(sound).transpose(1, 2))[0]).float(), dim=-1)


def _speech() -> Training:
    model, sound, text = Speech(), torch.randn(2, 8, 20), torch.randint(1, 12, (2, 5))
    lengths = torch.tensor([20, 20]), torch.tensor([5, 4])
    return Training(model, lambda: F.ctc_loss(model(sound).transpose(0, 1), text, *lengths), lambda: model(sound))


class Bags(nn.Module):
    """Bags of words, with sparse gradients for the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, 16, mode="mean", sparse=True)
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


class Graph(nn.Module):
    """Two rounds of message passing: ``index_add`` to nodes, then ``scatter_reduce`` to graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = nn.ModuleList(nn.Linear(2 * 16, 16) for _ in range(2))
        self.embed, self.norm, self.head = nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        x = self.embed(nodes)
        for layer in self.messages:
            message = F.relu(layer(torch.cat((x[edges[0]], x[edges[1]]), dim=1)))
            x = self.norm(x + message.new_zeros(len(x), 16).index_add(0, edges[1], message))
        index = graph[:, None].expand_as(x)
        pooled = x.new_zeros(2, 16).scatter_reduce(0, index, x, "mean", include_self=False)
        return self.head(pooled)


def _graph() -> Training:
    model, nodes, edges = Graph(), torch.randn(12, 4), torch.randint(12, (2, 30))
    graph, labels = torch.arange(12) // 6, torch.randint(3, (2,))
    return Training(
        model, lambda: F.cross_entropy(model(nodes, edges, graph), labels), lambda: model(nodes, edges, graph)
    )


class PointSet(nn.Module):
    """Pairwise distances, neighbours by top-k, features by gather and max."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, points: Tensor) -> Tensor:
        near = torch.cdist(points.float(), points.float()).topk(4, largest=False).indices
        neighbours = points[torch.arange(len(points))[:, None, None], near]
        pairs = torch.cat((neighbours - points[:, :, None], points[:, :, None].expand_as(neighbours)), dim=-1)
        return self.head(self.point(pairs).amax(2).mean(1))


class Experts(nn.Module):
    """A sparse mixture of experts: each token goes to two of four, and comes back by ``index_add_``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4))
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            part = expert(x[token]) * weights[token, rank, None]
            result.index_add_(0, token, part.to(result.dtype))
        return self.head((x + result).view(*tokens.shape, -1).mean(1))


class StateSpace(nn.Module):
    """A linear recurrence, computed as an FFT convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.decay = nn.Parameter(torch.linspace(-3, 0, 16))
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        length = x.shape[1]
        kernel = torch.exp(-torch.exp(self.decay) * torch.arange(length)[:, None])
        spectrum = torch.fft.rfft(x.float(), 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
        y = torch.fft.irfft(spectrum, dim=1)[:, :length]
        return self.head(F.silu(self.mix(y)).mean(1))


class Jagged(nn.Module):
    """Sequences of different lengths in one nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, parts: list[Tensor]) -> Tensor:
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
        x = self.layers(nested)
        return torch.stack([part.mean(0) for part in x.unbind()])


def _jagged() -> Training:
    model, parts, labels = Jagged(), [torch.randn(n, 8) for n in (3, 5, 2)], torch.randint(10, (3,))
    return Training(model, lambda: F.cross_entropy(model(parts), labels), lambda: model(parts))


def _bags() -> Training:
    model = Bags()
    training = classifier(model, _tokens())
    training.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    return training


SEQUENCES = [
    Recipe(f"sequence/{name}", "sequences, sets, graphs", build)
    for name, build in {
        "encoder": _encoder(),
        "encoder, norm first": _encoder(norm_first=True),
        "encoder, padded": _encoder(padded=True),
        "translator": _translator,
        "language model, kv cache, tied": _language_model,
        "lstm": _recurrent(nn.LSTM),
        "lstm, packed": _recurrent(nn.LSTM, packed=True, bidirectional=True),
        "gru": _recurrent(nn.GRU),
        "gru, packed": _recurrent(nn.GRU, packed=True),
        "rnn": _recurrent(nn.RNN),
        "gru cells": lambda: classifier(Cells(), _tokens()),
        "speech, ctc": _speech,
        "embedding bag, sparse": _bags,
        "graph net": _graph,
        "point set": lambda: classifier(PointSet(), torch.randn(2, 20, 3)),
        "mixture of experts": lambda: classifier(Experts(), _tokens()),
        "state space, fft": lambda: classifier(StateSpace(), _tokens()),
        "nested tensor": _jagged,
    }.items()
]
