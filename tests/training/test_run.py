"""One run on a toy problem: what is trained, with which rates, selected on what, and evaluated how."""

import dataclasses

import pytest
import torch
from torch import nn

from flora.errors import ConfigError, TrainingDiverged
from flora.methods import Full, LinearProbe, Peft
from flora.methods.base import load
from flora.methods.heads import in_head
from flora.tasks import ImageDataset, ImageTask, Splits
from flora.training import Protocol, Run, TrainerSettings, evaluate

HOLDOUT = Protocol("holdout", "best", "train")
VTAB = Protocol("vtab1k", "last", "train+validation")


class Head(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(x)


class ToyModel:
    """A backbone with batch norm and a depthwise convolution, as a model spec."""

    name, kind = "toy", "image"
    classifier = ["7.fc"]
    facts = {"pretrained": False}

    def build(self, num_classes, drop_path=0.0):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 8),
            Head(num_classes),
        )

    def normalize(self, images):
        return images.float() / 255 - 0.5


class ToyTask(ImageTask):
    """Which of three colour channels is brightest."""

    safe_augmentation = "none"

    def __init__(self):
        super().__init__(name="toy", dataset="channels", epochs=1)

    def files(self, data_dir):
        return None

    def load(self, **options):
        return SPLITS


def channels(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images[torch.arange(count), labels] += 60
    return ImageDataset(images, labels)


SPLITS = Splits(channels(96, 0), channels(32, 1), channels(64, 2), 3, ["r", "g", "b"], {})


def toy_run(folder, method=None, protocol=HOLDOUT, **settings):
    method = method or LinearProbe("linear_probe")
    settings = TrainerSettings(**({"epochs": 3, "lr": 1e-2, "head_lr": 1e-2, "batch_size": 16} | settings))
    return Run(ToyTask(), ToyModel(), method, settings, protocol, SPLITS, 0, folder)


def lora(**options):
    return Peft("lora", "peft.LoraConfig", skip_depthwise=True, r=2, **options)


def test_full_fine_tuning_solves_the_toy_problem(tmp_path):
    outcome = toy_run(tmp_path, Full("full"), epochs=8).train()
    assert outcome.metrics["accuracy"] > 0.9


def test_metrics_equal_a_plain_loop(tmp_path):
    run = toy_run(tmp_path)
    outcome = run.train()
    model = outcome.adapted.model.eval()
    with torch.no_grad():
        predicted = model(run.model.normalize(SPLITS.test.images)).argmax(1)
    expected = (predicted == SPLITS.test.labels).double().mean().item()
    assert outcome.metrics["accuracy"] == pytest.approx(expected, abs=1e-12)
    assert evaluate(model, run.model, run.task, SPLITS.test)["accuracy"] == outcome.metrics["accuracy"]


def test_adapter_and_head_have_their_own_learning_rates_and_vectors_do_not_decay(tmp_path):
    outcome = toy_run(tmp_path, lora(), lr=3e-3, head_lr=7e-3, weight_decay=0.1, max_steps=1).train()
    names = {id(p): n for n, p in outcome.adapted.model.named_parameters()}
    seen = set()
    for group in outcome.trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["initial_lr"] == (7e-3 if in_head(name, ToyModel.classifier) else 3e-3), name
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
    assert seen == {n for n, p in outcome.adapted.model.named_parameters() if p.requires_grad}
    assert {in_head(n, ToyModel.classifier) for n in seen} == {True, False}


def test_only_adapter_and_head_move_and_frozen_statistics_stay(tmp_path):
    run = toy_run(tmp_path, lora(), max_steps=5)
    before = run._base().state_dict()
    model = run.train().adapted.model
    after = model.unload().state_dict()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert set(before) - unchanged == {"7.fc.weight", "7.fc.bias"}


def test_frozen_norms_keep_the_precision_of_their_statistics(tmp_path):
    outcome = toy_run(tmp_path, lora(), max_steps=2, dtype="bf16", frozen_dtype="bf16", device="cpu").train()
    frozen = outcome.adapted.model.unload()
    assert {p.dtype for p in frozen[1].parameters()} == {torch.float32}
    assert {p.dtype for p in frozen[0].parameters()} == {torch.bfloat16}


def test_full_fine_tuning_moves_the_statistics(tmp_path):
    run = toy_run(tmp_path, Full("full"), max_steps=2)
    before = run._base().state_dict()
    after = run.train().adapted.model.state_dict()
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])


