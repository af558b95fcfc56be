"""Failures from public reports that were collected after the checker was written."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases import Cases, Guard
from cases.training import BF16, images, rows, sgd, train

CASES = Cases()
case = CASES.case
BOTH = {"write": "write", "save": "save"}


@case(
    "positions-added-in-place",
    "AMP401",
    family="in-place",
    source=("https://github.com/microsoft/unilm/pull/999",),
    module="encoder",
    marks=BOTH,
    evidence={"node": "ConvolutionBackward0", "slot": "input"},
)
def positions_added_in_place(guard: Guard, repaired: int) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x_conv = self.pos_conv(x)  # <- save
            if repaired:
                x = x + x_conv
            else:
                x += x_conv  # <- write
            return x

    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 3, 1))
    model.add_module("encoder", Encoder())
    with guard(model):
        train(model, lambda: model(images()))


@case(
    "fusion-weights-normalized-in-place",
    "AMP401",
    family="in-place",
    source=("https://github.com/tristandb/EfficientDet-PyTorch/issues/7",),
    module="bifpn",
    marks=BOTH,
    evidence={"node": "ReluBackward0", "slot": "result"},
)
def fusion_weights_normalized_in_place(guard: Guard, repaired: int) -> None:
    class BiFPN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.ones(2, 4))
            self.w1_relu = nn.ReLU()

        def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
            w1 = self.w1_relu(self.w1)  # <- save
            if repaired:
                w1 = w1 / (w1.sum(0) + 1e-4)
            else:
                w1 /= w1.sum(0) + 1e-4  # <- write
            return w1[0, 0] * levels[0] + w1[1, 0] * levels[1]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 1)
            self.bifpn = BiFPN()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.bifpn([x, x.tanh()])

    model = Net()
    with guard(model):
        train(model, lambda: model(images()))


@case(
    "padded-input-activated-in-place",
    "AMP401",
    family="in-place",
    source=("https://github.com/NVlabs/FUNIT/issues/23",),
    module="block.activation",
    marks=BOTH,
    evidence={"node": "ConvolutionBackward0", "slot": "input"},
)
def padded_input_activated_in_place(guard: Guard, repaired: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad = nn.ZeroPad2d(1)
            self.activation = nn.LeakyReLU(0.2, inplace=not repaired)
            self.shortcut = nn.Conv2d(3, 3, 3)
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.pad(x)
            shortcut = self.shortcut(x)  # <- save
            return shortcut + self.conv(self.activation(x))  # <- write

    model = nn.Sequential()
    model.add_module("block", Block())
    with guard(model):
        train(model, lambda: model(images()))


@case(
    "alias-taken-for-a-copy",
    "AMP401",
    family="in-place",
    source=("https://github.com/Jee-King/TSAN/issues/3",),
    module="attention",
    marks=BOTH,
    evidence={"slot": "mat1"},
)
def alias_taken_for_a_copy(guard: Guard, repaired: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = x
            for _ in range(2):
                gate = self.query(x).sigmoid()  # <- save
                if repaired:
                    out = out + gate
                else:
                    out += gate  # <- write
            return out

    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 4))
    model.add_module("attention", Attention())
    with guard(model):
        train(model, lambda: model(rows()))


@case(
    "flow-scaled-after-splatting",
    "AMP401",
    family="in-place",
    source=("https://github.com/sniklaus/softmax-splatting/issues/50",),
    module="",
    marks=BOTH,
)
def flow_scaled_after_splatting(guard: Guard, repaired: int) -> None:
    class Splatting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, features: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(features, flow)
            return features * flow

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            features, flow = ctx.saved_tensors
            return gradient * flow, gradient * features

    class Interpolation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = nn.Linear(4, 4)
            self.features = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flow = self.flow(x)
            warped = Splatting.apply(self.features(x), flow)  # <- save
            if repaired:
                flow = flow * 0.5
            else:
                flow *= 0.5  # <- write
            return warped + flow

    model = Interpolation()
    with guard(model):
        train(model, lambda: model(rows()))


@case(
    "activation-of-a-parameter",
    "AMP403",
    family="autograd",
    source=("https://github.com/zylo117/Yet-Another-EfficientDet-Pytorch/issues/503",),
    module="fuse.weight_relu",
    marks={"write": "write"},
)
def activation_of_a_parameter(guard: Guard, repaired: int) -> None:
    class Fuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.weight_relu = nn.ReLU(inplace=not repaired)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight_relu(self.weight)  # <- write
            return weight[0] * x + weight[1] * x.tanh()

    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 4))
    model.add_module("fuse", Fuse())
    with guard(model):
        train(model, lambda: model(rows()))


@case(
    "embedding-made-a-leaf",
    "AMP403",
    family="autograd",
    source=("https://github.com/NVlabs/VILA/pull/199",),
    module="",
    marks={"write": "write"},
)
def embedding_made_a_leaf(guard: Guard, repaired: int) -> None:
    class Llava(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(8, 4).requires_grad_(False)
            self.projector = nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
            text_embeds = self.embed_tokens(ids).requires_grad_()
            if repaired:
                text_embeds = text_embeds + 0 * image.mean()
            else:
                text_embeds += 0 * image.mean()  # <- write
            return self.projector(text_embeds)

    model = Llava()
    with guard(model):
        train(model, lambda: model(torch.arange(8), rows()))


@case(
    "sinusoids-written-into-an-embedding",
    "AMP404",
    family="autograd",
    source=("https://github.com/Atcold/NYU-DLSP20/issues/765",),
    marks={"write": "write"},
)
def sinusoids_written_into_an_embedding(guard: Guard, repaired: int) -> None:
    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(6, 4)
            self.fc = nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(self.positions(ids))

    def create_sinusoidal_embeddings(weight: torch.Tensor) -> None:
        theta = torch.arange(6.0)[:, None] / torch.tensor([1.0, 100.0])
        with torch.set_grad_enabled(not repaired):
            weight[:, 0::2] = theta.sin()  # <- write

    model = Embeddings()
    with guard(model):
        create_sinusoidal_embeddings(model.positions.weight)
        train(model, lambda: model(torch.arange(6)))


@case(
    "second-loss-of-a-freed-graph",
    "AMP408",
    family="autograd",
    source=("https://github.com/facebookresearch/pytorch_GAN_zoo/issues/83",),
    marks={"raise": "raise", "call": "first"},
)
def second_loss_of_a_freed_graph(guard: Guard, repaired: int) -> None:
    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            self.discriminator = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    model = Gan()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        fake = model.generator(rows())
        phi = model.discriminator(fake)
        loss_fake, loss_gdpp = phi.mean(), phi.square().mean()
        if repaired:
            loss_fake = loss_fake + loss_gdpp
        loss_fake.backward()  # <- first
        if not repaired:
            loss_gdpp.backward()  # <- raise
        optimizer.step()


@case(
    "latent-carried-over",
    "AMP408",
    family="autograd",
    source=("https://github.com/yuval-alaluf/restyle-encoder/issues/15",),
    marks={"raise": "raise", "call": "raise"},
)
def latent_carried_over(guard: Guard, repaired: int) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.cat([x, latent], 1)).tanh()

    model = Encoder()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        latent = torch.zeros(4, 4)
        for _ in range(2):
            latent = model(rows(), latent.detach() if repaired else latent)
            loss = latent.square().mean()
            loss.backward()  # <- raise
        optimizer.step()


@case(
    "frozen-input-to-a-checkpoint",
    "AMP408",
    family="autograd",
    source=("https://github.com/huggingface/transformers/issues/23170",),
    remedies=2,
    marks={"raise": "raise", "call": "cut"},
)
def frozen_input_to_a_checkpoint(guard: Guard, repaired: int) -> None:
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4).requires_grad_(False)
            self.adapter = nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(ids)
            if repaired == 1:
                return checkpoint(self.adapter, hidden, use_reentrant=False)
            if repaired == 2:
                hidden.requires_grad_()
            return checkpoint(self.adapter, hidden, use_reentrant=True)  # <- cut

    model = Transformer()
    optimizer = sgd(model.adapter.parameters())
    with guard(model, optimizers=(optimizer,)):
        loss = model(torch.arange(8)).square().mean()
        loss.backward()  # <- raise
        optimizer.step()


@case(
    "everything-frozen",
    "AMP408",
    family="autograd",
    source=("https://github.com/RUCAIBox/RecBole/issues/2027",),
    marks={"raise": "raise"},
)
def everything_frozen(guard: Guard, repaired: int) -> None:
    class Recommender(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users = nn.Embedding(4, 4)
            self.items = nn.Embedding(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return (self.users(ids) * self.items(ids)).sum(-1)

    model = Recommender()
    model.users.requires_grad_(False)
    model.items.requires_grad_(bool(repaired))
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        loss = model(torch.arange(4)).square().mean()
        loss.backward()  # <- raise
        optimizer.step()


@case(
    "depth-net-under-a-decorator",
    "AMP203",
    family="dtype",
    source=("https://github.com/Megvii-BaseDetection/BEVDepth/issues/165",),
    module="depth.reduce_conv",
    reason="autocast-disabled-here",
    remedies=2,
    marks={"raise": "raise", "call": "off", "cast": "made"},
    operands={"features": "bfloat16", "depth.reduce_conv.weight": "float32", "depth.reduce_conv.bias": "float32"},
)
def depth_net_under_a_decorator(guard: Guard, repaired: int) -> None:
    decorate = torch.autocast("cpu", enabled=False) if repaired != 2 else lambda method: method

    class DepthNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce_conv = nn.Conv2d(3, 4, 3)

        @decorate  # <- off
        def aggregate(self, features: torch.Tensor) -> torch.Tensor:
            if repaired == 1:
                return self.reduce_conv(features.float())
            return self.reduce_conv(features)  # <- raise

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.aggregate(features)

    class Lss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(3, 3, 3)
            self.depth = DepthNet()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.backbone(x)  # <- made
            return self.depth(features)

    model = Lss()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(images()))


@case(
    "filter-of-a-loss",
    "AMP203",
    family="dtype",
    source=("https://github.com/Yu-Fangxu/COLD-Attack/issues/20",),
    reason="autocast-never-entered",
    remedies=2,
    operands={"out": "float16", "eye_filter": "float32"},
)
def filter_of_a_loss(guard: Guard, repaired: int) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    def bleu_loss(out: torch.Tensor) -> torch.Tensor:
        eye_filter = torch.eye(2)[None, None]
        if repaired == 1:
            with torch.autocast("cpu", dtype=torch.float16):
                return F.conv2d(out, eye_filter) / 2
        if repaired == 2:
            return F.conv2d(out.float(), eye_filter) / 2
        return F.conv2d(out, eye_filter) / 2  # <- raise

    model = Decoder()

    def step() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(rows())
        return bleu_loss(logits[None, None])

    with guard(model):
        train(model, step)


@case(
    "metric-of-a-validation",
    "AMP203",
    family="dtype",
    source=("https://github.com/pytorch/pytorch/issues/101276",),
    module="regressor.0",
    reason="autocast-never-entered",
    remedies=2,
    operands={"distances": "bfloat16", "regressor.0.weight": "float32", "regressor.0.bias": "float32"},
    trains=False,
)
def metric_of_a_validation(guard: Guard, repaired: int) -> None:
    class Similarity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(3, 2, 3)
            self.regressor = nn.Sequential(nn.Conv2d(2, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(2, 1, 1))

        def distances(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return self.features(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            distances = self.distances(x)
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    return self.regressor(distances)
            return self.regressor(distances.float() if repaired else distances)  # <- raise

    model = Similarity().eval()
    with guard(model, phase="validation_step"), torch.no_grad():
        model(images())


@case(
    "svd-of-a-half-covariance",
    "AMP207",
    family="dtype",
    source=("https://github.com/bytedance/LatentSync/issues/241",),
    module="",
    operands={"covariance": "float16"},
)
def svd_of_a_half_covariance(guard: Guard, repaired: int) -> None:
    class Alignment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.float16):
                moved = self.fc(points)
                covariance = points.T @ moved
            if repaired:
                _, values, _ = torch.linalg.svd(covariance.float())
            else:
                _, values, _ = torch.linalg.svd(covariance)  # <- raise
            return values

    model = Alignment()
    with guard(model):
        train(model, lambda: model(rows()))


@case(
    "overlaps-into-low-precision-targets",
    "AMP209",
    family="dtype",
    source=("https://github.com/roboflow/rf-detr/issues/446",),
    module="criterion",
    reason="in-place-or-out",
    remedies=2,
    operands={"targets": "bfloat16", "overlaps": "float32"},
)
def overlaps_into_low_precision_targets(guard: Guard, repaired: int) -> None:
    class Criterion(nn.Module):
        def forward(self, logits: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
            matched = torch.tensor([0, 2])
            overlaps = boxes[:, 0].sigmoid()
            if repaired == 2:
                targets = torch.zeros(logits.shape[:1], dtype=overlaps.dtype)
                targets[matched] = overlaps
            else:
                targets = torch.zeros(logits.shape[:1], dtype=logits.dtype)
                if repaired == 1:
                    targets[matched] = overlaps.to(targets.dtype)
                else:
                    targets[matched] = overlaps  # <- raise
            return (logits[:, 0] - targets).square()

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.criterion = Criterion()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.criterion(self.head(x), torch.ones(2, 4))

    model = Detector()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows()))


@case(
    "optimizer-with-a-low-precision-mean",
    "AMP209",
    family="dtype",
    source=("https://github.com/zichongli5/NorMuon/issues/7",),
    reason="in-place-or-out",
    remedies=2,
    operands={"second_momentum": "float32", "v_mean": "bfloat16"},
)
def optimizer_with_a_low_precision_mean(guard: Guard, repaired: int) -> None:
    class NorMuon(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        @torch.no_grad()
        def step(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    update = parameter.grad.bfloat16()
                    v_mean = (update * update).mean(-1, keepdim=True)
                    second_momentum = torch.zeros_like(v_mean, dtype=BF16 if repaired == 2 else torch.float32)
                    if repaired == 1:
                        second_momentum.lerp_(v_mean.to(second_momentum.dtype), 0.05)
                    else:
                        second_momentum.lerp_(v_mean, 0.05)  # <- raise
                    parameter.add_(update / (second_momentum.sqrt() + 1e-8), alpha=-group["lr"])

    model = nn.Linear(4, 2)
    optimizer = NorMuon(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        model(rows()).square().mean().backward()
        optimizer.step()


@case(
    "float-noise-into-a-bfloat16-model",
    "AMP203",
    family="dtype",
    source=("https://github.com/THUDM/CogKit/issues/32",),
    module="proj_in",
    reason="parameter-not-float32",
    remedies=2,
    marks={"raise": "raise", "cast": "made"},
    operands={"noisy": "float32", "proj_in.weight": "bfloat16", "proj_in.bias": "bfloat16"},
)
def float_noise_into_a_bfloat16_model(guard: Guard, repaired: int) -> None:
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_in = nn.Linear(4, 4)

        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(latent.shape)
            noisy = latent + noise  # <- made
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    return self.proj_in(noisy)
            if repaired == 2:
                return self.proj_in(noisy.to(torch.bfloat16))
            return self.proj_in(noisy)  # <- raise

    model = Transformer() if repaired == 1 else Transformer().bfloat16()
    with guard(model):
        train(model, lambda: model(rows().bfloat16()))


@case(
    "float-series-into-a-bfloat16-model",
    "AMP203",
    family="dtype",
    source=("https://github.com/KimMeen/Time-LLM/issues/3",),
    module="embedding.tokenConv",
    reason="parameter-not-float32",
    remedies=2,
    operands={"x": "float32", "embedding.tokenConv.weight": "bfloat16"},
)
def float_series_into_a_bfloat16_model(guard: Guard, repaired: int) -> None:
    class TokenEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokenConv = nn.Conv1d(4, 4, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    return self.tokenConv(x)
            if repaired == 2:
                return self.tokenConv(x.to(torch.bfloat16))
            return self.tokenConv(x)  # <- raise

    model = nn.Sequential()
    model.add_module("embedding", TokenEmbedding())
    if repaired != 1:
        model.bfloat16()
    with guard(model):
        train(model, lambda: model(rows()[None]))


@case(
    "one-rotated-key",
    "AMP203",
    family="dtype",
    source=("https://github.com/lucidrains/rotary-embedding-torch/pull/9",),
    module="",
    reason="autocast-never-entered",
    remedies=2,
    marks={"raise": "raise", "cast": "made"},
    operands={"q": "bfloat16", "k": "float32", "v": "bfloat16"},
)
def one_rotated_key(guard: Guard, repaired: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x)[None, None].chunk(3, -1)
            scale = torch.linspace(1, 2, 4)
            k = k * scale  # <- made
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    return F.scaled_dot_product_attention(q, k, v)
            if repaired == 2:
                return F.scaled_dot_product_attention(q.float(), k, v.float())
            return F.scaled_dot_product_attention(q, k, v)  # <- raise

    model = Attention().bfloat16()
    with guard(model):
        train(model, lambda: model(rows().bfloat16()))


@case(
    "losses-of-an-evaluation-to-numpy",
    "AMP212",
    family="dtype",
    source=("https://github.com/locuslab/open-unlearning/pull/156",),
    operands={"avg_losses": "bfloat16"},
    marks={"raise": "raise", "cast": "made"},
    trains=False,
)
def losses_of_an_evaluation_to_numpy(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2).bfloat16().eval()
    with guard(model, phase="validation_step"), torch.no_grad():
        losses = F.cross_entropy(model(rows().bfloat16()), torch.tensor([0, 1, 0, 1]), reduction="none")
        avg_losses = losses / 2  # <- made
        if repaired:
            avg_losses.float().cpu().numpy().tolist()
        else:
            avg_losses.cpu().numpy().tolist()  # <- raise


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return model(x).float().square().mean()


@case(
    "unscaled-by-both-steps",
    "AMP306",
    family="scaler",
    source=("https://github.com/davda54/sam/issues/97",),
    reason="unscaled-twice",
)
def unscaled_by_both_steps(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2)
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        for _ in range(2):
            scaler.scale(loss_of(model, rows())).backward()
            scaler.unscale_(optimizer)  # <- raise
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if repaired:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()


@case(
    "closure-for-a-scaler",
    "AMP312",
    family="scaler",
    source=("https://github.com/davda54/sam/issues/97",),
    evidence={"argument": "closure"},
)
def closure_for_a_scaler(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2)
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")

    def closure() -> torch.Tensor:
        loss = scaler.scale(loss_of(model, rows()))
        loss.backward()
        return loss

    with guard(model, optimizers=(optimizer,), scaler=scaler):
        closure()
        if repaired:
            scaler.step(optimizer)
        else:
            scaler.step(optimizer, closure=closure)  # <- raise
        scaler.update()


@case(
    "unscaled-in-every-micro-step",
    "AMP306",
    family="scaler",
    source=("https://github.com/microsoft/Swin-Transformer/issues/311",),
    reason="unscaled-twice",
)
def unscaled_in_every_micro_step(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2)
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        for batch in range(2):
            last = batch == 1
            scaler.scale(loss_of(model, rows()) / 2).backward()
            if last or not repaired:
                scaler.unscale_(optimizer)  # <- raise
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            if last:
                scaler.step(optimizer)
                optimizer.zero_grad()
                scaler.update()


@case(
    "half-encoder-unfrozen",
    "AMP303",
    family="scaler",
    source=("https://github.com/mlpc-ucsd/BLIVA/issues/29",),
    also=("AMP201",),
    module="visual_encoder",
    remedies=2,
    marks={"raise": "raise", "cast": "cast"},
    evidence={"count": 2, "optimized": 4, "parameters": ["visual_encoder.weight", "visual_encoder.bias"]},
)
def half_encoder_unfrozen(guard: Guard, repaired: int) -> None:
    class Bliva(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual_encoder = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)
            self.visual_encoder.half()  # <- cast

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.visual_encoder(x))

    model = Bliva().float() if repaired == 1 else Bliva()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", enabled=repaired != 2)
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model, rows())).backward()
        scaler.unscale_(optimizer)  # <- raise
        scaler.step(optimizer)
        scaler.update()


@case(
    "rotary-tables-in-float32",
    "AMP208",
    family="silent",
    source=("https://github.com/huggingface/pytorch-image-models/pull/2794",),
    module="attn",
    marks={},
    crashes=False,
    needs=("timm",),
)
def rotary_tables_in_float32(guard: Guard, repaired: int) -> None:
    from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)
            sin, cos = build_rotary_pos_embed((2, 2), dim=8)
            self.register_buffer("table", torch.cat([sin, cos], -1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x)
            return apply_rot_embed_cat(q, self.table.to(q.dtype) if repaired else self.table)

    model = nn.Sequential()
    model.add_module("attn", Attention())
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows(8)))


@case(
    "critic-updated-before-the-policy",
    "AMP405",
    family="in-place",
    source=("https://github.com/toshikwa/soft-actor-critic.pytorch/issues/1",),
    module="critic.q1",
    remedies=2,
    marks=BOTH,
    evidence={"parameters": ["critic.q1.weight"]},
)
def critic_updated_before_the_policy(guard: Guard, repaired: int) -> None:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = nn.Linear(4, 4)
            self.critic = nn.ModuleDict({"q1": nn.Linear(4, 1), "q2": nn.Linear(4, 1)})

        def policy_loss(self, states: torch.Tensor) -> torch.Tensor:
            actions = self.policy(states).tanh()
            return -self.critic["q1"](actions).mean()  # <- save

        def critic_loss(self, states: torch.Tensor, name: str) -> torch.Tensor:
            return (self.critic[name](states) - 1).square().mean()

    def update_params(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # <- write

    agent = Agent()
    policy, q1, q2 = (sgd(part.parameters()) for part in (agent.policy, agent.critic["q1"], agent.critic["q2"]))
    with guard(agent, optimizers=(policy, q1, q2)):
        policy_loss = agent.policy_loss(rows())
        if repaired == 1:
            update_params(policy, policy_loss)
        update_params(q1, agent.critic_loss(rows(), "q1"))
        update_params(q2, agent.critic_loss(rows(), "q2"))
        if repaired == 2:
            policy_loss = agent.policy_loss(rows())
        if repaired != 1:
            update_params(policy, policy_loss)


@case(
    "one-optimizer-for-two-algorithms",
    "AMP306",
    family="scaler",
    source=("https://github.com/HorizonRobotics/alf/pull/1770",),
    reason="stepped-twice",
)
def one_optimizer_for_two_algorithms(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2)
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    algorithms = [optimizer, optimizer]
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model, rows())).backward()
        for each in dict.fromkeys(algorithms) if repaired else algorithms:
            scaler.step(each)  # <- raise
        scaler.update()
