"""train.py in the process of a test, on few and small images."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import train
from flora.launch.entry import main

QUICK = ("task=digits", "trainer.max_steps=2", "trainer.max_eval_examples=16", "logger=none", "trainer.batch_size=8")
QUICK += ("model.image_size=32",)


def runner(script: Callable[..., Any], folder: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs train.py with overrides after QUICK, outputs and results in a folder: (exit code, stdout, stderr)."""

    def call(*overrides: str) -> tuple[int, str, str]:
        places = (f"paths.output={folder}/outputs", f"paths.results={folder}/results")
        keyed = {override.split("=")[0]: override for override in (*QUICK, *places, *overrides)}  # the last one wins
        if keyed["task"] == "task=glue":
            del keyed["model.image_size"]
        return script(partial(main, train.job, trace=lambda: False), "train.py", *keyed.values())

    return call


def record_of(out: str) -> dict[str, Any]:
    """The record that a run says at its end."""
    assert out.strip(), "nothing on stdout"
    last = out.strip().splitlines()[-1]
    assert last.startswith("record: ")
    return json.loads(Path(last.removeprefix("record: ")).read_text())
