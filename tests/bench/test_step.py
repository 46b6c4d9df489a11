"""bench_step.py on small networks: what each method trains and runs, and what the results say."""

import copy
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flora.models
from flora.adapters.layer import FloraLayer
from flora.bench import networks
from flora.bench.dense import DenseLayer, make_dense
from flora.bench.methods import METHODS, Methods, Ranks
from flora.bench.networks import network
from flora.bench.report import Measuring
from flora.bench.timing import Captured, Step, TimingSettings, measure, spread
from scripts.bench_step import bench_step, rows
from tests.tasks.chats import tiny_llava

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
QUICK = ("--batch", 2, "--size", 32, "--device", "cpu", "--rounds", 1, "--steps", 2, "--warmup", 0, "--r", 4)


def prepared(method, name="test_convnext", layers="common", dtype=torch.float32, **ranks):
    """A prepared model, its network and a batch."""
    net = network(name, batch=2, size=32, dtype=dtype)
    made = Methods(net, Ranks(**({"r": 4} | ranks)), layers).prepare(method, net.build(CPU))
    return made, net, net.inputs(CPU)


def test_every_method_leaves_a_row_and_one_that_cannot_run_says_why(run, tmp_path):
    file = tmp_path / "deep" / "step.json"
    code, out, said = run(
        bench_step, "--model", "test_convnext", *QUICK, "--methods", ",".join(METHODS), "--json", file, "--layers=all"
    )
    assert code == 0
    assert said.startswith("test_convnext, batch 2, fp32, on cpu: ")
    assert "on a CPU a step of a large network takes minutes" in said
    result = json.loads(file.read_text())
    assert {"device", "torch", "command", "commit", "versions", "model", "batch", "dtype"} < result.keys()
    assert (result["captured"], result["channels_last"], result["size"]) == (False, False, 32)
    assert str(tmp_path) not in result["command"]
    assert "--batch 2" in result["command"]
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(METHODS)
    assert "channels" in rows.pop("dense")["error"]  # depthwise convolutions
    for name, row in rows.items():
        assert row["ms"] > 0, name
        assert row["ms_spread"] >= 0
        assert row["ratio"] == pytest.approx(row["ms"] / rows["floor"]["ms"], rel=1e-2)
        assert row["peak_bytes"] is None  # a GPU's allocator counts, a CPU's does not
        assert name in out
    model = network("test_convnext", size=32).build(CPU)
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "head.fc" not in n]
    adapted_by_lora = [m for m in layers if getattr(m, "groups", 1) == 1]
    by_hand = sum(4 * (m.weight[0].numel() + m.weight.shape[0]) for m in adapted_by_lora)
    assert rows["lora"]["trainable_params"] == by_hand
    assert rows["lora"]["layers"] == len(adapted_by_lora) < len(layers) == rows["flora"]["layers"]
    assert rows["full"]["trainable_params"] == sum(p.numel() for p in model.parameters())
    assert rows["floor"]["trainable_params"] == 0


def test_common_layers_are_those_of_lora_and_then_the_published_layer_runs_too(run, tmp_path):
    file = tmp_path / "step.json"
    methods = ("--methods", "lora,flora,dense", "--layers", "common", "--match")
    code, _, _ = run(bench_step, "--model", "test_convnext", *QUICK, *methods, "--json", file)
    lora, flora, dense = json.loads(file.read_text())["rows"]
    assert code == 0
    assert lora["layers"] == flora["layers"] == dense["layers"] > 0
    assert 0.99 * lora["trainable_params"] <= flora["trainable_params"] <= lora["trainable_params"]
    assert dense["trainable_params"] == flora["trainable_params"]
    assert "error" not in dense
    assert dense["ratio"] is None  # no floor was measured


@pytest.mark.parametrize("form", ["flora", "flora_factored", "flora_merged"])
def test_the_published_layer_gives_floras_output_and_gradients(form):
    ours, _, inputs = prepared(form)
    ours.model.double().eval()
    dense = copy.deepcopy(ours.model)
    make_dense(dense)
    images = inputs["images"].double()
    expected = ours.model(images)
    output = dense(images)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, FloraLayer) for m in dense.modules())
    layers = {n: m for n, m in ours.model.named_modules() if isinstance(m, FloraLayer)}
    assert len(layers) == sum(isinstance(m, DenseLayer) for m in dense.modules()) > 3
    output.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in layers.items():
        core = dense.get_submodule(name).core
        assert core.abs().min() > 0, "an update of zero would compare nothing"
        torch.testing.assert_close(core.grad, layer.core("default").grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["floor", "floor_cast"])
