"""Builds a model from its name; the parts themselves know no names."""

from network import backbone
from network._deeplab import DeepLab, DeepLabHead, DeepLabHeadPlus
from utils.errors import InputError

BACKBONES = {
    "resnet50": backbone.resnet,
    "resnet101": backbone.resnet,
    "mobilenet_v3_large": backbone.mobilenet_v3,
}
MODELS = [f"{head}_{name}" for name in BACKBONES for head in ("deeplabv3plus", "deeplabv3")]
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # 1706.05587, section 4.1: doubled when the stride is halved


def build_model(name: str, *, num_classes: int, output_stride: int = 16) -> DeepLab:
    """Builds a DeepLab with random weights.

    name: one of `MODELS`; output_stride: 16 or 8 (MobileNetV3: 16 only). `utils.weights` loads pretrained weights.
    Raises InputError for an unknown name and for a stride that the backbone does not support.
    """
    if name not in MODELS:
        raise InputError(f"--model {name}: unknown model; choose from {', '.join(MODELS)}")
    if output_stride not in ATROUS_RATES:
        raise InputError(f"--output_stride {output_stride}: not supported; choose 16 or 8")
    head, _, backbone_name = name.partition("_")
    body = BACKBONES[backbone_name](backbone_name, output_stride=output_stride)
    rates = ATROUS_RATES[output_stride]
    if head == "deeplabv3":
        classifier = DeepLabHead(body.out_channels, num_classes, rates)
    else:
        classifier = DeepLabHeadPlus(body.out_channels, body.low_level_channels, num_classes, rates)
    return DeepLab(body.features, classifier, mean=backbone.IMAGENET_MEAN, std=backbone.IMAGENET_STD)
