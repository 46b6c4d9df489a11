"""Networks for images and volumes: torchvision, timm, SMP, MONAI, open_clip."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frame import trial
from ..methods import Method
from ..reference import SINGLE, TIGHT, assert_close, by_hand, three_steps


def pictures(size: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def classify(size: int = 32):
    """The loss of a classifier on two pictures."""

    def loss(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(pictures(size)), torch.tensor([0, 1]))

    return loss


def layers(model: nn.Module, *kinds: type[nn.Module], ungrouped: bool = True) -> list[str]:
    """Names of its layers of some kinds; LoRA takes grouped convolutions only where its rank divides."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not (ungrouped and getattr(module, "groups", 1) > 1)
    ]


@trial("torchvision", "VGG11, all-linear and convolutions, ReLU(inplace=True), three steps", slow=True)
def vgg(method: Method) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.vgg11(num_classes=4)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0], model.classifier[3] = nn.Linear(512, 1024), nn.Linear(1024, 1024)
    model.classifier[6] = nn.Linear(1024, 4)
    three_steps(method, model.eval(), "all-linear", classify(), lr=1e-3)
    targets = layers(model, nn.Linear, nn.Conv2d)[:-1]
    three_steps(method, model.train(), targets, classify(), lr=1e-3, steps=1)


@trial("torchvision", "AlexNet, all-linear and convolutions, ReLU(inplace=True), three steps", slow=True)
def alexnet(method: Method) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.alexnet(num_classes=4)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[1], model.classifier[4] = nn.Linear(256, 1024), nn.Linear(1024, 1024)
    model.classifier[6] = nn.Linear(1024, 4)
    three_steps(method, model, "all-linear", classify(64), lr=1e-3)
    three_steps(method, model, layers(model, nn.Linear, nn.Conv2d), classify(64), lr=1e-3, steps=1)


def _resnet():
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=4)


@trial("torchvision", "ResNet (in-place ReLU and +=), every convolution, three steps in training mode")
def resnet(method: Method) -> None:
    model = _resnet()
    three_steps(method, model.train(), layers(model, nn.Conv2d), classify(64), lr=1e-3)


@trial("torchvision", "features of an adapted ResNet: create_feature_extractor and IntermediateLayerGetter")
def resnet_features(method: Method) -> None:
    from torchvision.models._utils import IntermediateLayerGetter

    base = _resnet().double().eval()
    model = method.wrap(copy.deepcopy(base), layers(base, nn.Conv2d)).eval()
    reference = by_hand(method, base, model).eval()
    for network in (IntermediateLayerGetter(model.get_base_model(), {"layer3": "out"}),):
        expected = IntermediateLayerGetter(reference, {"layer3": "out"})(pictures())["out"]
        assert_close(network(pictures())["out"], expected, TIGHT, "features")


@trial("torchvision", "Swin (reads qkv.weight and proj.weight), three steps")
def swin(method: Method) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 24, [1, 2], [2, 4], [4, 4], num_classes=4)
    if not method.is_flora:  # LoRA's layers show the base's weight, so what reads it misses the adapter
        three_steps(method, model.eval(), ["mlp.0", "mlp.3", "reduction"], classify())
        return
    three_steps(method, model.eval(), ["qkv", "attn.proj", "mlp.0", "mlp.3", "reduction"], classify())


@trial("torchvision", "ViT (nn.MultiheadAttention), MLPs and projection of patches, three steps")
def vit(method: Method) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    three_steps(method, model.train(), ["conv_proj", "mlp.0", "mlp.3"], classify())
    if method.is_flora:
        three_steps(method, model.eval(), ["self_attention"], classify())


@trial("torchvision", "Mask R-CNN (backbone, FPN, RPN and heads), three steps", slow=True)
def mask_rcnn(method: Method) -> None:
    import torchvision
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    body = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    backbone = BackboneWithFPN(body, {"layer2": "0", "layer3": "1"}, [128, 256], 32)
    sizes = torchvision.models.detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
    model = MaskRCNN(backbone, 3, min_size=64, max_size=64, rpn_anchor_generator=sizes, rpn_batch_size_per_image=16)
    box = torch.tensor([[8.0, 8, 40, 44]], dtype=torch.double)
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 8:44, 8:40] = 1
    aims = [{"boxes": box, "labels": torch.tensor([1]), "masks": masks}]

    def loss(network: nn.Module) -> Tensor:
        return sum(network(list(pictures(64, 1)), copy.deepcopy(aims)).values())

    targets = [
        name for name in layers(model, nn.Conv2d, nn.Linear) if "body" in name or "fpn" in name or "head" in name
    ]
    three_steps(method, model.train(), targets, loss, lr=1e-4)