def test_lora_skips_depthwise_layers_and_says_so(tmp_path):
    outcome = toy_run(tmp_path, lora(), max_steps=1).train()
    assert outcome.adapted.skipped == ["3"]
    assert outcome.adapted.ranks == {"0": [2], "6": [2]}


def test_holdout_reports_the_epoch_that_is_best_on_validation(tmp_path):
    run = toy_run(tmp_path, Full("full"), epochs=6)
    wrong = (SPLITS.validation.labels + 1) % 3  # the better the model, the worse its validation accuracy
    run.splits = dataclasses.replace(SPLITS, validation=ImageDataset(SPLITS.validation.images, wrong))
    outcome = run.train()
    history = [e["eval_accuracy"] for e in outcome.trainer.state.log_history if "eval_accuracy" in e]
    assert history[-1] != max(history), "the last epoch must not be the best, or this shows nothing"
    assert outcome.trainer.evaluate(run.splits.validation)["eval_accuracy"] == max(history)
    assert list(tmp_path.iterdir()) == [], "checkpoints of the search are removed"


def test_the_grid_chooses_on_validation_and_its_cost_is_recorded(tmp_path):
    protocol = dataclasses.replace(HOLDOUT, lr_grid=[1e-7, 1e-2])
    outcome = toy_run(tmp_path, Full("full"), protocol, epochs=6).train()
    assert outcome.lr == 1e-2
    assert set(outcome.selection["values"]) == {"1e-07", "0.01"}
    assert outcome.selection["values"]["0.01"] > outcome.selection["values"]["1e-07"]
    assert outcome.selection["seconds"] > 0
    assert outcome.selection["split"] == "validation"


def test_a_grid_is_over_the_rate_of_the_head_where_that_alone_is_trained(tmp_path):
    protocol = dataclasses.replace(HOLDOUT, lr_grid=[1e-2])
    outcome = toy_run(tmp_path, LinearProbe("linear_probe"), protocol, epochs=1, head_lr=1e-3).train()
    same = toy_run(tmp_path, LinearProbe("linear_probe"), epochs=1, lr=1e-2, head_lr=None).train()
    assert torch.equal(outcome.adapted.model[7].fc.weight, same.adapted.model[7].fc.weight)
    assert {group["initial_lr"] for group in outcome.trainer.optimizer.param_groups} == {outcome.lr} == {1e-2}
    beside = toy_run(tmp_path, lora(), dataclasses.replace(protocol, lr_grid=[2e-3]), epochs=1, head_lr=3e-3).train()
    assert {group["initial_lr"] for group in beside.trainer.optimizer.param_groups} == {2e-3, 3e-3}


def test_vtab_protocol_chooses_on_800_200_then_trains_on_all(tmp_path):
    outcome = toy_run(tmp_path, protocol=dataclasses.replace(VTAB, lr_grid=[1e-3, 1e-2]), epochs=1).train()
    assert len(outcome.trainer.train_dataset) == 96 + 32
    assert outcome.trainer.state.global_step == (96 + 32) // 16
    assert not any("eval_accuracy" in entry for entry in outcome.trainer.state.log_history)


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not(tmp_path):
    first, again = (toy_run(tmp_path, lora()).train() for _ in range(2))
    other = dataclasses.replace(toy_run(tmp_path, lora()), seed=1).train()
    state, same = first.adapted.model.state_dict(), again.adapted.model.state_dict()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert any(not torch.equal(state[n], t) for n, t in other.adapted.model.state_dict().items())


