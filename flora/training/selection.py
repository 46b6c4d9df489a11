"""The choice of a run's learning rates on validation, and the reported fit at the rate that is chosen."""

import copy
import gc
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flora.errors import ConfigError, TrainingDiverged
from flora.methods.base import Adapted
from flora.methods.linear_probe import LinearProbe
from flora.training.grid import Grid
from flora.training.progress import Fit
from flora.training.resume import worth
from flora.training.trainer import Trainer

if TYPE_CHECKING:
    from flora.training.run import Run

HEAD, LAST = "head lr", "train"  # labels of fits: of the head alone, and of the reported one on all data
Fitted = tuple[Adapted, Trainer]


def label(rate: float, name: str = "lr") -> str:
    """Names the fit at a rate, here and in checkpoints."""
    return f"{name} {rate:g}"


def fits(run: "Run") -> dict[str, int]:
    """The fits that a run does if no grid goes on, in their order, each with the examples that it trains on."""
    protocol, count = run.protocol, len(run.splits.train)
    heads = protocol.head_lr_grid if _own_rate_of_head(run) else None
    named = [label(lr, HEAD) for lr in Grid(heads or []).rates] + [
        label(lr) for lr in Grid(protocol.lr_grid or []).rates
    ]
    if protocol.final_train != "train":
        return dict.fromkeys(named, count) | {LAST: count + len(run.splits.validation)}
    return dict.fromkeys(named or [LAST], count)


def choose_and_train(run: "Run") -> tuple[Adapted, Trainer, float, dict[str, Any]]:
    """The reported fit of a run with ``protocol.lr_grid``, its rate, and what the record says of the choice.

    A rate whose fit diverges has lost. Where the protocol trains once more, on train and validation, that fit may
    diverge, or collapse (``collapse``), although validation chose its rate: then the best of the smaller rates is
    taken, and the record says so. Training alone decides that, never the test.

    Raises:
        TrainingDiverged: all fits of the grid diverged, or the last ones at all rates that are left.
    """
    keep = run.protocol.final_train == "train"
    head = _head(run)
    grid, kept = _tried(run, run.protocol.lr_grid or [], "lr", keep)
    rate = grid.falls[0]
    selection: dict[str, Any] = {
        "split": "validation",
        "metric": run.chosen_by,
        "values": _by_name(grid),
        "chosen": rate,
        "diverged": grid.diverged,
        "added": grid.added,
        "edge": grid.edge(rate),
        "fallen": [],
        "head": head or {"lr": rate, "chosen": True},  # the grid is over the head's rate too
        "seconds": round(run.progress.notes.setdefault("selection_seconds", run.progress.seconds), 3),
    }
    said = {name: "diverged" if value is None else value for name, value in selection["values"].items()}
    print(f"learning rate {rate:g} chosen on validation: {said}", file=sys.stderr)
    if not keep:
        fitted, rate = _last(run, grid, selection)
        return *fitted, rate, selection | {"chosen": rate, "edge": grid.edge(rate)}
    # What an earlier process did is put together again.
    return *(kept or run.fit(rate, run.splits.train, run.splits.validation, label(rate), False)), rate, selection


def collapse(last: Fit, chosen: Fit) -> str | None:
    """What says that a fit collapsed, where another at the same rate learned; None if nothing does.

    Over the last tenth of the steps its mean loss is more than halfway from the other's back to the other's mean over
    all of its steps, and more than half above it. Its mean over all steps is more than half above the other's too,
    which it is not where both learn alike and one ends a little higher, as on a few wrong labels. A network whose
    activations have left the range that frozen batch norms and bounded activations were made for does not come back,
    and its loss stays that of guessing.
    """
    ended, before = last.meters.get("closing_loss"), chosen.meters.get("closing_loss")
    own, mean = _mean_loss(last), _mean_loss(chosen)
    if ended is None or before is None or own is None or mean is None:
        return None
    if ended <= max((before + mean) / 2, 1.5 * before) or own <= 1.5 * mean:
        return None
    return f"its training loss ended at {ended:.3g}, at {before:.3g} when this rate was chosen"


def _mean_loss(fit: Fit) -> float | None:
    return next((row["train_loss"] for row in fit.state["log_history"] if "train_loss" in row), None)


def _own_rate_of_head(run: "Run") -> bool:
    return not isinstance(run.method, LinearProbe)


