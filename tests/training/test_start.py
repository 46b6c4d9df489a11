"""The start from gradients in a run: its head, its gradients, and that all else is as in a run without it."""

import copy
import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import tensorly
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from flora.config import cell_id, composed, idle, instantiate_method
from flora.methods import Peft
from flora.methods.gradient import GradientSettings
from flora.training.resume import rng_state
from flora.training.start import Start
from tests.training.processes import together
from tests.training.test_distributed import network
from tests.training.test_resume import GRID, HOLDOUT, VTAB, checkpointed_run, interrupted, result
from tests.training.test_run import SPLITS, ToyModel, ToyTask, toy_run

LOOK = {"batches": 3, "head_steps": 7}


def method(init="gradient", look=(), budget=None, **options):
    made = Peft("flora", "flora.FloraConfig", "all", **({"r": 2, "kernel_rank": 2, "init": init} | options))
    made.set_gradient(**(LOOK | dict(look)))
    if budget is not None:
        made.set_budget(budget, "gradient")
    return made


class Begin(TrainerCallback):
    """Keeps what training begins with."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = copy.deepcopy(model.state_dict())
        self.random = rng_state(cuda=False)


class Watched(ToyTask):
    """Notes the labels of each batch in training, by whether an adapter trains."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, model):
        forward = super().forward(model)

        def watched(module, batch, training):
            if module.training:
                self.seen.append(batch["labels"].tolist())
            return forward(module, batch, training)

        return watched


def begun(folder, made, **settings):
    """What training of a toy run begins with, the labels that it saw, and the run."""
    run, begin = toy_run(folder, made, **({"max_steps": 2} | settings)), Begin()
    run.task = Watched()
    run.watching.append(begin)
    outcome = run.train()
    return begin, run.task.seen, run, outcome


