"""What a run shows while it trains: steps done of all, examples a second, and the time left, over all of its fits."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

FIRST_STEPS, FIRST_SECONDS = 5, 2.0  # after so many steps and so long, the time that the run will take is told
EVERY_SECONDS = 30.0  # between two plain lines, at most
EVALUATED = 1 / 3  # what an example costs that is only looked at: one of three passes


class Display:
    """A bar on a terminal, else plain lines on stderr; a context manager around all fits of a run.

    Args:
        fits: labels in the order in which they are trained, each with the examples it trains on.
        same_steps: whether all take as many steps, however many examples they train on.
        batch: examples per step.
        validation, test: examples that are looked at in each evaluation and in the test.
    """

    def __init__(self, fits: Mapping[str, int], same_steps: bool, batch: int, validation: int, test: int) -> None:
        self.fits = dict.fromkeys(fits, 1) if same_steps else dict(fits)
        self.same_steps, self.said = same_steps, ""
        self.batch, self.validation, self.test = batch, validation, test
        self.console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self.bar = Progress(
            *columns, console=self.console, disable=not self.console.is_terminal, transient=True, redirect_stdout=False
        )
        self.task = self.bar.add_task("", total=None, said="")
        self.clock = _Clock()
        self._told, self._line = False, time.monotonic()

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def fit(self, label: str) -> TrainerCallback:
        """What a fit tells as it goes; ``label`` is one of ``fits``."""
        return _Fit(self, label)

    def next(self, label: str, examples: int) -> None:
        """Say which fit comes next, or was done by an earlier process; an unknown one is put in here."""
        if label not in self.fits:
            names = list(self.fits)
            after = names.index(self.said) + 1 if self.said else 0
            sizes = self.fits | {label: 1 if self.same_steps else examples}
            self.fits = {name: sizes[name] for name in [*names[:after], label, *names[after:]]}
        self.said = label

    def begin(self, label: str, args: Any, state: Any) -> None:
        """A fit begins, or goes on; those before it are done."""
        names, size = list(self.fits), self.fits[label]
        share = {name: other / size for name, other in self.fits.items()}
        before = sum(share[name] for name in names[: names.index(label)])
        evaluations = 0 if args.eval_strategy == "no" else state.max_steps / _steps_between(args, state)
        self.first = state.global_step  # above 0 where an earlier process has begun it
        self.label, self.steps, self.before = label, state.max_steps, round(before * state.max_steps)
        self.total = round(sum(share.values()) * state.max_steps)
        self.each = self.batch + EVALUATED * self.validation * evaluations / max(state.max_steps, 1)
        self.clock.restart()
        self.bar.update(self.task, description=label, total=self.total, completed=self.before + state.global_step)

    def step(self, done: int, figures: dict[str, float]) -> None:
        """A step of the fit has been done."""
        self.clock.tick()
        self.bar.update(self.task, completed=self.before + done, said=self._said(done, figures))
        clock = self.clock
        if not self._told and clock.steps >= FIRST_STEPS and clock.seconds >= FIRST_SECONDS:
            self._told = True
            self.console.print(f"about {duration(self.left(self.first))} on this machine")
        if time.monotonic() - self._line > EVERY_SECONDS and clock.steps:
            self.line(done, figures)

    def line(self, done: int, figures: dict[str, float]) -> None:
        """A plain line, where no terminal shows a bar."""
        self._line = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"{self.label}: step {done}/{self.steps} {self._said(done, figures)}".rstrip())

    def left(self, done: int) -> float:
        """Seconds that all will take after so many steps of the fit, as its steps have taken."""
        examples = (self.total - self.before - done) * self.each + EVALUATED * self.test
        return examples / self.batch * self.clock.seconds_a_step

    def _said(self, done: int, figures: dict[str, float]) -> str:
        said = [f"{name} {value:.4g}" for name, value in figures.items()]
        if self.clock.steps:
            what = "for the test" if self.before + done >= self.total else "left"
            said += [f"{self.batch / self.clock.seconds_a_step:.0f} examples/s", f"{duration(self.left(done))} {what}"]
        return " ".join(said)


class _Clock:
    """How long a step takes: the first one of a fit, which also sets things up, and evaluations left out."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._last: float | None = None

    def restart(self) -> None:
        self._last = None

    def tick(self) -> None:
        now = time.monotonic()
        if self._last is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self._last
        self._last = now

    @property
    def seconds_a_step(self) -> float:
        return self.seconds / max(self.steps, 1)


class _Fit(TrainerCallback):
    def __init__(self, display: Display, label: str) -> None:
        self.display, self.label = display, label
        self.figures: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.display.begin(self.label, args, state)

    def on_step_end(self, args, state, control, **kwargs):
        self.display.step(state.global_step, self.figures)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.figures["loss"] = logs["loss"]

    def on_epoch_end(self, args, state, control, **kwargs):
        """A line, unless an evaluation follows that has more to say."""
        if args.eval_strategy == "no":
            self.display.line(state.global_step, self.figures)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        name = f"eval_{args.metric_for_best_model}"
        if metrics and name in metrics:
            self.figures[f"validation {args.metric_for_best_model}"] = metrics[name]
            self.display.line(state.global_step, self.figures)
        self.display.clock.restart()


def _steps_between(args: Any, state: Any) -> float:
    if args.eval_strategy == "steps":
        return state.eval_steps or args.eval_steps
    return state.max_steps / max(args.num_train_epochs, 1)


def duration(seconds: float) -> str:
    """A time in words, to two units: ``4 min 30 s``."""
    whole = max(round(seconds), 1)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
