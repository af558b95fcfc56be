"""Image and video models of timm and torchvision, with random weights, on the smallest images they accept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Recipe, Training, classifier

# A small architecture from each of timm's model files, and its image side; `!`: the side is an argument of the model.
_TIMM = """
beit beit_base_patch16_224 32!
byoanet eca_botnext26ts_256 32!
byobnet mobileone_s1 32
cait cait_xxs24_224 32!
coat coat_tiny 32!
convit convit_tiny 32!
convmixer convmixer_1024_20_ks9_p14 32
convnext convnext_atto_rms 32
cpubone cpubone_nano 32
crossvit crossvit_tiny_240 32
csatv2 csatv2 64
cspnet cs3darknet_focus_s 32
cspnext cspnext_tiny 32
davit davit_tiny 32
deit deit_tiny_patch16_224 32!
densenet densenet264d 32
dla dla60_res2next 32
dpn dpn48b 32
edgenext edgenext_xx_small 32
efficientformer efficientformer_l1 224
efficientformer_v2 efficientformerv2_s0 32!
efficientnet mobilenetv2_035 32
efficientvim efficientvim_m1 32
efficientvit_mit efficientvit_b0 32
efficientvit_msra efficientvit_m0 32
eva vit_tiny_patch16_dinov3_qkvb 32
fasternet fasternet_t0 32
fastvit fastvit_t8 32
focalnet focalnet_tiny_srf 32
gcvit gcvit_xxtiny 32!
ghostnet ghostnet_050 32
hardcorenas hardcorenas_b 32
hgnet hgnetv2_b0 32
hiera hiera_tiny_224 32!
hieradet_sam2 sam2_hiera_tiny 32
hrnet hrnet_w18_small 32
iformer iformer_t 32
inception_next inception_next_atto 32
inception_resnet_v2 inception_resnet_v2 96
inception_v3 inception_v3 96
inception_v4 inception_v4 96
lcnetv2 lcnetv2_small 32
levit levit_384_s8 32!
lowformer lowformer_b0 32
mambaout mambaout_femto 32
maxxvit maxvit_pico_rw_256 32!
metaformer poolformerv2_s12 32
mlp_mixer gmlp_ti16_224 32!
mobilenetv3 lcnet_035 32
mobilenetv5 mobilenetv5_base 32
mobilevit mobilevit_xxs 32
mvitv2 mvitv2_tiny 32
naflexvit naflexvit_base_patch16_gap 32
nasnet nasnetalarge 32
nest nest_tiny 32!
nextvit nextvit_small 32
nfnet nf_regnet_b0 32
pit pit_ti_224 32!
pnasnet pnasnet5large 32
pvt_v2 pvt_v2_b0 32
rdnet rdnet_tiny 32
regnet regnetx_002 32
repghost repghostnet_050 32
repvit repvit_m0_9 32
res2net res2net50_14w_8s 32
resnest resnest26d 32
resnet resnet18 32
resnetv2 resnetv2_18 32
rexnet rexnet_100 32
selecsls selecsls42 32
senet legacy_seresnet18 32
sequencer sequencer2d_s 32
shvit shvit_s1 32
sknet skresnet18 32
starnet starnet_s050 32
swiftformer swiftformer_xs 32
swin_transformer swin_tiny_patch4_window7_224 32!
swin_transformer_v2 swinv2_tiny_window8_256 32!
swin_transformer_v2_cr swinv2_cr_tiny_224 32!
tiny_vit tiny_vit_5m_224 32
tnt tnt_s_legacy_patch16_224 32!
tresnet tresnet_m 32
twins twins_svt_small 32
vgg vgg11 32
visformer visformer_tiny 32!
vision_transformer vit_tiny_patch16_224 32!
vision_transformer_hybrid vit_tiny_r_s16_p8_224 32!
vision_transformer_relpos vit_srelpos_small_patch16_224 32!
vision_transformer_sam samvit_base_patch16 32
vitamin vitamin_small_224 32!
volo volo_d1_224 32!
vovnet ese_vovnet19b_slim_dw 32
xception legacy_xception 32
xception_aligned xception41p 32
xcit xcit_nano_12_p8_224 32
"""


def _timm(name: str, size: int, *, resized: bool) -> Training:
    import timm

    model = timm.create_model(name, num_classes=10, **({"img_size": size} if resized else {}))
    return classifier(model, torch.randn(2, 3, size, size))


def _timm_recipe(line: str) -> Recipe:
    family, name, size = line.split()
    build = partial(_timm, name, int(size.strip("!")), resized=size.endswith("!"))
    return Recipe(f"timm/{name}", f"timm {family}", build, needs=("timm",))


TIMM = [_timm_recipe(line) for line in _TIMM.strip().splitlines()]


def _vision(name: str, size: int, *, options: dict[str, Any]) -> Training:
    from torchvision.models import get_model

    model = get_model(name, weights=None, num_classes=10, **options)
    return classifier(model, torch.randn(2, 3, size, size))


def _video(name: str, frames: int, size: int) -> Training:
    from torchvision.models import get_model

    return classifier(get_model(name, weights=None, num_classes=10), torch.randn(2, 3, frames, size, size))


def _segmentation(name: str) -> Training:
    from torchvision.models import get_model

    model = get_model(name, weights=None, weights_backbone=None, num_classes=4)
    x, target = torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))

    def loss() -> Tensor:
        outputs = model(x)
        return sum((nn.functional.cross_entropy(output, target) for output in outputs.values()), torch.zeros(()))

    return Training(model, loss, lambda: model(x))


def _detection(name: str) -> Training:
    """A detector on the features of a small MobileNet, with few proposals."""
    from torchvision.models import detection, mobilenet_v3_small
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    side = 64
    backbone = mobilenet_v3_small(weights=None).features
    backbone.out_channels = 576
    one = name == "FCOS"
    anchors = AnchorGenerator(((16,) if one else (8, 16, 32),), ((1.0,) if one else (0.5, 1.0, 2.0),))
    options: dict[str, Any] = {"num_classes": 4, "min_size": side, "max_size": side}
    if name.endswith("RCNN"):
        few = ("pre_nms_top_n_train", "pre_nms_top_n_test", "post_nms_top_n_train", "post_nms_top_n_test")
        options |= {"rpn_anchor_generator": anchors} | {f"rpn_{key}": 50 for key in few}
    else:
        options["anchor_generator"] = anchors
    if name == "KeypointRCNN":
        options |= {"num_classes": 2, "num_keypoints": 17}
    model = getattr(detection, name)(backbone, **options)
    images = [torch.rand(3, side, side) for _ in range(2)]
    targets = [_scene(side, options["num_classes"]) for _ in images]
    return Training(model, lambda: sum(model(images, targets).values(), torch.zeros(())), lambda: model(images))


def _scene(size: int, classes: int) -> dict[str, Tensor]:
    """Two objects with boxes, masks and keypoints."""
    corners = torch.tensor([[4.0, 4.0], [size / 2, size / 3]])
    boxes = torch.cat((corners, corners + size / 3), dim=1)
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    visible = torch.ones(2, 17, 1)
    keypoints = torch.cat((corners[:, None] + torch.rand(2, 17, 2) * size / 3, visible), dim=2)
    return {"boxes": boxes, "labels": torch.tensor([1, classes - 1]), "masks": masks, "keypoints": keypoints}


def _raft() -> Training:
    from torchvision.models.optical_flow import raft_small

    model = raft_small(weights=None)
    first, second, flow = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), torch.randn(1, 2, 128, 128)

    def loss() -> Tensor:
        flows: list[Tensor] = model(first, second, num_flow_updates=3)
        return torch.stack([(each - flow).abs().mean() for each in flows]).sum()

    return Training(model, loss, lambda: model(first, second, num_flow_updates=3))


def _recipe(family: str, name: str, build: Callable[[], Training]) -> Recipe:
    return Recipe(f"torchvision/{name}", f"torchvision {family}", build, needs=("torchvision",))


_CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "convnext_tiny": (64, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "efficientnet_v2_s": (32, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "mnasnet0_5": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "regnet_x_400mf": (64, {}),
    "regnet_y_400mf": (32, {}),
    "resnet18": (32, {}),
    "resnet50": (32, {}),
    "resnext50_32x4d": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "vgg11_bn": (32, {}),
    "vit_b_32": (64, {"image_size": 64}),
}
_DETECTORS = ("FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet", "FCOS")
_SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
_VIDEO = {
    "mc3_18": (4, 32),
    "r2plus1d_18": (4, 32),
    "r3d_18": (4, 32),
    "s3d": (16, 64),
    "swin3d_t": (4, 64),
}

TORCHVISION = [
    *(
        _recipe("classification", name, partial(_vision, name, size, options=options))
        for name, (size, options) in _CLASSIFIERS.items()
    ),
    *(_recipe("segmentation", name, partial(_segmentation, name)) for name in _SEGMENTERS),
    *(_recipe("detection", name, partial(_detection, name)) for name in _DETECTORS),
    *(_recipe("video", name, partial(_video, name, *shape)) for name, shape in _VIDEO.items()),
    _recipe("optical flow", "raft_small", _raft),
]
