"""Adapters as LoRA's for other software, from their folder alone; and what LoRA cannot hold, merged into the base."""

import copy
import json
from pathlib import Path

import peft
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flora
from flora.adapters.export import folder_to_lora, merge_what_lora_cannot_hold, to_lora
from flora.errors import ConfigError

from .test_convert import Net, adapted
from .test_export import export

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]
WITHOUT_CONV1D = "embed|conv1|conv2|point|conv3|block.c"


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()


def saved(model: nn.Module, folder: Path, **settings) -> peft.PeftModel:
    """A model with an adapter that changes it, saved."""
    wrapped = peft.get_peft_model(model, flora.FloraConfig(**settings, init_weights=False)).eval()
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


def as_lora(base: nn.Module, folder: Path) -> peft.PeftModel:
    """PEFT's own LoRA, loaded from a folder."""
    loaded = peft.PeftModel.from_pretrained(base, folder).eval()
    assert loaded.peft_config["default"].peft_type == peft.PeftType.LORA
    return loaded


def tokens() -> Tensor:
    return torch.randint(20, (5, 12), generator=torch.Generator().manual_seed(0))


def assert_alike(actual: Tensor, expected: Tensor, other: Tensor) -> None:
    """Equal up to rounding, of an output that the adapter changes."""
    assert (expected - other).abs().max() > 1e-2 * expected.abs().max()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


SCALES = {
    "constant": {"scale": 0.7, "scale_pattern": {"conv2": 1.5}},
    "alpha": {"scale": None, "alpha": 5, "alpha_pattern": {"conv1|block.c": 2}},
    "rank-stabilised": {"scale": None, "alpha": 3, "rank_stabilized": True},
}


@pytest.mark.parametrize("scales", SCALES)
def test_every_kind_of_layer_by_its_architecture_on_the_meta_device(scales, tmp_path):
    net = Net().eval()
    settings = {"rank_pattern": {"conv2": [4, 2, 1, 2], "^c": 2}, "modules_to_save": ["block.head"], **SCALES[scales]}
    model = adapted(net, **settings)
    model.base_model.model.block["head"].modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path / "flora", save_embedding_layers=False)
    with torch.device("meta"):
        architecture = Net()
    folder_to_lora(tmp_path / "flora", tmp_path / "lora", architecture)
    lora = as_lora(copy.deepcopy(net), tmp_path / "lora")
    assert_alike(lora(tokens()), model(tokens()), net(tokens()))