def test_the_floor_carries_gradients_through_every_activation_and_into_no_weight(method):
    made, net, inputs = prepared(method, "resnet18", dtype=torch.bfloat16)
    reached = []
    for module in made.model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_full_backward_hook(lambda m, grads, _: reached.append(bool(grads[0].any())))
    Step(net, made, inputs)()
    assert inputs["images"].grad.abs().max() > 0
    assert reached == 21 * [True]  # ResNet-18: 20 convolutions and the classifier
    assert all(p.grad is None for p in made.model.parameters())
    cast = torch.bfloat16 if method == "floor_cast" else torch.float32
    assert {m.weight.dtype for m in made.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {cast}
    norms = [m for m in made.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.weight.dtype, m.training) for m in norms} == {(torch.float32, False)}  # frozen as the trainer freezes


@pytest.fixture
def small(monkeypatch):
    """Two transformers networks in sizes for a test."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    monkeypatch.setitem(networks.TRANSFORMERS, "llama", ("llama_7b", sizes | {"num_key_value_heads": 4}))
    monkeypatch.setitem(networks.TRANSFORMERS, "deberta", ("deberta_v3_base", sizes | {"pooler_hidden_size": 32}))


# DeBERTa projects its positions with the queries' and the keys' layers, too.
@pytest.mark.parametrize(("name", "layers", "calls"), [("llama", 2 * 5, 2 * 5), ("deberta", 2 * 6, 2 * 8)])
def test_text_networks_start_their_gradients_at_the_embeddings(name, layers, calls, small):
    net = network(name, batch=2, tokens=8, dtype=torch.bfloat16)
    methods = Methods(net, Ranks(r=4))
    torch.manual_seed(0)
    base = net.build(CPU)
    held = torch.bfloat16 if name == "llama" else torch.float32
    assert {p.dtype for p in base.parameters()} == {held}
    inputs = net.inputs(CPU)
    floor = methods.prepare("floor", copy.deepcopy(base))
    seen = []
    watched = [floor.model.get_input_embeddings(), *map(floor.model.get_submodule, methods._adapted)]
    hooks = [m.register_forward_hook(lambda m, i, o: o.retain_grad() or seen.append(o)) for m in watched]
    Step(net, floor, inputs)()
    for hook in hooks:
        hook.remove()
    assert len(seen) == 1 + calls
    assert all(output.grad.abs().sum() > 0 for output in seen)
    assert not any(p.requires_grad for p in floor.model.parameters())
    for method in ("lora", "flora"):
        made = methods.prepare(method, copy.deepcopy(base))
        assert made.layers == layers
        Step(net, made, inputs)()
        trained = [p for n, p in made.model.named_parameters() if "lora_" in n or "tucker_" in n]
        assert all(p.grad.abs().sum() > 0 for p in trained), method
        assert len(trained) >= 2 * layers


def test_every_round_runs_every_method_in_an_order_of_its_own_and_an_error_ends_one_method_only():
    net = network("test_convnext", batch=1, size=32)
    methods = Methods(net, Ranks(r=2))
    lines = []
    names = ["floor", "floor_cast", "full", "dense"]
    results = measure(methods, names, TimingSettings(rounds=4, steps=2, warmup=0), CPU, lines.append)
    orders = [[line.split()[4] for line in lines if line.startswith(f"round {n} ")] for n in (1, 2, 3, 4)]
    assert sorted(orders[0]) == sorted(names)
    assert all(sorted(order) == sorted(names[:3]) for order in orders[1:])
    assert len({tuple(order) for order in orders[1:]}) > 1
    assert [len(steps) for steps in results["floor"].rounds] == [2, 2, 2, 2]
    assert results["dense"].error is not None
    assert results["dense"].rounds == []


def stop_at(place):
    """Tells this process to end, as `timeout` does, once a line begins so."""
    return lambda line: os.kill(os.getpid(), signal.SIGTERM) if line.startswith(place) else None


def test_one_that_is_stopped_tells_what_it_measured(capsys):
    methods, names = Methods(network("test_convnext", batch=1, size=32), Ranks(r=2)), ["floor", "full", "dense"]
    settings, measuring = TimingSettings(rounds=4, steps=2, warmup=0), Measuring()
    results = measure(methods, names, settings, CPU, stop_at("round 2"), measuring)
    assert measuring.facts() == {"stopped": True}
    assert "stopped: this is what was measured before" in capsys.readouterr().err
    assert {len(results[name].rounds) for name in ("floor", "full")} <= {1, 2}
    assert all(row["ms"] > 0 for row in rows([results])[:2])
    with pytest.raises(SystemExit) as ended:
        measuring.end()
    assert ended.value.code == 130
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_was_not_measured_before_it_was_stopped_is_named():
    methods = Methods(network("test_convnext", batch=1, size=32), Ranks(r=2))
    measuring = Measuring()
    results = measure(
        methods, ["floor", "full"], TimingSettings(rounds=2, steps=1, warmup=0), CPU, stop_at("round 1"), measuring
    )
    (left,) = [measured for measured in results.values() if not measured.rounds]
    assert left.error == "stopped before it was measured"


def test_an_error_and_another_signal_go_on_as_they_would():
    with pytest.raises(ZeroDivisionError), Measuring() as measuring:
        raise ZeroDivisionError
    assert not measuring.stopped
    assert measuring.facts() == {}
    measuring.end()


def test_the_spread_is_the_interquartile_range():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert spread(values) == pytest.approx(np.subtract(*np.percentile(values, [75, 25])))
    assert spread([2.0]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model nosuch", "nosuch"),
        ("--model resnet18 --methods floor,magic", "--methods"),
        ("--model resnet18 --methods floor,floor", "--methods"),
        ("--model resnet18 --r 0", "--r must be at least 1"),
        ("--model resnet18 --size 0", "--size must be at least 1"),
        ("--model resnet18 --tokens 8", "--tokens"),
        ("--model deberta --size 64", "--size"),
        ("--model deberta --tokens 9999", "--tokens: deberta reads at most 512"),
        ("--model resnet18 --device cpu --capture", "--capture"),
        ("--model resnet18 --compile default --capture", "--capture"),
        ("--model resnet18 --json /dev/null/step.json", "--json /dev/null/step.json: cannot be written"),
        ("--model resnet18 --json tests", "--json tests: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, run):
    code, out, err = run(bench_step, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert said in err


def test_a_vision_language_model_takes_an_image_and_a_text(run, tmp_path, monkeypatch):
    targets = flora.models.presets.LLAVA_TARGETS
    monkeypatch.setattr(networks, "get", lambda name: tiny_llava(tmp_path, adapter_targets=targets))
    file = tmp_path / "step.json"
    tokens = ("--batch", 2, "--tokens", 6, "--device", "cpu", "--rounds", 1, "--steps", 1, "--warmup", 0, "--r", 2)
    methods = ("--methods", "floor,full,lora,flora")
    code, _, err = run(bench_step, "--model", "llava_mini", *tokens, *methods, "--json", file)
    assert code == 0, err
    floor, full, lora, flora_ = json.loads(file.read_text())["rows"]
    assert all("error" not in row for row in (floor, full, lora, flora_))
    assert lora["layers"] == flora_["layers"] == 2 * 7
    assert flora_["trainable_params"] == lora["trainable_params"] + 2 * 7 * 2 * 2
    inputs = network("llava_mini", batch=2, tokens=6).inputs(CPU)
    assert (inputs["input_ids"] == 4).sum(1).tolist() == [4, 4]
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert torch.equal(inputs["labels"] == -100, inputs["input_ids"] == 4)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a C++ compiler; gives the modes that were asked for."""
    modes, compile = [], torch.compile

    def noting(run, mode):
        modes.append(mode)
        return compile(run, backend="aot_eager")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", noting)
    return modes