def test_counts_separate_adapter_and_head(tmp_path):
    run = toy_run(tmp_path, lora(), max_steps=1)
    # convolution 3 -> 8 with 3 x 3 kernel: 2 * (3 * 9 + 8); linear 32 -> 8: 2 * (32 + 8); head 8 -> 3
    base = 8 * 27 + 8 + 16 + 8 * 9 + 8 + 32 * 8 + 8 + 27
    expected = {"trainable_params": 2 * 35 + 2 * 40, "head_params": 27, "total_params": base}
    assert run.counts(run.train().adapted) == expected


@pytest.mark.parametrize("method", [lora(), LinearProbe("linear_probe"), Full("full")])
def test_what_was_saved_evaluates_to_the_same_logits(tmp_path, method):
    run = toy_run(tmp_path, method, max_steps=4)
    outcome = run.train()
    method.save(outcome.adapted.model, tmp_path / "saved")
    again = run.evaluate(tmp_path / "saved")
    assert again.metrics == outcome.metrics
    images = run.model.normalize(SPLITS.test.images)
    with torch.no_grad():
        assert torch.equal(again.adapted.model.eval()(images), outcome.adapted.model.eval()(images))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = toy_run(tmp_path, Full("full"), max_steps=1)
    run.method.save(run.train().adapted.model, tmp_path / "saved")
    with pytest.raises(ValueError, match="does not fit this model"):
        load(nn.Sequential(nn.Linear(2, 2)), ["0"], tmp_path / "saved")
    other = run.model.build(7)
    with pytest.raises(ValueError, match=r"does not fit this model: .* size mismatch for .*\[7"):
        load(other, run.model.classifier, tmp_path / "saved")


def test_a_diverging_loss_stops_the_run(tmp_path):
    with pytest.raises(TrainingDiverged, match="step"):
        toy_run(tmp_path, Full("full"), lr=1e30, max_grad_norm=1e30, epochs=10, log_every=1).train()


def test_gradient_accumulation_equals_the_large_batch(tmp_path):
    whole, parts = (
        toy_run(tmp_path, max_steps=4, gradient_accumulation=n).train().adapted.model.state_dict() for n in (1, 4)
    )
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "trainer.epochs"),
        ({"lr": -1}, "trainer.lr"),
        ({"dtype": "fp8"}, "trainer.dtype"),
        ({"warmup_ratio": 1.5}, "trainer.warmup_ratio"),
        ({"schedule": "warmup_stable_decay"}, "trainer.schedule must be one of linear, "),
        ({"batch_size": 10, "gradient_accumulation": 3}, "multiple"),
        ({"max_steps": -1}, "trainer.max_steps"),
        ({"batch_size": "many"}, "trainer.batch_size"),
        ({"max_steps": 1.5}, "trainer.max_steps must be a whole number"),
        ({"pad_to_multiple_of": 0}, "trainer.pad_to_multiple_of must be a positive number"),
        ({"num_workers": "two"}, "trainer.num_workers must be a number"),
        ({"num_workers": 1.5}, "trainer.num_workers must be a whole number"),
    ],
)
def test_settings_name_the_field_that_is_wrong(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainerSettings(**({"epochs": 1, "lr": 1, "head_lr": 1} | change))


@pytest.mark.parametrize(
    "arguments", [("p", "first", "train"), ("p", "best", "all"), ("p", "best", "train+validation")]
)
def test_protocols_that_contradict_themselves_are_refused(arguments):
    with pytest.raises(ConfigError, match="protocol"):
        Protocol(*arguments)


@pytest.mark.parametrize("grid", [[], [0.0], [-1e-3], ["a"], 0.1, [float("nan")]])
def test_a_grid_of_anything_but_positive_rates_is_refused(grid):
    with pytest.raises(ConfigError, match="lr_grid"):
        Protocol("p", "last", "train", grid)