def test_linear_layers_and_convolutions_by_their_shapes_alone(tmp_path):
    net = Net().eval()
    model = adapted(net, target_modules=WITHOUT_CONV1D, rank_pattern={"conv2": [4, 2, 1, 2], "point": 1})
    model.save_pretrained(tmp_path / "flora", save_embedding_layers=False)
    folder_to_lora(tmp_path / "flora", tmp_path / "lora", embeddings=["embed"])
    lora = as_lora(copy.deepcopy(net), tmp_path / "lora")
    assert_alike(lora(tokens()), model(tokens()), net(tokens()))
    ranks = {n: m.r["default"] for n, m in lora.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    found = {name.rpartition(".")[2]: rank for name, rank in ranks.items()}
    assert found == {"embed": 3, "conv1": 3, "conv2": 4, "point": 1, "conv3": 3, "c": 3}


def test_the_folder_gives_what_the_model_gives(tmp_path):
    model = saved(llama(), tmp_path / "flora", target_modules=LINEAR, r=3, rank_pattern={"o_proj": 5})
    folder_to_lora(tmp_path / "flora", tmp_path / "one")
    to_lora(model, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two"))
    assert {k: v for k, v in one.items() if one[k] != two.get(k)} == {}


def test_a_reader_that_knows_no_patterns_gets_the_same_logits(tmp_path):
    """As vLLM reads it: names, matrices and one alpha / r for all layers, whatever their ranks are."""
    base = llama()
    settings = {"target_modules": LINEAR, "r": 3, "rank_pattern": {"o_proj": 5, "q_proj": 1}, "alpha": 6, "scale": None}
    model = saved(copy.deepcopy(base), tmp_path / "flora", **settings)
    folder_to_lora(tmp_path / "flora", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    by_hand = copy.deepcopy(base)
    names = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in state}
    assert len(state) == 2 * len(names) == 2 * 4 * 2
    for name in names:
        inward, outward = (state[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert len(inward) == outward.shape[1] <= config["r"]
        by_hand.get_submodule(name).weight.data += config["lora_alpha"] / config["r"] * outward @ inward
    assert_alike(by_hand(tokens()).logits, model(tokens()).logits, base(tokens()).logits)
    lora = as_lora(copy.deepcopy(base), tmp_path / "lora")
    assert_alike(lora(tokens()).logits, model(tokens()).logits, base(tokens()).logits)


def test_names_without_the_prefix_of_pefts_wrapper(tmp_path):
    """As an adapter is saved that diffusers or transformers added to a model."""
    base = llama()
    model = peft.inject_adapter_in_model(
        flora.FloraConfig(target_modules=LINEAR, init_weights=False), copy.deepcopy(base)
    )
    state = peft.get_peft_model_state_dict(model)
    assert not any(key.startswith("base_model") for key in state)
    model.peft_config["default"].save_pretrained(tmp_path / "flora")
    save_file(state, tmp_path / "flora" / "adapter_model.safetensors")
    folder_to_lora(tmp_path / "flora", tmp_path / "lora")
    lora = as_lora(copy.deepcopy(base), tmp_path / "lora")
    assert_alike(lora(tokens()).logits, model(tokens()).logits, base(tokens()).logits)


class Everything(nn.Module):
    """What LoRA holds beside what it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dilated = nn.Conv2d(8, 6, 3, dilation=2)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.bare = nn.Parameter(torch.randn(5, 5))
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.dilated(self.depthwise(self.plain(x)))).flatten(2).mT
        x, _ = self.recurrent(self.attention(x, x, x)[0])
        return self.last(x @ self.bare)


def test_what_lora_cannot_hold_is_merged_into_the_base(tmp_path):
    torch.manual_seed(1)
    base = Everything().eval()
    layers = ["plain", "depthwise", "dilated", "up", "attention", "recurrent", "last"]
    settings = {"target_modules": layers, "target_parameters": ["bare"], "r": 4}
    model = peft.get_peft_model(copy.deepcopy(base), flora.FloraConfig(**settings, init_weights=False)).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    merged = merge_what_lora_cannot_hold(model)
    assert merged[:5] == ["depthwise", "dilated", "up", "attention", "recurrent"]
    assert len(merged) == 6
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    to_lora(model, tmp_path / "lora")
    served = model.unload()
    assert set(served.state_dict()) == set(base.state_dict())
    fresh = Everything().eval()
    fresh.load_state_dict(served.state_dict())
    assert_alike(as_lora(fresh, tmp_path / "lora")(images), expected, base(images))


def test_merging_the_rest_keeps_other_adapters_right(tmp_path):
    model = peft.get_peft_model(Everything(), flora.FloraConfig(target_modules=["plain"]))
    model.add_adapter("other", flora.FloraConfig(target_modules=["last"]))
    with pytest.raises(ValueError, match="other would lose the base"):
        merge_what_lora_cannot_hold(model)
    with pytest.raises(ValueError, match="no FLoRA adapter 'nowhere'"):
        to_lora(model, tmp_path, "nowhere")


def test_with_everything_merged_there_is_nothing_to_convert(tmp_path):
    model = peft.get_peft_model(Everything(), flora.FloraConfig(target_modules=["depthwise"]))
    assert merge_what_lora_cannot_hold(model) == ["depthwise"]
    with pytest.raises(ValueError, match="no layer is left"):
        to_lora(model, tmp_path)


REFUSED = {
    "depthwise: one input channel": {"target_modules": ["depthwise"]},
    "attention: its in_proj_weight": {"target_modules": ["attention"]},
    "recurrent: its weight_": {"target_modules": ["recurrent"]},
    "its bare is one of several or a bare parameter": {"target_modules": ["last"], "target_parameters": ["bare"]},
    "last: a folded weight": {"target_modules": ["last"], "fold_pattern": {"last": [2, 2, 5]}, "forward": "merged"},
    "last: use_dora": {"target_modules": ["last"], "use_dora": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_folders_that_lora_cannot_hold_are_refused(message, tmp_path):
    saved(Everything(), tmp_path / "flora", **REFUSED[message])
    with pytest.raises(ValueError, match=message) as caught:
        folder_to_lora(tmp_path / "flora", tmp_path / "lora")
    assert "merge the adapter instead" in str(caught.value)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["model", "folder"])
def test_what_lora_cannot_hold_is_left_out_where_asked(whole, tmp_path):
    model = saved(Everything(), tmp_path / "flora", target_modules=["depthwise", "last"])
    write, source = (to_lora, model) if whole else (folder_to_lora, tmp_path / "flora")
    left = write(source, tmp_path / "lora", leave_out=True)
    assert list(left) == ["depthwise"]
    assert "depthwise" in left["depthwise"] or "grouped" in left["depthwise"]
    assert peft.LoraConfig.from_pretrained(tmp_path / "lora").target_modules == {"last"}


def test_layers_that_only_the_architecture_shows(tmp_path):
    for name, message in {"dilated": "do not dilate", "up": "ConvTranspose2d", "depthwise": "grouped"}.items():
        saved(Everything(), tmp_path / name, target_modules=[name])
        with pytest.raises(ValueError, match=f"^{name}: .*{message}.*merge the adapter instead"):
            folder_to_lora(tmp_path / name, tmp_path / "lora", Everything())
    with pytest.raises(ValueError, match="dilated: the model has no such layer"):
        folder_to_lora(tmp_path / "dilated", tmp_path / "lora", nn.Sequential())
    other = nn.ModuleDict({"dilated": nn.Conv2d(8, 7, 3)})
    with pytest.raises(ValueError, match=r"dilated: an update of shape \[6, 8, 3, 3\] does not fit"):
        folder_to_lora(tmp_path / "dilated", tmp_path / "lora", other)


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        folder_to_lora(tmp_path, tmp_path / "out")
    peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ValueError, match="peft_type is LORA"):
        folder_to_lora(tmp_path / "lora", tmp_path / "out")


def test_the_script_needs_no_model_for_linear_layers(tmp_path):
    base = llama()
    model = saved(copy.deepcopy(base), tmp_path / "flora", target_modules=[*LINEAR, "embed_tokens"])
    command = [str(tmp_path / "flora"), str(tmp_path / "lora"), "--to", "lora", "--embeddings", "embed_tokens"]
    export(command)
    lora = as_lora(copy.deepcopy(base), tmp_path / "lora")
    assert_alike(lora(tokens()).logits, model(tokens()).logits, base(tokens()).logits)


def test_the_script_takes_the_architecture_without_weights(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path / "base")  # no weights there
    base = transformers.GPT2LMHeadModel(config).eval()
    model = saved(copy.deepcopy(base), tmp_path / "flora", target_modules=["c_attn", "c_proj"], r=4, scale=20.0)
    command = [str(tmp_path / "flora"), str(tmp_path / "lora"), "--to", "lora"]
    export([*command, "--model", f"transformers:{tmp_path / 'base'}"])
    lora = as_lora(copy.deepcopy(base), tmp_path / "lora")
    assert_alike(lora(tokens()).logits, model(tokens()).logits, base(tokens()).logits)


def test_the_script_leaves_out_or_merges_the_rest_of_a_convnext(tmp_path, monkeypatch, capsys):
    """Its depthwise convolutions, which LoRA has no layout for, go into the base."""

    def build(*_, **__):
        torch.manual_seed(0)
        return timm.create_model("convnextv2_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).eval()

    monkeypatch.setattr("export.build", build)
    base = build()
    targets = [n for n, m in base.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and not n.startswith("head")]
    model = saved(build(), tmp_path / "flora", target_modules=targets, modules_to_save=["head.fc"])
    images = torch.randn(2, 3, 32, 32)
    command = [str(tmp_path / "flora"), str(tmp_path / "lora"), "--to", "lora", "--model", "convnext"]
    export(command)
    assert "left out: stages.0.blocks.0.conv_dw: a grouped convolution has no LoRA layout" in capsys.readouterr().err
    assert not [key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors") if "conv_dw" in key]
    export([*command, "--merge-rest", str(tmp_path / "base.safetensors")])
    served = build()
    served.load_state_dict(load_file(tmp_path / "base.safetensors"))
    assert_alike(as_lora(served, tmp_path / "lora")(images), model(images), base(images))


def test_bad_options_are_one_line(tmp_path):
    saved(Everything(), tmp_path / "flora", target_modules=["last"])
    source, output = str(tmp_path / "flora"), str(tmp_path / "out")
    for options, message in {
        ("--to", "lycoris"): "--model: needed",
        ("--to", "lora", "--merge-rest", "x"): "--merge-rest: needs --to lora and --model",
    }.items():
        with pytest.raises(ConfigError, match=message):
            export([source, output, *options])
