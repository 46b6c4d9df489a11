"""Every adapter of configs/adapter on every model family: it learns, nothing else moves, and it is saved and loaded."""

import contextlib
import copy
import io
import re

import peft
import pytest
import timm
import torch
import transformers
from torch.nn import functional as F

from flora.errors import ConfigError
from flora.methods import Peft
from flora.methods.base import load
from flora.methods.heads import in_head
from tests.methods.families import ADAPTERS, CLASSES, CONFIGS, EXAMPLES, FAMILIES, Batch, adapter, logits, trainer
from tests.training.test_run import toy_run

pytestmark = pytest.mark.filterwarnings("ignore")

# What an adapter cannot be used with, and the beginning of what it says.
REFUSED = {
    ("bitfit", "resnet"): "bitfit: no convolution or linear layer",
    ("bitfit", "llama"): "bitfit: no convolution or linear layer",
    ("linear_probe", "llama"): "linear_probe: this model has no head",
    ("pissa", "resnet"): "target_modules: pissa can adapt none",
    **{("vpt", family): "target_modules: " for family in FAMILIES if family != "vit"},
    **{(n, f): "target_modules: " for n in ("ia3_paper", "ssl", "ssb") for f in ("resnet", "convnext", "vit")},
}
SKIPPED = {
    ("adalora", "convnext"): "conv_dw",
    ("dora", "convnext"): "conv_dw",
    ("lora", "convnext"): "conv_dw",
    ("oft", "convnext"): "conv_dw",
    ("pissa", "convnext"): r"conv_dw|stem\.0|downsample\.1",
    ("pissa", "vit"): r"patch_embed\.proj",
    ("rslora", "convnext"): "conv_dw",
    ("lora_plus", "convnext"): "conv_dw",
}
# LLaVA reads the features before its vision tower's last layer, so nothing trains behind them.
UNUSED = ("layers.1.", "post_layernorm")
PAIRS = [(name, family) for name in ADAPTERS for family in FAMILIES if (name, family) not in REFUSED]


def quick(name, family):
    """One network with convolutions and one of text, and what runs nowhere else; the rest is slow."""
    if name.startswith("flora_published") and family == "bert":
        return False  # flora with other numbers
    return family in ("convnext", "bert") or (name, family) in (("vpt", "vit"), ("lora_flat", "resnet"))


def build(family):
    torch.manual_seed(1)
    return FAMILIES[family].build()


def batch_of(family):
    torch.manual_seed(2)
    return Batch(FAMILIES[family].inputs(), torch.randint(0, CLASSES, (EXAMPLES,)))


@torch.no_grad()
def evaluated(model, batch):
    training = model.training
    result = logits(model.eval(), batch.columns)
    model.train(training)
    return result


def cross_entropy(model, batch):
    return F.cross_entropy(evaluated(model, batch), batch.columns["labels"]).item()


def train(adapted, family, batch, folder, steps=8, lr=1e-2):
    transformers.set_seed(3)
    run = trainer(adapted, FAMILIES[family], batch, folder, steps, lr)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        run.train()
    return run


def is_own(name, method, model, head):
    """Whether a method may train the parameter of this name."""
    if in_head(name, head):
        return True
    if method.name == "bitfit":
        return name.endswith(".bias")
    if not isinstance(model, peft.PeftModel):
        return method.name == "full"
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[model.active_peft_config.peft_type]
    return any(part.startswith(prefix) for part in name.split("."))