def test_a_compiled_step_says_what_compiling_took_and_how_many_graphs_it_made(run, tmp_path, traced, small):
    file = tmp_path / "step.json"
    settings = ("--batch", 2, "--tokens", 8, "--device", "cpu", "--rounds", 1, "--steps", 1, "--warmup", 0, "--r", 2)
    methods = ("--methods", "floor,lora,flora", "--compile", "max-autotune-no-cudagraphs")
    code, out, err = run(bench_step, "--model", "llama", *settings, *methods, "--json", file)
    assert code == 0, err
    assert traced == 3 * ["max-autotune-no-cudagraphs"]
    assert "torch.compile max-autotune-no-cudagraphs" in out
    result = json.loads(file.read_text())
    assert result["compiled"] == "max-autotune-no-cudagraphs"
    for row in result["rows"]:
        assert row["compile_seconds"] > 1e-3 * row["ms"] > 0, row["method"]
        assert (row["graphs"], row["graph_breaks"]) == (1, 0), row["method"]


def test_a_compiled_floor_carries_the_gradients_of_the_eager_one(small, traced):
    net = network("deberta", batch=2, tokens=8)
    methods = Methods(net, Ranks(r=4))
    torch.manual_seed(0)
    base = net.build(CPU).eval()
    inputs = net.inputs(CPU)
    eager = methods.prepare("floor", copy.deepcopy(base))
    seen = []
    watched = [eager.model.get_input_embeddings(), *map(eager.model.get_submodule, methods._adapted)]
    for module in watched:
        module.register_forward_hook(lambda m, i, o: seen.append(o) if o.is_leaf else None)
    Step(net, eager, inputs)()
    made = methods.prepare("floor", copy.deepcopy(base), compiled=True)
    Step(net, made, inputs, "default")()
    expected = sorted(output.grad.abs().sum().item() for output in seen)
    assert sorted(start.grad.abs().sum().item() for start in made.starts) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 1 + 2 * 2  # the embeddings, and positions in two layers through two projections


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["floor", "full", "lora", "flora"])
def test_a_replayed_step_gives_the_gradients_of_an_eager_one(method, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else cuDNN may sum up in another order
    device = torch.device("cuda")
    net = network("resnet18", batch=4, size=64)
    made = Methods(net, Ranks(r=4)).prepare(method, net.build(device).to(device).eval())
    step = Step(net, made, net.inputs(device))
    replay = Captured(step, warmup=3)
    replay()
    torch.cuda.synchronize()
    replayed = [t.grad.clone() for t in step._with_gradients]
    step()
    for ours, eager in zip(replayed, step._with_gradients, strict=True):
        torch.testing.assert_close(ours, eager.grad, rtol=1e-3, atol=1e-5)


def test_runs_are_measured_over_and_all_are_kept(run, tmp_path):
    file = tmp_path / "step.json"
    few = ("--methods", "floor,lora,flora,dense", "--runs", 3)
    code, out, said = run(bench_step, "--model", "test_convnext", *QUICK, *few, "--json", file)
    result = json.loads(file.read_text())
    assert code == 0, said
    floor, lora, ours, dense = result["rows"]
    assert result["runs"] == 3
    assert all(len(row["ms_runs"]) == len(row["ms_rounds"]) == 3 for row in (floor, lora, ours))
    assert ours["ratio"] == pytest.approx(sorted(np.divide(ours["ms_runs"], floor["ms_runs"]))[1], rel=1e-2)
    assert said.count("dense") == 1 + 1  # named once, tried once: what failed is not tried again
    assert dense["ms_runs"] == []
    assert "runs, lora / flora: " in out


def test_checkpoints_repeat_blocks_and_leave_the_layers_alone(small, monkeypatch):
    gradients = {}
    for checkpointing in (False, True):
        net = network("llama", batch=2, tokens=8, checkpointing=checkpointing)
        torch.manual_seed(0)
        base = net.build(CPU)
        inputs = net.inputs(CPU)
        torch.manual_seed(1)
        made = Methods(net, Ranks(r=4)).prepare("flora", net.copied(base, CPU))
        calls = []
        first = made.model.base_model.model.model.layers[0].self_attn.q_proj
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        Step(net, made, inputs)()
        assert (len(calls), made.batched) == (1 + checkpointing, not checkpointing)
        gradients[checkpointing] = [p.grad for p in made.model.parameters() if p.requires_grad]
    for plain, repeated in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(plain, repeated, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.compat
@pytest.mark.parametrize("method", ["floor", "lora", "flora"])
def test_a_network_in_four_bits_trains_adapters_of_both_kinds(method, small):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = network("llama", batch=2, tokens=8, dtype=torch.bfloat16, quantize="nf4", checkpointing=True)
    torch.manual_seed(0)
    base = net.build(CPU)
    model = net.copied(base, CPU)
    packed = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 2 * 7
    assert type(model.lm_head) is nn.Linear
    kept = {id(p) for p in base.parameters()}
    assert not any(id(p) in kept for p in model.parameters())
    weight, place = base.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight
    library = bitsandbytes.functional
    expected = library.quantize_4bit(weight.detach(), quant_type="nf4", compress_statistics=True)
    assert torch.equal(library.dequantize_4bit(place.data, place.quant_state), library.dequantize_4bit(*expected))
    made = Methods(net, Ranks(r=4)).prepare(method, model)
    assert made.layers == (None if method == "floor" else 2 * 5)
    Step(net, made, net.inputs(CPU))()
    trained = [p for n, p in made.model.named_parameters() if "lora_" in n or "tucker_" in n]
    assert (method == "floor") == (not trained)
    assert all(p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model resnet18 --quantize nf4", "--quantize: resnet18 is a network of images"),
        ("--model resnet18 --gradient-checkpointing", "--gradient-checkpointing: resnet18 has none"),
        ("--model llama --quantize nf4", "--quantize nf4: needs bitsandbytes; pip install"),
    ],
)
def test_what_a_network_does_not_have_is_one_line(arguments, said, run, monkeypatch):
    here = "resnet18" in arguments
    monkeypatch.setattr("flora.bench.quantised.importlib.util.find_spec", lambda name: here or None)
    code, out, err = run(bench_step, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