def head_by_hand(base, steps, batch, rate):
    """Softmax regression on the frozen features: AdamW, warm-up over a tenth of the steps, then a cosine."""
    order, head = torch.Generator().manual_seed(0), copy.deepcopy(base[7])
    optimizer = torch.optim.AdamW(
        [{"params": [head.fc.weight], "weight_decay": 1e-4}, {"params": [head.fc.bias], "weight_decay": 0.0}], lr=rate
    )
    rows = [row for _ in range(2) for row in torch.randperm(96, generator=order).split(batch)][:steps]
    for step, row in enumerate(rows):
        share = step if step < 1 else (1 + np.cos(np.pi * (step - 1) / (steps - 1))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        with torch.no_grad():
            features = base[:7](ToyModel().normalize(SPLITS.train.images[row]))
        optimizer.zero_grad()
        F.cross_entropy(head(features), SPLITS.train.labels[row]).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    return head


def gradients_by_hand(base, head, names, batch, count):
    """Of each batch of one pass, stacked: batches x the weight's shape, float64."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).split(batch)[:count]
    model = torch.nn.Sequential(*base[:7], head).double()
    found = {name: [] for name in names}
    for row in order:
        model.zero_grad()
        images = ToyModel().normalize(SPLITS.train.images[row]).double()
        F.cross_entropy(model(images), SPLITS.train.labels[row]).backward()
        for name, gradients in found.items():
            gradients.append(model.get_parameter(name).grad.numpy().copy())
    return {name: np.stack(gradients) for name, gradients in found.items()}


def test_factors_are_the_hosvd_of_gradients_that_go_through_a_head_trained_alone(tmp_path, capsys):
    begin, _, run, outcome = begun(tmp_path, method())
    base = run._base().eval()
    head = head_by_hand(base, LOOK["head_steps"], 16, 1e-2)
    torch.testing.assert_close(run._starts["train"]["head"], [head.fc.weight.detach(), head.fc.bias.detach()])
    names = ["0.weight", "3.weight", "6.weight"]
    checked = []
    for name, stacked in gradients_by_hand(base, head, names, 16, LOOK["batches"]).items():
        factors = {
            int(key.rpartition("_")[2]): value.double().numpy()
            for key, value in begin.weights.items()
            if f"model.{name.removesuffix('weight')}tucker_factors" in key
        }
        for mode, factor in factors.items():
            if mode == 0 or factor.shape[0] == factor.shape[1]:
                continue
            unfolded = tensorly.unfold(stacked, mode + 1)
            best = np.square(np.linalg.svd(unfolded, compute_uv=False))[: factor.shape[1]].sum()
            assert np.square(factor.T @ unfolded).sum() == pytest.approx(best, rel=1e-5)
            np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-6)
            checked.append(np.square(factor.T @ unfolded).sum() / np.square(stacked).sum())
        assert not factors[0].any()
    report = outcome.trainer.execution["start"]
    assert report["kept"] == pytest.approx(np.mean(checked), abs=1e-3)
    assert report["seconds"] > 0 < report["peak_memory_bytes"]
    said = capsys.readouterr().err
    assert "start: the head alone for 7 steps (" in said
    assert f"start: factors from the gradients of 48 examples; they keep {report['kept']:.0%} on average (" in said


def test_all_else_is_as_with_zero_output(tmp_path):
    begin, seen, _, outcome = begun(tmp_path / "gradient", method())
    plain, seen_plain, _, other = begun(tmp_path / "zero_output", method("zero_output"))
    assert seen == seen_plain
    assert len(seen) == 2
    assert torch.equal(begin.random["torch"], plain.random["torch"])
    assert repr(begin.random) == repr(plain.random)
    assert begin.weights.keys() == plain.weights.keys()
    differ = {name for name in begin.weights if not torch.equal(begin.weights[name], plain.weights[name])}
    assert differ
    assert all("tucker_factors" in name for name in differ), "the head is put back bit for bit"
    assert "start" not in other.trainer.execution
    assert {n: (p.requires_grad, p.dtype) for n, p in outcome.adapted.model.named_parameters()} == {
        n: (p.requires_grad, p.dtype) for n, p in other.adapted.model.named_parameters()
    }


def test_the_seed_decides_and_the_same_one_gives_the_same_bits(tmp_path):
    first, again = (begun(tmp_path, method())[0].weights for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    run = dataclasses.replace(toy_run(tmp_path, method(), max_steps=1), seed=1)
    run.watching.append(other := Begin())
    run.train()
    assert any(not torch.equal(first[name], other.weights[name]) for name in first if "factors" in name)


@pytest.mark.parametrize("init", ["gradient", "zero_output"])
def test_the_head_may_go_on_from_where_it_was(tmp_path, init):
    budget = None if init == "gradient" else 300
    begin, _, run, _ = begun(tmp_path, method(init, {"put_back": False}, budget))
    head = [value for name, value in begin.weights.items() if "modules_to_save.default" in name]
    assert all(torch.equal(a, b) for a, b in zip(head, run._starts["train"]["head"], strict=True))
    without, _, _, _ = begun(tmp_path, method(init, {"head_steps": 0}, budget))
    fresh = [value for name, value in without.weights.items() if "modules_to_save.default" in name]
    assert not torch.equal(head[0], fresh[0])
    assert torch.equal(fresh[0], run._base()[7].fc.weight)


def test_all_rates_share_a_start_and_the_last_fit_has_its_own(tmp_path, capsys):
    run = toy_run(tmp_path, method(), dataclasses.replace(VTAB, lr_grid=[1e-3, 1e-2]), epochs=1)
    run.watching.append(begin := Begin())
    run.train()
    assert capsys.readouterr().err.count("start: factors") == 2
    assert run._starts.keys() == {"train", "all"}
    assert all(torch.equal(begin.weights[n], v) for n, v in run._starts["all"]["weights"].items() if "factors" in n)
    factors = [n for n in begin.weights if "factors" in n]
    assert any(not torch.equal(run._starts["all"]["weights"][n], run._starts["train"]["weights"][n]) for n in factors)
    other = toy_run(tmp_path, method(), dataclasses.replace(VTAB, lr_grid=[1e-3, 1e-2]), epochs=1, head_lr=None)
    other.train()
    assert other._starts.keys() == {"train, lr 0.001", "train, lr 0.01", f"all, lr {other.train().lr:g}"}


@pytest.mark.parametrize(
    "options",
    [{}, {"protocol": dataclasses.replace(VTAB, lr_grid=GRID), "epochs": 2}, {"budget": 300}],
    ids=["one fit", "grid, then all data", "ranks"],
)
def test_a_run_that_was_killed_ends_as_if_left_alone(tmp_path, monkeypatch, capsys, options):
    budget = options.get("budget")
    options = {"protocol": HOLDOUT, "epochs": 2, "head_lr": 1e-2} | {k: v for k, v in options.items() if k != "budget"}
    make = functools.partial(checkpointed_run, **options)
    calm = result(make(tmp_path / "calm", method(budget=budget)).train())
    interrupted(make(tmp_path / "killed", method(budget=budget)), monkeypatch, 3)
    capsys.readouterr()
    last = make(tmp_path / "killed", method(budget=budget))
    outcome = last.train()
    assert result(outcome) == calm
    assert outcome.trainer.execution["start"]["seconds"] > 0
    expected = 0 if options["protocol"] is HOLDOUT else 2  # on all data alone
    assert capsys.readouterr().err.count("start: ") == expected, "what a checkpoint holds is not computed again"


def test_what_is_saved_is_an_adapter_like_any_other(tmp_path):
    made = method()
    run = toy_run(tmp_path, made, max_steps=4)
    outcome = run.train()
    made.save(outcome.adapted.model, tmp_path / "saved")
    assert '"init": "zero_output"' in (tmp_path / "saved" / "adapter_config.json").read_text()
    assert run.evaluate(tmp_path / "saved").metrics == outcome.metrics
    images = run.model.normalize(SPLITS.test.images)
    with torch.no_grad():
        expected = outcome.adapted.model.eval()(images)
        torch.testing.assert_close(outcome.adapted.model.merge_and_unload()(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "constant"])
def test_a_schedule_that_follows_validation_is_a_constant_one_for_the_head(tmp_path, schedule):
    head = begun(tmp_path, method(), schedule=schedule)[2]._starts["train"]["head"]
    constant = begun(tmp_path, method(), schedule="constant")[2]._starts["train"]["head"]
    assert all(torch.equal(a, b) for a, b in zip(head, constant, strict=True))


@pytest.mark.parametrize("options", [{}, {"init": "zero_output", "budget": 300}], ids=["start", "ranks"])
def test_a_deterministic_run_starts_so(tmp_path, monkeypatch, options):
    seen, loss = [], Start._loss

    def watched(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return loss(*arguments)

    monkeypatch.setattr(Start, "_loss", watched)
    for name in ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "0")  # put back afterwards
    torch.use_deterministic_algorithms(False)
    try:
        begun(tmp_path, method(**options), deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(seen) == {True}


def test_an_untrained_run_starts_as_its_reported_fit_would(tmp_path):
    run = toy_run(tmp_path, method(look={"put_back": False}), VTAB, max_steps=2)
    run.watching.append(begin := Begin())
    run.train()
    state = toy_run(tmp_path, method(look={"put_back": False}), VTAB, max_steps=0).train().adapted.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in begin.weights.items())


def test_an_untrained_run_has_its_start_too(tmp_path):
    outcome = toy_run(tmp_path, method(), max_steps=0).train()
    begin = begun(tmp_path, method())[0]
    state = outcome.adapted.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in begin.weights.items())


def test_ranks_follow_the_gradients_and_are_those_of_a_budget(tmp_path):
    _, _, run, outcome = begun(tmp_path, method(budget=300))
    base = run._base().eval()
    head = head_by_hand(base, LOOK["head_steps"], 16, 1e-2)
    found = gradients_by_hand(base, head, ["0.weight", "3.weight", "6.weight"], 16, LOOK["batches"])
    ladders = {"0.weight": (0, 1), "3.weight": (0,), "6.weight": (0, 1)}
    for (name, modes), spectra in zip(ladders.items(), run._starts["train"]["spectra"], strict=True):
        for mode, shares in zip(modes, spectra, strict=True):
            squares = np.square(np.linalg.svd(tensorly.unfold(found[name], mode + 1), compute_uv=False))
            expected = squares.cumsum() / squares.sum()
            np.testing.assert_allclose(shares[: len(expected)], expected, atol=1e-5)
    assert run.counts(outcome.adapted)["trainable_params"] in range(297, 301)
    assert outcome.trainer.execution["start"]["kept"] > 0


def cross_entropy(outputs, targets, label_smoothing):
    assert outputs.dtype == torch.float32
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten().long())


def factors_of_text(name, **settings):
    spec, dataset, forward = network(name)
    made = method()
    task = SimpleNamespace(forward=lambda model: forward, loss=cross_entropy)
    settings = toy_run(None, batch_size=8, **settings).settings
    run = SimpleNamespace(method=made, model=spec, task=task, settings=settings, seed=0)
    start = Start(run, dataset, 1e-2, {})
    torch.manual_seed(0)
    base = spec.build(10)
    beside = start.for_ranks(base)
    torch.manual_seed(0)
    model = made.apply(base, spec.classifier, **beside).model
    if settings.frozen_dtype == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    start.begin(model)
    assert model.training
    return {name: p.detach() for name, p in model.named_parameters() if "tucker_factors" in name and p.any()}


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(
    ("settings", "alike"),
    [({"gradient_checkpointing": True}, 1 - 1e-5), ({"dtype": "bf16", "frozen_dtype": "bf16"}, 0.9)],
    ids=["checkpointing", "bf16"],
)
def test_precision_and_checkpointing_find_the_same_subspaces(name, settings, alike):
    """A language model has no fresh head, and its start takes no steps."""
    plain, other = factors_of_text(name), factors_of_text(name, **settings)
    assert plain.keys() == other.keys()
    assert plain
    overlaps = [
        float((plain[n].T @ other[n].float()).square().sum()) / plain[n].shape[1]
        for n in plain
        if plain[n].shape[1] < plain[n].shape[0]
    ]
    assert np.mean(overlaps) > alike


def of_processes(folder, **options):
    """Factors and head of a run's start, in each process, and the size of every batch that it looked at."""
    from flora.launch import processes

    looked, loss = [], Start._loss
    processes.start(cpu=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Start, "_loss", lambda *given: looked.append(len(given[2]["labels"])) or loss(*given))
        begin, _, run, _ = begun(folder, method(budget=300, look={"batches": 4}), device="cpu", **options)
    return begin.weights, run._starts["train"], looked


@pytest.mark.dist
def test_two_processes_start_as_one(tmp_path):
    (alone, kept, looked), both = of_processes(tmp_path), together(tmp_path / "two", of_processes, tmp_path)
    assert looked == [16] * (7 + 4 + 4), "steps of the head, then batches for the ranks and for the factors"
    assert both[0][2] == both[1][2] == [16] * (7 + 2 + 2), "each its part of the batches"
    assert all(torch.equal(both[0][0][name], both[1][0][name]) for name in alone)
    for found, expected in zip(both[0][1]["head"], kept["head"], strict=True):
        torch.testing.assert_close(found, expected)
    for name, value in alone.items():
        other = both[0][0][name.replace("module.", "", 1) if name not in both[0][0] else name]
        if "tucker_factors" in name and value.any():
            torch.testing.assert_close(other @ other.T, value @ value.T, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(other, value), name


def test_only_runs_that_look_at_gradients_are_named_by_how():
    assert cell_id(composed([])) == cell_id(composed(["adapter.gradient.batches=4", "adapter.gradient.put_back=false"]))
    for looks in (["adapter.init=gradient"], ["adapter.budget=2%", "adapter.allocation=gradient"]):
        options = ["batches=4", "head_steps=0", "put_back=false"]
        ids = {cell_id(composed([*looks, f"adapter.gradient.{option}"])) for option in ["batches=16", *options]}
        assert len(ids) == 4
        assert cell_id(composed(looks)) == cell_id(composed([*looks, "adapter.gradient.batches=16"]))
        made = instantiate_method(composed([*looks, "adapter.gradient.batches=4"]).adapter)
        assert made.gradient == GradientSettings(batches=4)
    assert instantiate_method(composed([]).adapter).gradient is None
    assert idle(composed([]), ["seed=1", "adapter.gradient.batches=4"]) == ["adapter.gradient.batches=4"]
    assert idle(composed(["adapter.init=gradient"]), ["adapter.gradient.batches=4"]) == []
