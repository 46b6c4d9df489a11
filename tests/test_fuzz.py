"""Hostile configs, by seed: one that is wrong ends in one line or in a right record, never in between."""

import copy
import importlib
import json
import math
import os
import random
import shutil
import signal

import pytest
import torch
from omegaconf import OmegaConf

import train
from flora.config import composed, semantic_config
from flora.launch.entry import main

FAST, ALL = range(25), range(500)
SECONDS = 4  # then the run was a sound one, only long
QUICK = (
    *("task=digits", "logger=none", "trainer.device=cpu", "trainer.max_steps=1", "trainer.max_eval_examples=8"),
    *("trainer.batch_size=4", "trainer.epochs=1", "model.image_size=32"),
)
BASES = [("adapter=linear_probe",), ("adapter=lora", "adapter.r=2"), ("adapter=flora", "adapter.r=2"), ("logger=csv",)]
ENDS = (0, 1, 2, 3, 130)  # what train.py may exit with; 130: interrupted after SECONDS


class TooLong(KeyboardInterrupt):
    """The time of one case is over."""


def wrong_values(sandbox):
    """What to put where something else belongs. Absolute paths stay in the sandbox, where they are seen."""
    return [
        *(None, True, False, 0, -1, 10**9, 10**30, -(10**18), 1e308, -0.5, 0.3, math.inf, math.nan, "", " ", "nan"),
        *(
            [],
            {},
            [1],
            [None],
            ["a", 2],
            {"a": 1},
            {"pattern": "("},
            [{"pattern": "("}],
            [{"pattern": ".*", "rank": -1}],
        ),
        *(
            "auto",
            "all",
            "1e-3",
            "ünï→😀",
            "\u202eevil",
            "a\nb",
            "nul\0byte",
            "x" * 5000,
            "(",
            "[",
            ".*",
            "${oc.env:NO}",
        ),
        *("../../escape", "../escape", f"{sandbox}/escape", f"{sandbox}/work/../escape", "~/escape", ".", "/", "."),
        *(
            "/dev/null",
            "/proc/self/mem",
            "/dev/full",
            "file:///etc/passwd",
            "CON",
            "-rf",
            "%s%n",
            "{0}",
            "$(touch escape)",
        ),
        *({"_target_": "os.system", "_args_": ["touch escape"]}, [{"_target_": "flora.config.hydra.utils.get_method"}]),
        *(
            "flora.results.record.os.system",
            "os.system",
            "flora.training.Csv",
            "flora.tasks.Vtab",
            "flora.models.TimmModel",
        ),
    ]


def places(node, at=()):
    """Every key of a config, as the keys that lead to it."""
    keys = []
    for key, value in node.items():
        keys += [(*at, key)] + (places(value, (*at, key)) if isinstance(value, dict) else [])
    return keys


def mutated(config, chance, sandbox):
    """A config with one to three changes: a value, a missing key, an unknown key; and what they are, in words."""
    config, said = copy.deepcopy(config), []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        spots = [spot for spot in places(config) if spot[0] not in ("hydra", "debug", "launcher")]
        *outer, key = chance.choice(spots)
        if key in ("num_workers",):
            continue  # as many processes as asked for
        node = config
        for name in outer:
            node = node[name]
        how = chance.choice(("change", "change", "change", "change", "drop", "add"))
        value = copy.deepcopy(chance.choice(wrong_values(sandbox)))
        if how == "drop":
            del node[key]
        elif how == "add":
            node[f"{key}_" if chance.random() < 0.8 else "_target_"] = value
        else:
            node[key] = value
        said.append(f"{how} {'.'.join(map(str, (*outer, key)))} {value!r:.60}")
    return config, "; ".join(said)


def snapshot(folder):
    """What lies where, with sizes and times."""
    return {
        os.path.join(place, name): os.lstat(os.path.join(place, name)).st_mtime_ns
        for place, folders, files in os.walk(folder)
        for name in files
    }


def outcome(config):
    """Exit code and record path of a run as ``train.py`` would end it; whatever else it raises is a traceback."""
    path = []

    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        main(lambda: path.append(train.run(config)), trace=lambda: False)
        return 0, path[0]
    except SystemExit as end:
        return end.code, None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def config_complaint(seed, sandbox, capsys):
    """What is wrong with how a mutated config ended, or None; and its exit code. Seed None changes nothing."""
    chance = random.Random(seed)
    base = OmegaConf.to_container(composed((*QUICK, *chance.choice(BASES))))
    base.pop("hydra", None)
    config, said = (base, "unchanged") if seed is None else mutated(base, chance, sandbox)
    cfg = OmegaConf.create(config)
    # Else a run of another seed stands for this one.
    shutil.rmtree(sandbox / "work" / "outputs" / "records", ignore_errors=True)
    before = snapshot(sandbox)
    capsys.readouterr()
    try:
        code, path = outcome(cfg)
    except BaseException as error:
        return f"seed {seed} ({said}): {type(error).__name__}: {error!s:.200}", None
    err = capsys.readouterr().err
    mine = [os.path.realpath(str(cfg.paths[key])) for key in ("output", "results")] if path or code in (3, 130) else []
    mine += [str(sandbox / name) for name in ("work/outputs", "work/results", "cache")]
    strays = [name for name, time in snapshot(sandbox).items() if before.get(name) != time]
    strays = [name for name in strays if not any(os.path.realpath(name).startswith(f"{place}/") for place in mine)]
    if strays:
        return f"seed {seed} ({said}): wrote {strays[:3]}", code
    if code not in ENDS:
        return f"seed {seed} ({said}): exit {code}", code
    if code == 2 and ("Traceback" in err or not err.strip().splitlines()[-1].startswith("error: ")):
        return f"seed {seed} ({said}): said {err[-200:]!r}", code
    if code == 0:
        record = json.loads(path.read_text())
        inputs = record["config"]["inputs"]
        right = {
            "status": record["status"] == "finished",
            "value": record["value"] == record["metrics"][record["metric"]] and 0 <= record["value"] <= 1,
            "config": record["config"] == json.loads(json.dumps(semantic_config(cfg) | {"inputs": inputs})),
            "name": path.stem == record["run_id"],
            "facts": record["seed"] == cfg.seed and record["dataset"] == "digits",
        }
        if not all(right.values()):
            return f"seed {seed} ({said}): a record with a wrong {[k for k, v in right.items() if not v]}", code
    return None, code


def check_configs(seeds, sandbox, capsys):
    for name in ("flora.models.presets", "flora.tasks.images.digits", "flora.training.run"):
        importlib.import_module(name)  # which takes longer than a run may here
    ends = []
    complaints = []
    for seed in (None, *seeds):
        torch.manual_seed(0)
        complaint, code = config_complaint(seed, sandbox, capsys)
        complaints += [complaint] if complaint else []
        ends.append(code)
    assert complaints == []
    assert ends[0] == 0
    assert ends.count(2) > len(ends) / 4, "mutations are meant to be noticed"
    return ends


def test_mutated_configs_end_in_one_line_or_a_right_record(sandbox, capsys):
    check_configs(FAST, sandbox, capsys)


@pytest.mark.slow
def test_500_mutated_configs_end_in_one_line_or_a_right_record(sandbox, capsys):
    ends = check_configs(ALL, sandbox, capsys)
    assert ends[1:].count(0) > 0, "some mutations are harmless"
