"""Builds a model from its name; the parts themselves know no names."""

from network import backbone
from network._deeplab import DeepLab, DeepLabHead, DeepLabHeadPlus
from utils.errors import InputError

HEADS = ("deeplabv3plus", "deeplabv3")
TORCHVISION = {
    "resnet50": backbone.resnet,
    "resnet101": backbone.resnet,
    "mobilenet_v3_large": backbone.mobilenet_v3,
}
MODELS = [f"{head}_{name}" for name in TORCHVISION for head in HEADS]  # all others have a backbone from timm
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # 1706.05587, section 4.1: doubled when the stride is halved


def require_model(name: str) -> str:
    """Returns a model's name. Raises InputError unless it is a head and a backbone of torchvision or timm."""
    head, _, backbone_name = name.partition("_")
    if head not in HEADS or not backbone_name:
        raise InputError(
            f"--model {name}: unknown model; choose from {', '.join(MODELS)}, or give deeplabv3plus_NAME or "
            "deeplabv3_NAME with a name from timm"
        )
    if backbone_name not in TORCHVISION:
        backbone.require_timm_name(backbone_name)
    return name


def build_model(name: str, *, num_classes: int, output_stride: int = 16, separable_conv: bool = False) -> DeepLab:
    """Builds a DeepLab with random weights.

    name: one of `MODELS`, or `deeplabv3plus_NAME` or `deeplabv3_NAME` with a backbone from timm; output_stride: 16 or
    8 (MobileNetV3-Large: 16 only); separable_conv: the head's 3x3 convolutions are atrous separable ones.
    `utils.weights` loads pretrained weights. Raises InputError for an unknown name and for a backbone that cannot
    have the stride.
    """
    head, _, backbone_name = require_model(name).partition("_")
    if output_stride not in ATROUS_RATES:
        raise InputError(f"--output_stride {output_stride}: not supported; choose 16 or 8")
    body = TORCHVISION.get(backbone_name, backbone.from_timm)(backbone_name, output_stride=output_stride)
    rates = ATROUS_RATES[output_stride]
    if head == "deeplabv3":
        classifier = DeepLabHead(body.out_channels, num_classes, rates, separable_conv)
    else:
        classifier = DeepLabHeadPlus(body.out_channels, body.low_level_channels, num_classes, rates, separable_conv)
    return DeepLab(body.features, classifier, mean=body.mean, std=body.std)
