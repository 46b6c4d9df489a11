"""target_modules="all": every layer that FLoRA can adapt, but for the head."""

import warnings

import peft
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import flora

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding, nn.LSTM)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}


def adapted(model, **settings):
    """Names of the layers that carry an adapter."""
    return set(wrapped(model, **settings).targeted_module_names)


def wrapped(model, **settings):
    return peft.get_peft_model(model, flora.FloraConfig(**{"target_modules": "all", "r": 2, **settings}))


def layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, LAYERS)}


def transformer(kind, **settings):
    """A small one of transformers' with a fresh head."""
    name, head = kind.split("For")
    config = getattr(transformers, f"{name}Config")(**{**SMALL, "num_labels": 3, **settings})
    return getattr(transformers, f"{name}For{head}")(config)


class Own(nn.Module):
    """A network of one's own: layers of many kinds, and none that says it is the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.up = nn.ConvTranspose2d(3, 4, 2)
        self.lstm = nn.LSTM(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 2)


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (lambda: timm.create_model("resnet18", num_classes=10), {"fc"}),
        (lambda: timm.create_model("convnextv2_atto", num_classes=10), {"head.fc"}),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=12), {"head", "head_dist"}),
        (lambda: torchvision.models.resnet18(), {"fc"}),
        (lambda: torchvision.models.mobilenet_v3_small(), {"classifier.3"}),  # not the layer before the last
        (lambda: transformer("BertForSequenceClassification"), {"classifier"}),
        (lambda: transformer("RobertaForSequenceClassification"), {"classifier.dense", "classifier.out_proj"}),
        (lambda: transformer("LlamaForCausalLM"), {"lm_head"}),
        (lambda: transformer("LlamaForCausalLM", tie_word_embeddings=True), {"lm_head", "model.embed_tokens"}),
        (lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)), set()),  # a backbone has no head
    ],
)
def test_all_is_every_layer_but_the_head(build, head):
    model = build()
    assert head <= layers(model)
    assert adapted(model) == layers(build()) - head


def test_all_names_every_kind_of_layer():
    assert adapted(Own()) == {"embed", "up", "lstm", "attention", "last"}
    assert adapted(Own(), modules_to_save=["last"]) == {"embed", "up", "lstm", "attention"}


def test_all_respects_what_is_left_out():
    assert adapted(Own(), exclude_modules=["embed", "lstm"]) == {"up", "attention", "last"}
    llama = transformer("LlamaForCausalLM")
    assert "model.embed_tokens" not in adapted(llama, trainable_token_indices=[3])


def test_a_layer_that_ends_as_a_target_does_is_no_target():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.head = nn.Linear(4, 4), nn.Sequential()
            self.head.add_module("proj", nn.Linear(4, 2))

    assert adapted(Heads()) == {"proj"}


def test_what_is_saved_names_the_layers_and_loads(tmp_path):
    model = wrapped(timm.create_model("resnet18", num_classes=4), init_weights=False).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = peft.PeftModel.from_pretrained(timm.create_model("resnet18", num_classes=4), tmp_path).eval()
    again.base_model.model.load_state_dict(
        {k: v for k, v in model.base_model.model.state_dict().items() if "tucker" not in k}, strict=False
    )
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), model(images))


def test_a_second_adapter_takes_the_same_layers():
    model = wrapped(timm.create_model("resnet18"))
    first = set(model.targeted_module_names)
    model.add_adapter("second", flora.FloraConfig(target_modules="all", r=1))
    assert model.base_model.effective_ranks("second").keys() == first


def test_nothing_to_adapt_is_an_error():
    with pytest.raises(ValueError, match="target_modules: LayerNorm has no layer outside its head"):
        wrapped(nn.Sequential(nn.LayerNorm(3))[0])


def test_all_linear_on_a_convolutional_network_warns():
    """Of a ResNet-18 it adapts the classifier alone."""
    with pytest.warns(UserWarning, match="all-linear leaves the 20 convolutions of ResNet alone; 'all' adapts them"):
        assert adapted(timm.create_model("resnet18"), target_modules="all-linear") == {"fc"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*all-linear")
        adapted(transformer("LlamaForCausalLM"), target_modules="all-linear")
