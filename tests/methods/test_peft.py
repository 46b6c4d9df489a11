"""Any PEFT method as a method: which layers it targets."""

from torch import nn

from flora.methods import Peft
from flora.methods.heads import trained
from tests.methods.families import FAMILIES, adapter


def test_norm_tuning_trains_every_norm_and_nothing_else():
    for family in ("convnext", "resnet", "vit", "bert", "llama"):
        base = FAMILIES[family].build()
        norms = [n for n, m in base.named_modules() if type(m).__name__.endswith(("Norm", "Norm2d", "NormAct2d"))]
        expected = sum(p.numel() for n in norms for p in base.get_submodule(n).parameters())
        head = FAMILIES[family].head
        adapted = adapter("norm_tuning", FAMILIES[family]).apply(FAMILIES[family].build(), head)
        if family == "convnext":
            assert any("grn" in n for n, p in adapted.model.named_parameters() if p.requires_grad)
        assert trained(adapted.model, head)[0] == expected > 0, family


def test_targets_are_not_taken_for_endings_of_other_names():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)

        def forward(self, x):
            return self.conv(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner, self.head = nn.Conv2d(3, 4, 3), Inner(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.inner(self.conv(x)).mean((2, 3)))

    method = Peft("lora", "peft.LoraConfig", skip_depthwise=True, r=2)
    adapted = method.apply(Outer(), ["head"])
    assert adapted.skipped == ["inner.conv"]
    assert list(adapted.ranks) == ["conv"]
