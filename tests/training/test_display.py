"""What a run shows while it trains: lines that say how far it is, and how long it will take, over all of its fits."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from flora.training import display
from flora.training.display import Display, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def train(shown, clock, label, steps, each, args=None, evaluate=()):
    """A fit whose steps take ``each`` seconds, an evaluation 100."""
    args = args or SimpleNamespace(eval_strategy="no", num_train_epochs=1, metric_for_best_model="accuracy")
    state = SimpleNamespace(max_steps=steps, global_step=0)
    callback = shown.fit(label)
    callback.on_train_begin(args, state, None)
    for step in range(1, steps + 1):
        clock.seconds += each
        state.global_step = step
        callback.on_step_end(args, state, None)
        if step in evaluate:
            clock.seconds += 100
            callback.on_evaluate(args, state, None, {"eval_accuracy": 0.5})


def test_the_time_of_all_rates_is_told_once_after_the_first_steps(clock, capsys):
    with Display({"lr 0.001": 160, "lr 0.01": 160, "train": 200}, False, 16, 40, 0) as shown:
        train(shown, clock, "lr 0.001", 10, 1.0)
        first = capsys.readouterr().err
        train(shown, clock, "lr 0.01", 10, 1.0)
    assert first.count("on this machine") == 1
    assert "about 32 s on this machine" in first  # 10 + 10 + 12.5 steps of a second each
    assert "on this machine" not in capsys.readouterr().err


def test_without_a_terminal_a_line_comes_now_and_then_with_what_is_left(clock, capsys):
    with Display({"train": 1600}, True, 16, 0, 0) as shown:
        train(shown, clock, "train", 100, 2.0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "step" in line]
    assert 5 <= len(lines) <= 8  # 200 seconds
    assert lines[-1].startswith("train: step ")
    assert "8 examples/s" in lines[-1]
    assert lines[-1].endswith("s left")


def test_after_the_last_step_what_is_left_is_the_test(clock, capsys):
    with Display({"train": 160}, True, 16, 0, 480) as shown:
        train(shown, clock, "train", 10, 1.0)
        shown.line(10, {})
    assert capsys.readouterr().err.splitlines()[-1] == "train: step 10/10 16 examples/s 10 s for the test"


def test_an_evaluation_is_a_line_and_takes_no_time_of_the_steps(clock, capsys):
    args = SimpleNamespace(eval_strategy="epoch", num_train_epochs=2, metric_for_best_model="accuracy")
    with Display({"train": 160}, False, 16, 48, 0) as shown:
        train(shown, clock, "train", 20, 1.0, args, evaluate=(10, 20))
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation accuracy 0.5" in line]
    assert [line.split()[2] for line in lines] == ["10/20", "20/20"]
    assert all("16 examples/s" in line for line in lines)


def test_a_terminal_sees_a_bar(clock):
    shown = Display({"train": 160}, False, 16, 0, 0)
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    shown.console = screen
    train(shown, clock, "train", 7, 1.0)
    screen.print(shown.bar.get_renderable())
    assert "7/7" in screen.file.getvalue()
    assert "16 examples/s" in screen.file.getvalue()
    assert "train: step" not in screen.file.getvalue(), "no lines beside it"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (59.4, "59 s"), (270, "4 min 30 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_a_time_in_words(seconds, words):
    assert duration(seconds) == words
