"""A network of a user's own package: only allowed code runs, and what it builds is checked."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from flora import config
from flora.config import composed, semantic_config
from flora.errors import ConfigError, WeightsError
from flora.models import OwnModule
from flora.models.spec import ImageSpec

CODE = """
import torch
from torch import nn

NUMBER = 3


class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 4, stride=4), nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.stem(images).mean((2, 3)))


def flat(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 4))


def text(num_classes):
    return "a network"


def reads_itself(num_classes):
    net = Net(num_classes)
    assert net.head.weight.abs().sum().item() > 0
    return net
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "nets.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


def spec(name="Net", **options):
    return OwnModule(**{"target": f"my_package.nets.{name}", "allow": ["my_package"], "image_size": 16} | options)


@pytest.mark.parametrize("allow", [[], ["my"], ["my_package.other"], ["os"]])
def test_code_that_is_not_allowed_is_not_even_imported(allow):
    with pytest.raises(
        ConfigError, match=r"model\.target=my_package\.nets\.Net runs code of my_package: .*model\.allow=\[my_p"
    ):
        spec(allow=allow)
    assert "my_package.nets" not in sys.modules


def test_a_network_is_built_normalised_and_described():
    own = spec(arguments={"width": 12})
    assert isinstance(own, ImageSpec)
    network = own.build(5)
    assert network.training
    assert network.head.weight.shape == (5, 12)
    assert network(own.normalize(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))).shape == (2, 5)
    assert (own.name, own.classifier, own.facts["target"]) == ("Net", ["head"], "my_package.nets.Net")
    assert len(own.facts["code_sha256"]) == 64
    for name in ("Net", "reads_itself"):
        assert all(p.is_meta for p in spec(name).skeleton().parameters())


def test_weights_are_those_of_the_backbone(tmp_path):
    stored = spec().build(3).state_dict()
    save_file(stored, tmp_path / "net.safetensors")
    network = spec(weights=str(tmp_path / "net.safetensors")).build(7)
    assert torch.equal(network.stem.weight, stored["stem.weight"])
    assert network.head.weight.shape[0] == 7
    with pytest.raises(WeightsError, match="is not of Net: 2 tensors differ, first stem"):
        spec(weights=str(tmp_path / "net.safetensors"), arguments={"width": 4}).build(3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "Net"}, r"must be PACKAGE\.MODULE\.NAME, got 'Net'"),
        ({"target": None}, r"must be PACKAGE\.MODULE\.NAME, got None"),
        ({"target": "my_package.nets.Nett"}, "cannot be imported .*Nett.*: install the package"),
        ({"target": "my_package.nope.Net"}, "cannot be imported .*my_package.nope"),
        ({"target": "my_package.nets.NUMBER"}, "is int: name a class or a function"),
        ({"target": "my_package.nets.text"}, "gave str instead of a torch module"),
        ({"target": "my_package.nets.flat"}, "has no module head; it has 0"),
        (
            {"target": "my_package.nets.flat", "classifier": ["0"]},
            r"gives \(1, 5, 13, 13\) for one image instead of logits \(1, 5\)",
        ),
        ({"arguments": {"depth": 3}}, "failed: TypeError: .*depth"),
        ({"image_size": 2}, "fails on an image of model.image_size=2"),
        ({"mean": [1, 2]}, "need three numbers each"),
    ],
)
def test_what_is_wrong_with_a_network_is_said_in_a_line(options, said):
    with pytest.raises(ConfigError, match=said) as error:
        spec(**options).build(5)
    assert "\n" not in str(error.value)


def test_a_run_trains_and_tests_it(tmp_path, monkeypatch):
    import train

    monkeypatch.chdir(tmp_path)
    overrides = [
        *("task=digits", "model=module", "model.target=my_package.nets.Net", "model.allow=[my_package]"),
        *("model.image_size=16", "trainer.max_steps=2", "trainer.max_eval_examples=16", "trainer.batch_size=8"),
        *("trainer.device=cpu", "logger=none", "adapter.kernel_rank=2"),
    ]
    assert train.run(composed(overrides)).is_file()
    assert "allow" not in semantic_config(composed(overrides))["model"], "no saved config lets code run"


def test_only_who_starts_a_run_can_allow_code(monkeypatch, tmp_path):
    cfg = composed(["task=digits", "model=module", "model.target=my_package.nets.Net", "model.allow=[my_package]"])
    typed = []
    overrides = type("Hydra", (), {"overrides": type("Task", (), {"task": typed})})
    monkeypatch.setattr(config.HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(config.HydraConfig, "get", staticmethod(lambda: overrides))
    monkeypatch.setattr(config, "ROOT", tmp_path)
    with pytest.raises(
        ConfigError, match=r"model\.allow=\['my_package'\] comes from a config: type it on the command line"
    ):
        config.check_shape(cfg)
    typed.append("model.allow=[my_package]")
    config.check_shape(cfg)
    typed.clear()
    (tmp_path / "configs" / "local").mkdir(parents=True)
    (tmp_path / "configs" / "local" / "default.yaml").write_text("model: {allow: [my_package]}\n")
    config.check_shape(cfg)
