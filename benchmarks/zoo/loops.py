"""Small networks trained in the many ways people train: several optimizers, adapters, averaged copies, closures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .recipe import Precision, Recipe, Training, classifier

Optimizers = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def block(inner: int, outer: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        block(3, 16), nn.MaxPool2d(2), block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def perceptron(outputs: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, outputs))


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


def vectors() -> Tensor:
    return torch.randn(8, 16)


def with_optimizer(optimizers: Optimizers) -> Callable[[], Training]:
    def build() -> Training:
        training = classifier(model := convolutional(), images())
        training.optimizers = [optimizers(model.parameters())]
        return training

    return build


class Accumulating(Training):
    """Three batches a step, gradients clipped after they are unscaled."""

    def step(self, precision: Precision) -> Tensor:
        (optimizer,) = self.optimizers
        total = torch.zeros(())
        for _ in range(3):
            with precision.autocast():
                loss = self.loss() / 3
            precision.backward(loss)
            total += loss.detach()
        if precision.scaler is not None:
            precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        precision.step(optimizer)
        optimizer.zero_grad()
        return total


def accumulating() -> Training:
    inner = classifier(convolutional(), images())
    return Accumulating(inner.model, inner.loss, inner.predict)


class Adversarial(Training):
    """A generator and a discriminator in one module, with an optimizer each."""

    def __init__(self) -> None:
        self.parts = parts = nn.ModuleDict({"fakes": Generator(), "judge": Judge()})
        super().__init__(parts["fakes"], lambda: torch.zeros(()), lambda: parts["fakes"](torch.randn(4, 8)))
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in parts.values()]
        self.real = torch.rand(4, 1, 16, 16)

    def step(self, precision: Precision) -> Tensor:
        fakes, judge = self.parts.values()
        losses = []
        with precision.autocast():
            fake = fakes(torch.randn(4, 8))
        for optimizer, of_judge in zip(self.optimizers[::-1], (True, False), strict=True):
            optimizer.zero_grad()
            with precision.autocast():
                judged = judge(fake.detach() if of_judge else fake)
                loss = F.softplus(judged if of_judge else -judged).mean()
                loss = loss + F.softplus(-judge(self.real)).mean() if of_judge else loss
            losses.append(loss.detach())
            precision.backward(loss)
            if precision.scaler is None:
                optimizer.step()
            else:
                precision.scaler.step(optimizer)
        if precision.scaler is not None:
            precision.scaler.update()
        return torch.stack(losses).sum()


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(8, 16 * 4 * 4)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True), nn.ConvTranspose2d(8, 1, 4, 2, 1)
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(self.start(noise).view(-1, 16, 4, 4)).tanh()


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(1, 8, 4, 2, 1), nn.Conv2d(8, 16, 4, 2, 1)
        self.layers = nn.Sequential(
            parametrizations.spectral_norm(first),
            nn.LeakyReLU(0.2, inplace=True),
            parametrizations.spectral_norm(second),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Flatten(),
            nn.Linear(256, 1),
        )

    def forward(self, picture: Tensor) -> Tensor:
        return self.layers(picture)


class Denoiser(nn.Module):
    """A small UNet with time embedding, group norm, attention at the bottom and skip connections."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.start, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.norm, self.attention = nn.GroupNorm(4, 2 * width), nn.MultiheadAttention(2 * width, 4, batch_first=True)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.end = nn.Sequential(
            nn.GroupNorm(4, 2 * width), nn.SiLU(inplace=True), nn.Conv2d(2 * width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None].float() * 100.0 ** -(torch.arange(8) / 8)
        code = self.time(torch.cat((angles.sin(), angles.cos()), dim=1))
        skip = self.start(x)
        y = self.norm(self.down(skip)) + code[:, :, None, None]
        sequence = y.flatten(2).transpose(1, 2)
        sequence = sequence + self.attention(sequence, sequence, sequence, need_weights=False)[0]
        y = sequence.transpose(1, 2).view_as(y)
        y = self.up(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        return self.end(torch.cat((y, skip), dim=1))


def diffusion() -> Training:
    model, clean = Denoiser(), images()
    betas = torch.linspace(1e-4, 0.02, 100).cumsum(0)

    def loss() -> Tensor:
        time, noise = torch.randint(100, (len(clean),)), torch.randn_like(clean)
        kept = (-betas[time]).exp()[:, None, None, None]
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        return F.mse_loss(model(noisy, time).float(), noise)

    return Training(model, loss, lambda: model(clean, torch.zeros(len(clean))))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 2 * 4), nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance


