"""What a machine cannot hold is said before it is allocated, with how much it would be."""

import re
import resource
import sys

import pytest

import train
from flora import memory
from flora.config import composed
from flora.errors import ConfigError
from flora.launch.entry import main
from tests.launch.test_sweep import TINY

SLIM = "+model.architecture={channels:[16,16,32,32]}"
TOKENS = ("model.timm_name=vit_tiny_patch16_224", "adapter=vpt")


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["model.image_size=100000"], "images of 100000 x 100000 pixels .* lower model.image_size"),
        (["model.image_size=4000"], r"images of 4000 x 4000 pixels .* lower model.image_size"),
        (["model.image_size=1000000000000000"], "lower model.image_size"),
        (["model.image_size=224", "trainer.batch_size=1000"], "a batch of 1000 images .* lower model.image_size or"),
        (
            ["model.image_size=320", "trainer.eval_batch_size=10000", "trainer.max_eval_examples=null"],
            r"a batch of 360 .*trainer\.eval_batch_size",
        ),
        (["trainer.num_workers=100000"], "trainer.num_workers=100000 would take at least 19,531 GB"),
        (["adapter=lora", "adapter.r=100000000"], "parameters to train .* lower the adapter's ranks"),
        (["adapter=flora", "adapter.r=1000000", "adapter.clip_ranks=none"], "parameters to train .* lower"),
        (["adapter=lora", f"adapter.r=1{'0' * 25}"], "^error: adapter: "),
        ([*TOKENS, "adapter.num_tokens=1000000000", "model.image_size=32"], "parameters to train .* lower"),
        ([*TOKENS, "model.image_size=400000"], "images of 400000 x 400000 pixels"),
        (["+model.architecture={channels:[10000,20000,40000,80000]}"], "network resnet10t .* a smaller model"),
    ],
)
def test_a_setting_that_asks_for_too_much_is_refused_first(overrides, remedy, sandbox, monkeypatch, capsys):
    monkeypatch.setattr(memory, "total", lambda: 512 << 20)
    command = {o.split("=")[0]: o for o in (*TINY, "trainer.device=cpu", *overrides)}
    monkeypatch.setattr(sys, "argv", ["train.py", *command.values()])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SystemExit) as end:
        main(train.job, trace=lambda: False)
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert re.search(remedy, said), said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10, "in KB: nothing large was made"
    assert not list((sandbox / "work").rglob("*.json"))


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            ["trainer.batch_size=5000", "model.image_size=32"],
            r"warning: trainer.batch_size=5000 is more than the \d+ examples that there are",
        ),
        (
            ["adapter=lora", "adapter.r=64", "model.image_size=32", SLIM],
            r"warning: lora: in \d+ layers \(first .*\) the adapter has",
        ),
        (
            ["adapter=flora", "adapter.r=500", "adapter.kernel_rank=7", SLIM],
            r"warning: flora: in \d+ layers \(first .*\) the adapter has",
        ),
    ],
)
def test_sizes_that_cannot_be_meant_are_a_warning(overrides, warning, sandbox, monkeypatch, capsys):
    command = {o.split("=")[0]: o for o in (*TINY, "trainer.device=cpu", *overrides)}
    monkeypatch.setattr(sys, "argv", ["train.py", *command.values()])
    main(train.job, trace=lambda: False)
    said = capsys.readouterr().err
    assert len(re.findall(r"^warning: ", said, re.MULTILINE)) == len(re.findall(warning, said)) == 1, said


@pytest.mark.parametrize("allocation", ["null", "gradient"])
@pytest.mark.parametrize(
    ("budget", "said"), [("10", "below the smallest adapter"), ("1G", "above the largest adapter")]
)
def test_a_budget_out_of_reach_is_refused_before_a_start_is_looked_for(budget, said, allocation, sandbox, capsys):
    own = ["adapter=flora_gradient", f"adapter.allocation={allocation}", f"adapter.budget={budget}"]
    command = {o.split("=")[0]: o for o in (*TINY, "trainer.device=cpu", *own)}
    with pytest.raises(ConfigError, match=rf"^adapter: adapter\.budget={budget}, .* is {said}, .* choose \d+$"):
        train.run(composed(list(command.values())))
    assert "start: " not in capsys.readouterr().err