def _head(run: "Run") -> dict[str, Any] | None:
    """Choose the rate of the head beside an adapter if asked to, and say whether; None: it is the grid's."""
    settings, rates = run.settings, run.protocol.head_lr_grid
    if not _own_rate_of_head(run) or (settings.head_lr is None and not rates):
        return None
    if not rates:
        return {"lr": settings.head_lr, "chosen": False, "why": "protocol.head_lr_grid is null: it is trainer.head_lr"}
    if not run.model.classifier:
        raise ConfigError(f"protocol.head_lr_grid: {run.model.name} has no head here: leave it null")
    probe = copy.copy(run)  # shares what the run has done
    probe.method = LinearProbe("linear_probe")
    grid, _ = _tried(probe, rates, HEAD, False)
    rate = grid.falls[0]
    run.settings = replace(settings, head_lr=rate)
    print(f"learning rate {rate:g} of the head chosen on validation: {_by_name(grid)}", file=sys.stderr)
    facts = {"values": _by_name(grid), "diverged": grid.diverged, "added": grid.added, "edge": grid.edge(rate)}
    return {"lr": rate, "chosen": True, "by": "the head alone"} | facts


def _by_name(grid: Grid) -> dict[str, float | None]:
    return {f"{rate:g}": grid.values[rate] for rate in sorted(grid.values)}


def _tried(run: "Run", rates: list[float], name: str, keep: bool) -> tuple[Grid, Fitted | None]:
    """Train once per rate of a grid; gives what came out and, to ``keep``, the best fit where this process did it."""
    grid = Grid(rates, run.protocol.extend, partial(worth, run.chosen_by))
    done, kept = run.progress.done, None
    while (rate := grid.upcoming) is not None:
        this, fitted = label(rate, name), None
        run.show(this, len(run.splits.train))
        if this not in done:
            fitted = _attempt(run, rate, this, keep)
        elif keep and run.log is not None:
            run.log.fit(this).repeat(done[this].state["log_history"])
        grid.values[rate] = None if done[this].lost else _value(run, done[this])
        best = grid.ranking[:1]
        if best == [rate]:
            kept = fitted
        for other in grid.values:
            if [other] != best or not keep:
                done[label(other, name)].weights = None
        if not keep:
            kept = None
        del fitted
        _free()
    if not grid.ranking:
        reason = done[label(min(grid.values), name)].lost
        tried = ", ".join(f"{rate:g}" for rate in grid.values)
        raise TrainingDiverged(f"all learning rates of the grid diverged ({tried}): give smaller ones; {reason}")
    return grid, kept


def _attempt(run: "Run", rate: float, name: str, keep: bool) -> Fitted | None:
    """Train at a rate to see what it is worth; None where that diverges."""
    try:
        return run.fit(rate, run.splits.train, run.splits.validation, name, keep)
    except TrainingDiverged:
        print(f"{name}: lost, as {run.progress.done[name].lost}", file=sys.stderr)
    run.between_fits("{}")
    return None


def _value(run: "Run", fit: Fit) -> float:
    name = f"eval_{run.chosen_by}"
    history = [row[name] for row in fit.state["log_history"] if name in row]
    return max(history, key=partial(worth, run.chosen_by)) if run.protocol.select == "best" else history[-1]


def _last(run: "Run", grid: Grid, selection: dict[str, Any]) -> tuple[Fitted, float]:
    """Train on train and validation at the rate that won or, where that fails, at the best of the smaller ones."""
    both, done = run.splits.train.concat(run.splits.validation), run.progress.done
    for rate in grid.falls:
        this = f"{LAST} {label(rate)}" if selection["fallen"] else LAST
        run.show(this, len(both))
        if this not in done or not done[this].lost:
            try:
                fitted = run.fit(rate, both, None, this)
                done[this].lost = collapse(done[this], done[label(rate)])
            except TrainingDiverged:
                fitted = None
            if fitted is not None and not done[this].lost:
                return fitted, rate
            del fitted
            done[this].weights = None
            _free()
            run.between_fits("{}")
        elif run.log is not None:
            run.log.fit(this).repeat(done[this].state["log_history"])
        print(f"learning rate {rate:g} falls: {done[this].lost}", file=sys.stderr)
        selection["fallen"].append({"lr": rate, "why": done[this].lost})
    tried = ", ".join(f"{fallen['lr']:g}" for fallen in selection["fallen"])
    raise TrainingDiverged(
        f"the last fit, on train and validation, failed at each of {tried}: give protocol.lr_grid smaller rates; "
        f"{selection['fallen'][-1]['why']}"
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