def variational() -> Training:
    model, x = Autoencoder(), vectors()

    def loss() -> Tensor:
        decoded, mean, log_variance = model(x)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return F.binary_cross_entropy_with_logits(decoded, x.sigmoid()) + divergence

    return Training(model, loss, lambda: model(x))


class Pair(nn.Module):
    """Two towers and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = convolutional(), perceptron()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        a, b = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return self.scale.exp() * a @ b.t()


def contrastive() -> Training:
    model, image, text, target = Pair(), images(), torch.randn(4, 16), torch.arange(4)

    def loss() -> Tensor:
        logits = model(image, text)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2

    return Training(model, loss, lambda: model(image, text))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.start, self.end = block(3, 16), nn.Linear(16, 10)
        self.middle = nn.ModuleList(nn.Sequential(block(16, 16), nn.Dropout(0.1)) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for layer in self.middle:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.end(x.mean((2, 3)))


class CheckpointedSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutional()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)


class Averaging(Training):
    """An averaged copy follows the weights and is evaluated in their place."""

    def __init__(self) -> None:
        inner, self.x = classifier(convolutional(), x := images()), x
        super().__init__(inner.model, inner.loss, inner.predict)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def step(self, precision: Precision) -> Tensor:
        loss = super().step(precision)
        self.average.update_parameters(self.model)
        return loss

    def evaluate(self, precision: Precision) -> None:
        super().evaluate(precision)
        self.average.eval()
        with torch.no_grad(), precision.autocast():
            self.average(self.x)


class Adapted(nn.Module):
    """A frozen linear layer plus a trained low-rank correction."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


def adapted() -> Training:
    model = perceptron().requires_grad_(False)
    model[0], model[4] = Adapted(model[0]), Adapted(model[4])
    return classifier(model, vectors())


def frozen_backbone() -> Training:
    model = convolutional()
    model[:-1].requires_grad_(False)
    return classifier(model, images())


def distilled() -> Training:
    """The teacher runs under no_grad, in the same region."""
    teacher, student, x = convolutional().eval().requires_grad_(False), convolutional(), images()

    def loss() -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return F.kl_div(
            F.log_softmax(student(x), -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean"
        )

    return Training(student, loss, lambda: student(x))


def self_supervised() -> Training:
    """A teacher that is a moving average of the student, as in BYOL."""
    student, x = convolutional(), images()
    teacher = copy.deepcopy(student).requires_grad_(False)

    def loss() -> Tensor:
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 0.01)
            target = teacher(x)
        return -F.cosine_similarity(student(x + 0.1 * torch.randn_like(x)), target).mean()

    return Training(student, loss, lambda: student(x))


def parametrized(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], Training]:
    def build() -> Training:
        model = nn.Sequential(norm(nn.Linear(16, 32)), nn.ReLU(inplace=True), norm(nn.Linear(32, 10)))
        return classifier(model, vectors())

    return build


class PerSample(Training):
    """Per-sample gradients from torch.func, averaged by hand."""

    def __init__(self) -> None:
        inner, self.x = classifier(perceptron_without_dropout(), x := vectors()), x
        super().__init__(inner.model, inner.loss, inner.predict)
        self.labels = torch.randint(10, (8,))

    def step(self, precision: Precision) -> Tensor:
        (optimizer,) = self.optimizers
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss_of(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.model, parameters, (x[None],)).float(), label[None])

        with precision.autocast():
            gradients, losses = vmap(grad_and_value(loss_of), (None, 0, 0))(parameters, self.x, self.labels)
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients[name].mean(0)
        optimizer.step()
        return losses.mean()


def perceptron_without_dropout() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 10))


