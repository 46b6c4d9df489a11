"""Feature maps of pretrained networks: their strides and channels, their weights, and what is left of the network."""

import pytest
import timm
import torch
from torch import nn

from flora.errors import ConfigError
from flora.models import TimmModel, get
from flora.models.feature_maps import DenseModel, FeatureMaps


def random_model(name: str, **architecture: object) -> TimmModel:
    return TimmModel(name, pretrained=False, architecture=architecture or None)


class Summed(DenseModel):
    """The smallest head there is."""

    heads = ("head",)

    def network(self, features: FeatureMaps, num_classes: int) -> nn.Module:
        module = nn.Module()
        module.backbone, module.head = features, nn.Conv2d(features.channels[-1], num_classes, 1)
        return module


@pytest.mark.parametrize(
    ("name", "options", "channels"),
    [
        ("convnextv2_atto", {}, (40, 80, 160, 320)),
        ("resnet18", {}, (64, 128, 256, 512)),
        ("tf_efficientnet_lite0", {}, (24, 40, 112, 320)),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False}, (96, 192, 384, 768)),
    ],
)
def test_maps_lie_at_four_strides(name, options, channels):
    model = Summed(random_model(name, **options)).skeleton()
    assert model.backbone.channels == channels
    maps = model.backbone(torch.empty(2, 3, 64, 128, device="meta"))
    assert [tuple(m.shape) for m in maps] == [
        (2, count, 64 // stride, 128 // stride) for count, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("name", ["convnext", "resnet"])
def test_the_shipped_weights_are_those_of_the_classifier(name):
    spec = get(name)
    classifier, features = spec.build(2).eval(), FeatureMaps(spec.build(2), norms=False).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(features(images)[-1], classifier.forward_features(images))


def test_maps_equal_those_of_timms_own_extractor():
    spec = random_model("resnet18", channels=(8, 16, 24, 32))
    features = FeatureMaps(spec.build(2), norms=False).eval()
    theirs = timm.create_model("resnet18", features_only=True, channels=(8, 16, 24, 32)).eval()
    theirs.load_state_dict(features.network.state_dict())
    images = torch.randn(2, 3, 50, 70)  # which no stride divides
    with torch.no_grad():
        for own, other in zip(features(images), theirs(images)[1:], strict=True):
            assert torch.equal(own, other)


@pytest.mark.parametrize("name", ["convnextv2_atto", "resnet18", "tf_efficientnet_lite0"])
def test_nothing_is_left_that_the_maps_do_not_depend_on(name):
    features = FeatureMaps(random_model(name).build(2), norms=True)
    sum(m.square().sum() for m in features(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, p in features.named_parameters() if p.grad is None] == []


def test_norms_after_a_convnext_belong_to_the_head():
    assert Summed(get("convnext")).classifier == ["backbone.norms", "head"]
    assert Summed(get("resnet")).classifier == ["head"]
    maps = Summed(get("convnext")).build(3).backbone(torch.randn(1, 3, 64, 64))
    for features in maps:
        assert features.mean(dim=1).abs().max() < 1e-5  # each pixel, over its channels


def test_a_network_without_such_maps_is_refused():
    with pytest.raises(ConfigError, match="feature maps at strides 16, dense prediction needs 4, 8, 16 and 32"):
        Summed(random_model("vit_tiny_patch16_224"))
    with pytest.raises(ConfigError, match="model=minilm_l6 has no feature maps"):
        Summed(get("minilm_l6"))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "coatnet_0_224"])
def test_networks_of_one_image_size_are_refused(name):
    with pytest.raises(ConfigError, match="does not take images of any size"):
        Summed(random_model(name))