@pytest.mark.parametrize(
    ("name", "family"), [pytest.param(*pair, marks=[] if quick(*pair) else pytest.mark.slow) for pair in PAIRS]
)
def test_a_few_steps(name, family, tmp_path):
    base, batch, head = build(family), batch_of(family), FAMILIES[family].head
    before, start = copy.deepcopy(base.state_dict()), evaluated(base, batch)
    method = adapter(name, FAMILIES[family])
    torch.manual_seed(4)
    adapted = method.apply(base, head)
    model = adapted.model
    if name != "vpt":
        torch.testing.assert_close(evaluated(model, batch), start, msg="it must start as the base model")
    if name == "pissa":
        before = {n.replace("base_layer.", ""): t.clone() for n, t in model.base_model.model.state_dict().items()}

    frozen = {n for n, p in model.named_parameters() if not p.requires_grad} | {n for n, _ in model.named_buffers()}
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n in frozen and name != "full"}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for n in trained if is_own(n, method, model, head)}
    loss = cross_entropy(model, batch)
    train(adapted, family, batch, tmp_path)
    assert cross_entropy(model, batch) < loss
    still = [n for n, p in model.named_parameters() if n in trained and torch.equal(p, trained[n])]
    assert [n for n in still if not any(part in n for part in UNUSED)] == []

    state = model.state_dict()
    assert [n for n, t in frozen.items() if not torch.equal(state[n], t) and "ln_tuning_" not in n] == []

    method.save(model, tmp_path / "saved")
    learnt = evaluated(model, batch)
    assert not torch.allclose(learnt, start)
    again = load(build(family), head, tmp_path / "saved").model
    torch.testing.assert_close(evaluated(again, batch), learnt, rtol=1e-5, atol=1e-6)

    if isinstance(model, peft.PeftModel) and family != "llava":  # PEFT cannot unload a trained module without a weight
        after = model.unload().state_dict()
        moved = {n for n in after if n in before and not torch.equal(after[n], before[n])}
        assert all(in_head(n, head) for n in moved), sorted(moved)
        lost = before.keys() - after.keys()
        assert all(in_head(n, head) or "lora_" in n for n in lost), sorted(lost)


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_cannot_be_adapted_is_said(name, family):
    with pytest.raises(ValueError, match=f"^{REFUSED[name, family]}"):
        adapter(name, FAMILIES[family]).apply(build(family), FAMILIES[family].head)


@pytest.mark.parametrize("name", ["flora", "lora"])
@pytest.mark.parametrize("targets", [["conv_pwl", "conv_wpl"], ["conv_wpl"]])
def test_a_target_that_no_layer_bears_is_named(name, targets):
    base = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"^target_modules: conv_wpl match no layer; layers are called \w"):
        adapter(name, target_modules=targets).apply(base, ["classifier"])


@pytest.mark.parametrize(
    ("name", "family"), [pair for pair in PAIRS if pair[1] == "convnext" or pair == ("pissa", "vit")]
)
def test_skipped_layers_are_listed(name, family):
    adapted = adapter(name, FAMILIES[family]).apply(build(family), FAMILIES[family].head)
    expected = SKIPPED.get((name, family))
    if expected is None:
        assert adapted.skipped == [] or name == "bitfit"
    else:
        assert adapted.skipped
        assert all(re.search(expected, layer) for layer in adapted.skipped)


@pytest.mark.parametrize("name", ["adalora", "loha", "lokr", "lora", "oft", "flora_flat"])
def test_convolutions_with_a_padding_of_their_own_run_or_are_skipped(name):
    base = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES).eval()
    padded = [n for n, m in base.named_modules() if type(m).__name__ == "Conv2dSame"]
    assert len(padded) == 5
    x = torch.randn(1, 3, 32, 32)
    start = base(x)
    adapted = adapter(name).apply(base, ["classifier"])
    assert (set(padded) <= set(adapted.skipped)) == (name in ("adalora", "loha", "lokr"))
    torch.testing.assert_close(adapted.model.eval()(x), start)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_config_says_how_to_run_it(name):
    first, *_ = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert first.startswith("# python train.py ")
    assert f"adapter={name}" in first
    assert adapter(name).name == name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora_flat", {"r": 0}, "r: must be"),
        ("lora_flat", {"r": [4, 4]}, "r: lora_flat takes one integer"),
        ("lora_flat", {"kernel_rank": 3}, "kernel_rank: lora_flat has no such setting"),
        ("trilora", {"use_dora": True}, "use_dora: trilora has no such setting"),
        ("houlsby", {"r": 0}, "r: must be"),
        ("houlsby", {"activation": "step"}, "activation: must be one of relu"),
        ("vpt", {"num_tokens": 0}, "num_tokens: must be"),
        ("flora_shuffled", {"init": "hosvd"}, "init: hosvd"),
        ("flora_shuffled", {"forward": "factored"}, "forward: flora_shuffled"),
        ("flora_flat", {"r": 1, "kernel_rank": 1}, "r: the smallest adapter takes"),
    ],
)
def test_bad_settings_name_the_field(name, changes, message):
    family = FAMILIES["vit" if name == "vpt" else "convnext"]
    with pytest.raises(ValueError, match=f"^{message}") as error:
        adapter(name, family, **changes).apply(family.build(), family.head)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "adapter.r must"),
        ({"initial_r": 4}, "adapter.initial_r must"),
        ({"warmup": 0.6, "final": 0.5}, "adapter.warmup and adapter.final"),
        ({"layer_types": ["Linaer"]}, "adapter.layer_types: 'Linaer'"),
    ],
)
def test_bad_settings_of_methods_are_config_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        adapter("adalora", **changes)