class StraightThrough(torch.autograd.Function):
    """Rounds, and passes the gradient through unchanged. Casts its inputs to float32, as the AMP notes recommend."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (x / scale).round() * scale

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradient, (gradient * ((x / scale).round() - x / scale)).sum()


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.scale = perceptron(), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(self.layers(x), self.scale)


def focal() -> Training:
    """A focal loss weighted in float32 for the logits, and smooth L1 for the boxes."""
    model, x, target, boxes = perceptron(14), vectors(), (torch.rand(8, 10) > 0.8).float(), torch.randn(8, 4)

    def loss() -> Tensor:
        logits, regressed = model(x).float().split((10, 4), dim=1)
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        chance = torch.exp(-entropy)
        return ((1 - chance) ** 2 * entropy).mean() + F.smooth_l1_loss(regressed, boxes)

    return Training(model, loss, lambda: model(x))


def several_losses() -> Training:
    """Hinge, triplet, cosine and Huber losses on one network."""
    model, x = perceptron(), vectors()

    def loss() -> Tensor:
        y = model(x)
        a, b, c = y[:2], y[2:4], y[4:6]
        hinge = F.multi_margin_loss(y.float(), torch.arange(8))
        near = F.triplet_margin_loss(a, b, c) + F.cosine_embedding_loss(a, b, torch.ones(2))
        return hinge + near + F.huber_loss(a, b.detach()) + F.gaussian_nll_loss(a.float(), b.float(), c.float().exp())

    return Training(model, loss, lambda: model(x))


class Closure(Training):
    """LBFGS calls the closure several times a step. A loss scaler takes no closure, so the gradients are not scaled."""

    def __init__(self) -> None:
        inner = classifier(perceptron_without_dropout(), vectors())
        super().__init__(inner.model, inner.loss, inner.predict)
        self.optimizers = [torch.optim.LBFGS(self.model.parameters(), lr=0.1, max_iter=3)]

    def step(self, precision: Precision) -> Tensor:
        (optimizer,) = self.optimizers

        def closure() -> Tensor:
            optimizer.zero_grad()
            with precision.autocast():
                loss = self.loss()
            loss.backward()
            return loss

        return optimizer.step(closure).detach()


class SharpnessAware(Training):
    """Two forward and backward passes a step; the weights move in between and are then restored."""

    def step(self, precision: Precision) -> Tensor:
        (optimizer,) = self.optimizers
        first = self._gradients(precision)
        with torch.no_grad():
            moved = {p: 0.05 * p.grad / (p.grad.norm() + 1e-12) for p in self.model.parameters() if p.grad is not None}
            for parameter, by in moved.items():
                parameter.add_(by)
        self._gradients(precision)
        with torch.no_grad():
            for parameter, by in moved.items():
                parameter.sub_(by)
        optimizer.step()
        return first

    def _gradients(self, precision: Precision) -> Tensor:
        self.optimizers[0].zero_grad()
        with precision.autocast():
            loss = self.loss()
        loss.backward()
        return loss.detach()


def sharpness_aware() -> Training:
    inner = classifier(convolutional(), images())
    return SharpnessAware(inner.model, inner.loss, inner.predict)


class Penalized(Training):
    """A penalty on the gradient of the outputs with respect to the inputs: a double backward."""

    def __init__(self) -> None:
        self.judge, self.x = perceptron_without_dropout(), vectors()
        super().__init__(self.judge, self.penalty, lambda: self.judge(self.x))

    def penalty(self) -> Tensor:
        x = self.x.clone().requires_grad_()
        y = self.judge(x).float()
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.square().mean() + (gradient.norm(dim=1) - 1).square().mean()


def compiled() -> Training:
    model, x = perceptron_without_dropout(), vectors()
    fast = torch.compile(model, backend="aot_eager")
    return classifier(fast, x)


def channels_last() -> Training:
    model = convolutional().to(memory_format=torch.channels_last)
    return classifier(model, images().to(memory_format=torch.channels_last))


def lazy() -> Training:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    model(images())
    return classifier(model, images())


class Multitask(nn.Module):
    """One trunk, two heads, and learned weights for the two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.SiLU(inplace=True))
        self.heads = nn.ModuleDict({"kind": nn.Linear(32, 10), "size": nn.Linear(32, 1)})
        self.weights = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {name: head(x) for name, head in self.heads.items()}


