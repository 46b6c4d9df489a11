"""A small network of every layer kind that budgets meet, and methods for it as a run makes them."""

from torch import nn

from flora.config import composed, instantiate_method


def method(name, *overrides):
    """The method of ``adapter=NAME OVERRIDES`` on all layers outside the head."""
    cfg = composed([f"adapter={name}", *overrides])
    if "target_modules" in cfg.adapter:
        cfg.adapter.target_modules = "all"
    return instantiate_method(cfg.adapter)


class Small(nn.Module):
    """A convolution, a depthwise one, a pointwise one and linear layers, one of them in the head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.point = nn.Conv2d(24, 32, 1)
        self.up = nn.Linear(32, 96)
        self.block = nn.ModuleDict({"up": nn.Linear(32, 96)})  # a name that ends like another
        self.head = nn.Linear(96, 5)

    backbone = (3 * 25 + 1) * 24 + 10 * 24 + 25 * 32 + 2 * 33 * 96


def outside(model, head="head"):
    """Parameters that train outside the head."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and f"{head}." not in n)
