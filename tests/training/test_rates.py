"""Which learning rates a run tries, which it takes, and what the record says of the choice."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from transformers import TrainerCallback

from flora.adapters.gradients import UnusableGradient
from flora.errors import ConfigError, TrainingDiverged
from flora.methods import Full, LinearProbe
from flora.tasks import ImageDataset
from flora.training import Protocol, selection
from flora.training.grid import Grid, onward
from flora.training.progress import Fit
from tests.training.test_resume import checkpointed_run, interrupted, result
from tests.training.test_run import HOLDOUT, SPLITS, VTAB, lora, toy_run
from tests.training.test_start import method as starting

BY_LOSS = {"select_by": "loss"}  # which tells close rates apart
DIVERGES = 1e6


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


def grid(*rates, protocol=HOLDOUT, **options):
    return dataclasses.replace(protocol, lr_grid=list(rates), **options)


# ---------------------------------------------------------------------- how a grid goes on


@pytest.mark.parametrize(
    ("rates", "below", "above"),
    [
        ([1e-3, 3e-3, 1e-2], [3e-4, 1e-4, 3e-5], [3e-2, 1e-1, 3e-1]),
        ([1e-3, 3e-3, 1e-2, 3e-2], [3e-4, 1e-4, 3e-5], [1e-1, 3e-1, 1.0]),
        ([1e-5, 2e-5, 5e-5, 1e-4], [5e-6, 2e-6, 1e-6], [2e-4, 5e-4, 1e-3]),
        ([1e-5, 1e-4], [1e-6, 1e-7, 1e-8], [1e-3, 1e-2, 1e-1]),
        ([2e-4, 4e-4, 8e-4], [1e-4, 5e-5, 2.5e-5], [1.6e-3, 3.2e-3, 6.4e-3]),
        ([2e-4, 5e-4, 1e-3], [8e-5, 3.2e-5, 1.28e-5], [2e-3, 4e-3, 8e-3]),  # 2.5 below, 2 above
    ],
)
def test_a_grid_goes_on_by_its_own_step(rates, below, above):
    assert [onward(rates, -steps) for steps in (1, 2, 3)] == below
    assert [onward(rates, steps) for steps in (1, 2, 3)] == above


def tried(rates, worth, extend=True):
    """All that a grid tries, where a rate is worth what a function says."""
    made = Grid(rates, extend)
    while (rate := made.upcoming) is not None:
        assert rate not in made.values
        made.values[rate] = worth(rate)
    return made


def peak(at):
    return lambda rate: -abs(math.log(rate / at))


@pytest.mark.parametrize(
    ("rates", "best", "added", "edge"),
    [
        ([1e-2, 1e-3, 3e-3, 1e-3], 3e-3, [], None),
        ([1e-2, 1e-3, 3e-3], 3e-2, [3e-2, 1e-1], None),
        ([1e-2, 1e-3, 3e-3], 10.0, [3e-2, 1e-1, 3e-1], "top"),
        ([1e-2, 1e-3, 3e-3], 3e-4, [3e-4, 1e-4], None),
        ([2e-4, 8e-4, 4e-4], 1e-9, [1e-4, 5e-5, 2.5e-5], "bottom"),
    ],
)
def test_it_goes_on_until_the_best_lies_inside_or_three_times(rates, best, added, edge):
    made = tried(rates, peak(best))
    assert list(made.values) == sorted(set(rates)) + added
    assert made.added == added
    assert made.edge(made.falls[0]) == edge
    short = tried(rates, peak(best), extend=False)
    assert short.added == []


def test_a_rate_that_diverged_bounds_a_grid():
    made = tried([1e-3, 1e-2], lambda rate: None if rate > 0.05 else rate)
    assert (made.added, made.diverged, made.edge(made.falls[0])) == ([1e-1], [1e-1], None)


def test_where_all_diverge_smaller_rates_are_tried():
    made = tried([1.0, 10.0], lambda rate: None if rate > 0.05 else rate)
    assert made.added == [0.1, 0.01, 0.001]
    assert made.falls[0] == 0.01


def test_of_equal_rates_the_smaller_one_wins_and_falls_go_down():
    made = tried([1, 2, 3, 4], {1: 0.5, 2: 0.7, 3: 0.9, 4: 0.9}.get, extend=False)
    assert made.ranking == [3, 4, 2, 1]
    assert made.falls == [3, 2, 1], "never a larger one than what has just failed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extend": True}, "protocol.extend needs protocol.lr_grid"),
        ({"extend": True, "lr_grid": [1e-3, 1e-3]}, "needs two rates in protocol.lr_grid"),
        ({"extend": True, "lr_grid": [1e-3, 1.00001e-3]}, "too close"),
        ({"head_lr_grid": [1e-3]}, "protocol.head_lr_grid needs protocol.lr_grid"),
        ({"head_lr_grid": [-1.0], "lr_grid": [1e-3]}, "protocol.head_lr_grid must be a list of positive numbers"),
        ({"head_lr_grid": [1e-3], "lr_grid": [1e-3, 1e-2], "extend": True}, "two rates in protocol.head_lr_grid"),
    ],
)
def test_a_protocol_says_what_its_grids_lack(options, message):
    with pytest.raises(ConfigError, match=message):
        Protocol("p", "last", "train", **options)


# ---------------------------------------------------------------------- a rate that diverges


def test_a_rate_that_diverges_loses(tmp_path, capsys):
    outcome = toy_run(tmp_path, Full("full"), grid(1e-3, 1e-2, DIVERGES)).train()
    alone = toy_run(tmp_path, Full("full"), grid(1e-3, 1e-2)).train()
    assert (outcome.lr, outcome.selection["diverged"]) == (1e-2, [DIVERGES])
    assert outcome.selection["values"] == alone.selection["values"] | {"1e+06": None}
    assert outcome.metrics == alone.metrics
    assert (outcome.selection["edge"], alone.selection["edge"]) == (None, "top"), "a larger rate was tried"
    assert "lr 1e+06: lost, as the " in capsys.readouterr().err


def test_where_all_rates_diverge_the_run_fails_and_names_them(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"all learning rates of the grid diverged \(1e\+06, 1e\+07\)"):
        toy_run(tmp_path, Full("full"), grid(DIVERGES, 10 * DIVERGES)).train()


class Stumble(TrainerCallback):
    """Ends fits that do not look at validation, so the last one, with divergence above a rate."""

    def __init__(self, above):
        self.above = above

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "no" and args.learning_rate > self.above:
            raise TrainingDiverged("it stumbled")


def test_a_rate_that_wins_but_diverges_in_the_last_fit_gives_way_to_the_best_smaller_one(tmp_path):
    protocol = grid(1e-4, 1e-3, 1e-2, protocol=VTAB, **BY_LOSS)
    run = toy_run(tmp_path, Full("full"), protocol)
    calm = toy_run(tmp_path, Full("full"), grid(1e-3, protocol=VTAB)).train()
    run.watching.append(Stumble(above=5e-3))
    outcome = run.train()
    assert min(outcome.selection["values"], key=outcome.selection["values"].get) == "0.01"
    assert (outcome.lr, outcome.selection["chosen"]) == (1e-3, 1e-3)
    assert outcome.selection["fallen"] == [{"lr": 1e-2, "why": "it stumbled"}]
    assert outcome.metrics == calm.metrics, "what failed leaves no trace"
    run = toy_run(tmp_path, Full("full"), protocol)
    run.watching.append(Stumble(above=0))
    with pytest.raises(TrainingDiverged, match=r"failed at each of 0.01, 0.001, 0.0001"):
        run.train()


def fit(closing, mean):
    return Fit(
        {"log_history": [{"loss": 9.0, "step": 1}, {"train_loss": mean, "step": 9}]}, {"closing_loss": closing}, None
    )


def test_a_collapse_is_an_end_far_above_that_of_the_fit_that_was_chosen():
    chosen = fit(0.02, 0.6)
    assert selection.collapse(fit(0.05, 0.6), chosen) is None
    assert selection.collapse(fit(0.3, 0.6), chosen) is None
    assert (
        selection.collapse(fit(2.3, 2.6), chosen) == "its training loss ended at 2.3, at 0.02 when this rate was chosen"
    )
    assert selection.collapse(fit(2.4, 2.3), fit(2.3, 2.3)) is None, "neither has learned"
    assert selection.collapse(fit(0.121, 0.213), fit(0.057, 0.177)) is None, "both learn wrong labels, at their pace"
    assert selection.collapse(fit(None, 2.6), chosen) is None, "an older checkpoint does not tell"


@pytest.mark.parametrize("options", [{}, {"budget": 300}], ids=["start", "ranks"])
@pytest.mark.parametrize("protocol", [HOLDOUT, VTAB])
def test_a_rate_at_which_the_start_trains_its_head_to_nothing_has_lost(tmp_path, protocol, options):
    run = toy_run(tmp_path, starting(**options), grid(1e-2, 1e30, protocol=protocol), epochs=1, head_lr=None)
    outcome = run.train()
    assert (outcome.lr, outcome.selection["diverged"]) == (1e-2, [1e30])
    assert "the head alone diverges at a rate of 1e+30" in run.progress.done["lr 1e+30"].lost
    with pytest.raises(ConfigError, match="the head alone diverges"):  # which no other rate of the grid would mend
        toy_run(tmp_path, starting(**options), grid(1e-3, 1e-2, protocol=protocol), epochs=1, head_lr=1e30).train()


def test_a_rate_at_which_the_start_has_no_gradients_has_lost(tmp_path, monkeypatch):
    def none(model, batches, loss):
        raise UnusableGradient("the gradient of it is zero")

    monkeypatch.setattr("flora.training.start.init_from_gradients", none)
    with pytest.raises(TrainingDiverged, match=r"all .* diverged .*: give smaller ones; the gradient of it is zero"):
        toy_run(tmp_path, starting(), grid(1e-3, 1e-2), epochs=1, head_lr=None).train()


def test_a_rate_whose_last_fit_collapses_falls(tmp_path, monkeypatch, capsys):
    protocol = grid(1e-4, 1e-2, protocol=VTAB)

    def collapse(last, chosen):
        assert 0 < chosen.meters["closing_loss"] < 2
        return "it fell" if chosen.meters["closing_loss"] == losses["0.01"] else None

    losses = {}
    for rate in (1e-4, 1e-2):
        alone = toy_run(tmp_path, Full("full"), grid(rate))
        alone.train()
        losses[f"{rate:g}"] = alone.progress.done[f"lr {rate:g}"].meters["closing_loss"]
    monkeypatch.setattr(selection, "collapse", collapse)
    outcome = toy_run(tmp_path, Full("full"), protocol).train()
    assert (outcome.lr, outcome.selection["fallen"]) == (1e-4, [{"lr": 1e-2, "why": "it fell"}])
    assert "learning rate 0.01 falls: it fell" in capsys.readouterr().err


@pytest.mark.parametrize("log_every", [1, 5, 1000])
def test_the_closing_loss_is_the_mean_of_the_last_steps_however_often_losses_are_logged(tmp_path, log_every):
    logged = toy_run(tmp_path, Full("full"), epochs=4, log_every=1).train().trainer  # 24 steps
    losses = [row["loss"] for row in logged.state.log_history if "loss" in row]
    trainer = toy_run(tmp_path, Full("full"), epochs=4, log_every=log_every).train().trainer
    assert trainer.closing_loss == pytest.approx(sum(losses[-2:]) / 2, rel=1e-3)


# ---------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("protocol", [HOLDOUT, VTAB])
def test_a_rate_that_is_lost_stays_lost_when_a_run_goes_on(tmp_path, monkeypatch, capsys, protocol):
    protocol = grid(DIVERGES, 10 * DIVERGES, protocol=protocol, extend=True)  # smaller ones follow, which diverge too
    monkeypatch.setattr("flora.training.grid.onward", lambda rates, steps: 10.0**-2 * 10.0**steps)
    start = partial(checkpointed_run, protocol=protocol, epochs=2)
    calm = result(start(tmp_path / "calm").train())
    assert calm[2]["diverged"] == [DIVERGES, 10 * DIVERGES]
    first = start(tmp_path / "killed")
    interrupted(first, monkeypatch, 30)
    assert [name for name, fit in first.progress.done.items() if fit.lost] == ["lr 1e+06", "lr 1e+07"]
    capsys.readouterr()
    last = start(tmp_path / "killed")
    assert result(last.train()) == calm
    assert ": lost, as" not in capsys.readouterr().err
    assert all(done.weights is None for done in last.progress.done.values() if done.lost)


def test_a_rate_that_fell_stays_fallen_when_a_run_goes_on(tmp_path, monkeypatch, capsys):
    falls = iter(["it fell", None])
    monkeypatch.setattr(selection, "collapse", lambda last, chosen: next(falls))

    def start(name):
        run = checkpointed_run(tmp_path / name, protocol=grid(1e-4, 1e-3, 1e-2, protocol=VTAB, **BY_LOSS), epochs=1)
        run.watching.append(Stumble(above=5e-3))
        return run

    calm = result(start("calm").train())
    assert [fallen["why"] for fallen in calm[2]["fallen"]] == ["it stumbled", "it fell"]
    falls = iter(["it fell"])
    interrupted(start("killed"), monkeypatch, 3 * 6 + 8 + 4)  # within the fit at the smallest rate, of 8 steps
    falls = iter([None])
    capsys.readouterr()
    assert result(start("killed").train()) == calm
    said = capsys.readouterr().err
    assert "train lr 0.0001: going on from checkpoint" in said
    assert "train lr 0.001: step" not in said


# ---------------------------------------------------------------------- at the edges


def test_a_run_goes_on_where_the_best_rate_is_the_largest(tmp_path):
    outcome = toy_run(tmp_path, Full("full"), grid(1e-6, 1e-5, extend=True, **BY_LOSS)).train()
    assert outcome.selection["added"] == [1e-4, 1e-3, 1e-2]
    assert (outcome.lr, outcome.selection["edge"]) == (1e-2, "top"), "three times, and still at the edge"
    whole = toy_run(tmp_path, Full("full"), grid(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, **BY_LOSS)).train()
    assert whole.selection["values"] == outcome.selection["values"]
    assert whole.metrics == outcome.metrics


def test_a_run_goes_on_where_the_best_rate_is_the_smallest(tmp_path):
    run = toy_run(tmp_path, Full("full"), grid(1e-2, 1e-1, extend=True, **BY_LOSS))
    wrong = (SPLITS.validation.labels + 1) % 3  # the more is learned, the greater the loss on validation
    run.splits = dataclasses.replace(SPLITS, validation=ImageDataset(SPLITS.validation.images, wrong))
    outcome = run.train()
    added = outcome.selection["added"]
    assert added
    assert added == [1e-3, 1e-4, 1e-5][: len(added)]
    assert outcome.lr <= 1e-3, "hardly anything is learned there"


def test_rates_that_score_the_same_are_no_reason_to_go_on(tmp_path):
    outcome = toy_run(tmp_path, Full("full"), grid(1e-7, 1e-6, extend=True)).train()
    assert len(set(outcome.selection["values"].values())) == 1
    assert outcome.selection["added"] == []


# ---------------------------------------------------------------------- the head's rate


def test_the_rate_of_the_head_is_chosen_as_the_probe_chooses_it(tmp_path):
    heads = [1e-4, 1e-2]
    outcome = toy_run(tmp_path, lora(), grid(1e-3, head_lr_grid=heads), head_lr=7e-3).train()
    probe = toy_run(tmp_path, LinearProbe("linear_probe"), grid(*heads)).train()
    head = outcome.selection["head"]
    assert head["values"] == probe.selection["values"]
    assert (head["chosen"], head["lr"]) == (True, probe.lr)
    assert {group["initial_lr"] for group in outcome.trainer.optimizer.param_groups} == {1e-3, probe.lr}
    fixed = toy_run(tmp_path, lora(), grid(1e-3), head_lr=probe.lr).train()
    assert outcome.metrics == fixed.metrics
    state = fixed.adapted.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in outcome.adapted.model.state_dict().items())


def test_the_record_says_why_the_rate_of_the_head_was_not_chosen(tmp_path):
    head = toy_run(tmp_path, lora(), grid(1e-3), head_lr=7e-3).train().selection["head"]
    assert (head["lr"], head["chosen"]) == (7e-3, False)
    assert "protocol.head_lr_grid is null" in head["why"]
    for method, given in ((LinearProbe("linear_probe"), 7e-3), (lora(), None)):  # the grid is over the head's rate
        assert toy_run(tmp_path, method, grid(1e-3), head_lr=given).train().selection["head"] == {
            "lr": 1e-3,
            "chosen": True,
        }