def multitask() -> Training:
    model, x, kinds, sizes = Multitask(), vectors(), torch.randint(10, (8,)), torch.randn(8, 1)

    def loss() -> Tensor:
        out = model(x)
        losses = torch.stack((F.cross_entropy(out["kind"], kinds), F.mse_loss(out["size"].float(), sizes)))
        return (losses * torch.exp(-model.weights) + model.weights).sum()

    return Training(model, loss, lambda: model(x))


def policy() -> Training:
    """Policy gradient with an entropy bonus, with ``torch.distributions``."""
    model, x = perceptron(5), vectors()

    def loss() -> Tensor:
        choices = torch.distributions.Categorical(logits=model(x)[:, :4].float())
        actions = choices.sample()
        return -(choices.log_prob(actions) * torch.randn(8)).mean() - 0.01 * choices.entropy().mean()

    return Training(model, loss, lambda: model(x))


def deep_supervision() -> Training:
    """The net runs twice in a step, and the loss uses both outputs."""
    model, x, labels = convolutional(), images(), torch.randint(10, (4,))

    def loss() -> Tensor:
        return F.cross_entropy(model(x), labels) + F.cross_entropy(model(x.flip(-1)), labels)

    return Training(model, loss, lambda: model(x))


class Siren(nn.Module):
    """A coordinate network with Fourier features in a buffer."""

    features: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(2, 16) * 4)
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        angles = x @ self.features
        return self.layers(torch.cat((angles.sin(), angles.cos()), dim=-1)).sigmoid()


def field() -> Training:
    model, points, colors = Siren(), torch.rand(32, 2), torch.rand(32, 3)
    return Training(model, lambda: F.mse_loss(model(points), colors), lambda: model(points))


_SGD = torch.optim.SGD
LOOPS = [
    Recipe(f"loop/{name}", "ways of training", build)
    for name, build in {
        "plain": with_optimizer(lambda p: _SGD(p, lr=0.01)),
        "adam, foreach": with_optimizer(lambda p: torch.optim.Adam(p, foreach=True)),
        "adam, one by one": with_optimizer(lambda p: torch.optim.Adam(p, foreach=False)),
        "adamw, fused": with_optimizer(lambda p: torch.optim.AdamW(p, fused=True)),
        "sgd, fused": with_optimizer(lambda p: _SGD(p, lr=0.01, momentum=0.9, fused=True)),
        "rmsprop": with_optimizer(lambda p: torch.optim.RMSprop(p)),
        "nadam": with_optimizer(lambda p: torch.optim.NAdam(p)),
        "adagrad, fused": with_optimizer(lambda p: torch.optim.Adagrad(p, fused=True)),
        "accumulation, clipping": accumulating,
        "two optimizers, gan, spectral norm": Adversarial,
        "diffusion, unet": diffusion,
        "variational autoencoder": variational,
        "contrastive pair": contrastive,
        "checkpoint": lambda: classifier(Checkpointed(reentrant=False), images()),
        "checkpoint, reentrant": lambda: classifier(Checkpointed(reentrant=True), images()),
        "checkpoint, sequential": lambda: classifier(CheckpointedSequence(), images()),
        "averaged copy": Averaging,
        "adapters of low rank": adapted,
        "frozen backbone": frozen_backbone,
        "distillation": distilled,
        "momentum teacher": self_supervised,
        "weight norm": parametrized(parametrizations.weight_norm),
        "spectral norm": parametrized(parametrizations.spectral_norm),
        "orthogonal": parametrized(parametrizations.orthogonal),
        "torch.func, per sample": PerSample,
        "custom function": lambda: classifier(Quantized(), vectors()),
        "focal and box loss": focal,
        "several losses": several_losses,
        "channels last": channels_last,
        "lazy modules": lazy,
        "multitask": multitask,
        "policy gradient": policy,
        "two calls": deep_supervision,
        "coordinates": field,
        "gradient penalty": Penalized,
    }.items()
] + [
    # Under float16 these need a scale that the loop would have to apply itself.
    Recipe("loop/lbfgs, closure", "ways of training", Closure, dtypes=("fp32", "bf16")),
    Recipe("loop/sharpness-aware", "ways of training", sharpness_aware, dtypes=("fp32", "bf16")),
    Recipe("loop/compiled", "ways of training", compiled, alone=True),
]