@trial("timm", "ConvNeXt V2, pointwise layers and downsampling, three steps; depthwise where it can be adapted")
def convnext(method: Method) -> None:
    import timm

    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 4}
    model = timm.create_model("convnextv2_atto", **sizes)
    targets = layers(model, nn.Conv2d, nn.Linear, ungrouped=not method.is_flora)
    three_steps(method, model.train(), targets, classify(64))


@trial("timm", "EfficientNet ('same' padding, squeeze and excitation), three steps", slow=True)
def efficientnet(method: Method) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_b0", num_classes=4).eval()
    # LoRA's convolution does not pad by the size of its input: those layers are left out for it.
    padded = () if method.is_flora else (timm.layers.Conv2dSame,)
    targets = [
        name for name in layers(model, nn.Conv2d, nn.Linear) if not isinstance(model.get_submodule(name), padded)
    ]
    three_steps(method, model, targets, classify(64), lr=1e-4, steps=2)


@trial("timm", "set_grad_checkpointing of a ViT, an evaluation before backward, three steps")
def timm_checkpointing(method: Method) -> None:
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    model = timm.models.VisionTransformer(**sizes)
    model.set_grad_checkpointing(True)

    def loss(network: nn.Module) -> Tensor:
        value = classify()(network)
        with torch.no_grad():  # as an evaluation between a pass and its backward pass
            network(pictures())
        return value

    three_steps(method, model.train(), ["qkv", "proj", "fc1", "fc2"], loss)


@trial(
    "segmentation-models-pytorch",
    "Unet with a ResNet encoder, every convolution, three steps",
    needs=("segmentation_models_pytorch",),
    slow=True,
)
def smp_unet(method: Method) -> None:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, classes=2, encoder_depth=3, decoder_channels=(32, 16, 8))

    def loss(network: nn.Module) -> Tensor:
        return smp.losses.DiceLoss("multilabel")(network(pictures()), pictures()[:, :2].sigmoid().round())

    three_steps(method, model.train(), layers(model, nn.Conv2d), loss, lr=1e-3)


@trial(
    "segmentation-models-pytorch",
    "FPN and DeepLabV3Plus (dilated and separable convolutions), three steps",
    needs=("segmentation_models_pytorch",),
    slow=True,
)
def smp_deeplab(method: Method) -> None:
    import segmentation_models_pytorch as smp

    for build in (smp.FPN, smp.DeepLabV3Plus):
        torch.manual_seed(0)
        model = build("resnet18", encoder_weights=None, classes=2)
        # LoRA's convolutions do not dilate.
        targets = [
            name for name in layers(model, nn.Conv2d, ungrouped=not method.is_flora)
            if method.is_flora or set(model.get_submodule(name).dilation) == {1}
        ]  # fmt: skip
        three_steps(method, model.eval(), targets, lambda m: m(pictures(64)).square().mean(), lr=1e-4, steps=2)


@trial(
    "monai",
    "UNet of volumes, convolutions (and transposed ones where they can be adapted), three steps",
    needs=("monai",),
)
def monai_unet(method: Method) -> None:
    from monai.losses import DiceLoss
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    model = UNet(3, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1)
    volume = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    kinds = (nn.Conv3d, nn.ConvTranspose3d) if method.is_flora else (nn.Conv3d,)

    def loss(network: nn.Module) -> Tensor:
        return DiceLoss(sigmoid=True)(network(volume), volume.sigmoid().round().expand(-1, 2, -1, -1, -1))

    three_steps(method, model.train(), layers(model, *kinds), loss)


@trial(
    "open_clip_torch",
    "CLIP of two towers, MLPs (and nn.MultiheadAttention where it can), three steps",
    needs=("open_clip",),
)
def open_clip_towers(method: Method) -> None:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=8, vocab_size=40, width=32, heads=2, layers=2)
    model = CLIP(24, vision, text)
    words = torch.randint(1, 40, (2, 8), generator=torch.Generator().manual_seed(0))

    def loss(network: nn.Module) -> Tensor:
        image, word, scale = network(pictures(), words)
        return F.cross_entropy(scale * image @ word.T, torch.arange(2))

    targets = ["c_fc", "c_proj", "conv1", *(["attn"] if method.is_flora else [])]
    three_steps(method, model.train(), targets, loss, lr=1e-2)


@trial("torch", "autocast of convolutions and linear layers in bf16, within bf16's rounding")
def autocast(method: Method) -> None:
    base = _resnet().eval()
    model = method.wrap(copy.deepcopy(base), layers(base, nn.Conv2d)).eval()
    reference = by_hand(method, base, model).eval()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [network(pictures().float()) for network in (model, reference)]
    assert losses[0].dtype is torch.bfloat16
    assert_close(*losses, 0.1)
    assert_close(model(pictures().float()), reference(pictures().float()), SINGLE)