def test_adalora_ends_with_its_average_rank_and_records_it(tmp_path):
    adapted = adapter("adalora", FAMILIES["bert"], r=4).apply(build("bert"), ["classifier"])
    assert set(map(tuple, adapted.ranks.values())) == {(6,)}
    train(adapted, "bert", batch_of("bert"), tmp_path, steps=20)
    ranks = [rank for (rank,) in adapted.ranks.values()]
    assert sum(ranks) == 4 * len(ranks)
    layers = {n: m for n, m in adapted.model.base_model.model.named_modules() if n in adapted.ranks}
    assert adapted.ranks == {n: [int((m.lora_E["default"] != 0).sum())] for n, m in layers.items()}


def test_adalora_takes_a_run_of_one_step(tmp_path):
    adapted = adapter("adalora", FAMILIES["bert"], r=4).apply(build("bert"), ["classifier"])
    train(adapted, "bert", batch_of("bert"), tmp_path, steps=1)
    assert sum(rank for (rank,) in adapted.ranks.values()) == 4 * len(adapted.ranks)


@pytest.mark.parametrize("name", ["adalora", "lotr", "norm_tuning", "bitfit", "lora"])
def test_a_run_restores_its_best_epoch_and_evaluates_what_it_saved(name, tmp_path):
    method = adapter(name)
    run = toy_run(tmp_path, method, epochs=3)
    outcome = run.train()
    history = [entry["eval_accuracy"] for entry in outcome.trainer.state.log_history if "eval_accuracy" in entry]
    assert outcome.trainer.evaluate(run.splits.validation)["eval_accuracy"] == max(history)
    method.save(outcome.adapted.model, tmp_path / "saved")
    again = run.evaluate(tmp_path / "saved")
    assert again.metrics == outcome.metrics
    assert run.counts(again.adapted) == run.counts(outcome.adapted)
    assert run.counts(again.adapted)["trainable_params"] > 0
    assert again.adapted.ranks == outcome.adapted.ranks


def test_adaloras_penalty_is_pefts(tmp_path):
    adapted = adapter("adalora", FAMILIES["bert"], orth_reg_weight=0.3).apply(build("bert"), ["classifier"])
    batch = batch_of("bert").columns
    model = adapted.model.eval()
    output = adapted.model.base_model(**batch)
    plain = F.cross_entropy(output.logits, batch["labels"])
    assert adapted.penalty(model).item() > 0.01
    torch.testing.assert_close(output.loss, plain + adapted.penalty(model))


def test_the_trainer_adds_the_penalty(tmp_path):
    batch = batch_of("convnext")
    adapted = adapter("lora", FAMILIES["convnext"]).apply(build("convnext"), ["head.fc"])
    run = trainer(adapted, FAMILIES["convnext"], batch, tmp_path, 1, 1e-3)
    plain = run.compute_loss(run.model.train(), batch.columns).item()
    run.penalty = lambda model: torch.tensor(2.5)
    assert run.compute_loss(run.model.train(), batch.columns).item() == pytest.approx(plain + 2.5, rel=1e-5)
    assert run.compute_loss(run.model.eval(), batch.columns).item() == pytest.approx(plain, rel=1e-5)


def test_adapters_of_a_run_are_pefts_own_classes():
    assert isinstance(adapter("lora"), Peft)
    assert adapter("dora").config_class is peft.LoraConfig
    assert adapter("loha").config_class is peft.LoHaConfig


BOTTLENECKS = ("houlsby", "pfeiffer", "parallel_adapter")  # add modules, which no weight absorbs
MERGING = [n for n in ADAPTERS if n not in ("full", "linear_probe", "bitfit", "norm_tuning", "vpt", *BOTTLENECKS)]


@pytest.mark.parametrize(
    ("name", "family"),
    [(n, f) for n in MERGING for f in ("resnet", "convnext") if (n, f) not in REFUSED],
)
def test_a_model_runs_as_it_merges(name, family):
    """Whatever builds the weights of a whole model, they are those that merging keeps."""
    adapted = adapter(name, FAMILIES[family]).apply(build(family), FAMILIES[family].head)
    model, inputs = adapted.model.double().eval(), batch_of(family).columns
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        unmerged = logits(model, inputs)
        torch.testing.assert_close(logits(model.merge_and_unload(), inputs), unmerged, rtol=1e-6, atol=1e-9)
