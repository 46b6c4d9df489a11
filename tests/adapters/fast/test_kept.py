"""Inference with weights that a block keeps: those of layer by layer, after every change of what they are made of."""

import contextvars
import copy
import gc
import threading
import weakref

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import flora
from flora.adapters import FloraLayer
from flora.adapters.fast import kept
from flora.replaced import passes
from tests.adapters.fast.nets import TARGETS, Net
from tests.adapters.fast.test_lifecycle import alone, by_hand
from tests.adapters.quantised import LINEAR


@pytest.fixture
def builds(monkeypatch):
    """What was built, layer by layer, in order."""
    built, build = [], kept._built

    def watched(layer, *args):
        if (found := build(layer, *args)) is not None:
            built.append(layer)
        return found

    monkeypatch.setattr(kept, "_built", watched)
    return built


def several(*names, **settings):
    """A network with adapters of these names, the first of which is active."""
    model = alone(Net(), **settings).eval()
    for name in names:
        model.add_adapter(name, flora.FloraConfig(target_modules=TARGETS, r=2, init_weights=False))
    return model


def outside(model, x):
    """What the model gives outside of its block."""
    token = passes.RUNNING.set(None)
    output = model(x)
    passes.RUNNING.reset(token)
    return output


@pytest.mark.parametrize("form", ["auto", "merged", "factored"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_outputs_are_those_of_w_plus_delta(form, mode, double, x, builds):
    model = several(forward=form)
    expected = by_hand(model)(x).detach()
    with mode(), flora.batched(model, keep=1):
        for _ in range(3):
            torch.testing.assert_close(model(x), expected)
    layers = [layer for layer in model.modules() if isinstance(layer, FloraLayer)]
    kinds = nn.Linear if form == "factored" else nn.Module  # of factored layers, the linear ones have thin matrices
    grouped = [layer for layer in layers if getattr(layer.base_layer, "groups", 1) > 1]
    own = [layer for layer in layers if isinstance(layer.base_layer, kinds) or (form != "auto" and layer in grouped)]
    assert len(builds) == len(set(builds))
    assert {*own} - {*grouped} <= {*builds} <= {*layers}
    assert len(builds) == len(layers) or form == "factored"


@pytest.mark.parametrize("autocast", [False, True])
def test_they_are_bit_by_bit_those_of_the_merged_form(autocast, x):
    model = several(forward="merged")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x)
        with flora.batched(model, keep=1):
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)


def test_adapters_that_take_turns_are_built_once_each_and_the_one_used_longest_ago_goes_first(x, builds):
    model = several("second", "third")
    expected = {}
    with torch.inference_mode():
        for name in ("default", "second", "third"):
            model.set_adapter(name, inference_mode=True)
            expected[name] = model(x)
        with flora.batched(model, keep=2):
            for name, built in zip(
                ("default", "second", "default", "second", "third", "second", "default"),
                (True, True, False, False, True, False, True),
                strict=True,
            ):
                builds.clear()
                model.set_adapter(name, inference_mode=True)
                torch.testing.assert_close(model(x), expected[name], rtol=1e-4, atol=1e-5)
                assert len(builds) == (11 if built else 0), name
    assert not torch.allclose(expected["second"], expected["third"])


def step(model, **how):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **how)
    token = passes.RUNNING.set(None)
    with torch.enable_grad():
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    passes.RUNNING.reset(token)
    optimizer.step()


def swap(model, folder):
    other = several()
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, FloraLayer):
                layer.core("default").mul_(3)
    other.save_pretrained(folder)
    hotswap_adapter(model, folder, adapter_name="default")


def in_place(model):
    with torch.inference_mode():
        last(model).core("default").mul_(2)


def last(model):
    """The layer whose changes the output shows most."""
    return model.base_model.model.fc[2]


def other_core(model):
    core = copy.deepcopy(last(model).tucker_core["default"])
    core["weight"].mul_(2)
    last(model).tucker_core["default"] = core


def other_contents(model):
    with torch.inference_mode():
        core = last(model).core("default")
        torch.utils.swap_tensors(core, nn.Parameter(2 * core, requires_grad=False))


def grown(model):
    return {key: 2 * value for key, value in model.state_dict().items()}


CHANGES = {
    "a step of an optimizer": lambda model, folder: step(model),
    "a step of a fused optimizer": lambda model, folder: step(model, fused=True),
    "another core": lambda model, folder: other_core(model),
    "other contents, made in inference mode": lambda model, folder: other_contents(model),
    "in place, in inference mode": lambda model, folder: in_place(model),
    "other numbers behind a parameter": lambda model, folder: setattr(
        last(model).core("default"), "data", torch.ones(3, 3)
    ),
    "loaded": lambda model, folder: model.load_state_dict(grown(model)),
    "loaded by assignment": lambda model, folder: model.load_state_dict(grown(model), assign=True),
    "hot-swapped": swap,
    "scaled": lambda model, folder: last(model).scale_layer(3.0),
    "a base weight": lambda model, folder: last(model).base_layer.weight.mul_(2),
    "merged": lambda model, folder: (last(model).core("default").mul_(2), model.merge_adapter()),
    "disabled": lambda model, folder: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["auto", "factored"])
@pytest.mark.parametrize("keep", [0, 2])
def test_a_change_within_the_block_takes_effect(change, form, keep, x, tmp_path):
    model = several(forward=form)
    with torch.no_grad(), flora.batched(model, keep):
        before = model(x)
        CHANGES[change](model, tmp_path)
        after = model(x)
        torch.testing.assert_close(after, outside(model, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-3)


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("form", ["merged", "factored"])
def test_base_layers_that_follow_one_another_at_one_address_are_told_apart(keep, form):
    model, x = alone(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], forward=form).eval(), torch.randn(2, 6)
    layer = model.base_model.model[0]
    with torch.no_grad(), flora.batched(model, keep):
        for _ in range(60):  # the address of one that is gone is soon another's
            torch.testing.assert_close(model(x), outside(model, x))
            layer.base_layer = nn.Linear(6, 5).requires_grad_(False)


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("keep", [0, 1])
def test_a_scale_that_is_a_tensor_may_change_in_place(form, keep):
    model, x = alone(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], forward=form).eval(), torch.randn(2, 6)
    scale = model.base_model.model[0].scaling["default"] = torch.tensor(0.5)
    with torch.no_grad(), flora.batched(model, keep):
        for _ in range(2):
            torch.testing.assert_close(model(x), outside(model, x))
            scale.mul_(3)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("keep", [0, 1])
def test_base_weights_made_in_inference_mode_are_not_relied_on(grad, keep):
    model, x = alone(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"]).eval(), torch.randn(2, 6)
    base = model.base_model.model[0].base_layer
    with torch.inference_mode():
        base.weight = nn.Parameter(2 * base.weight, requires_grad=False)
    with torch.set_grad_enabled(grad), flora.batched(model, keep):
        before = model(x)
        with torch.inference_mode():
            base.weight.mul_(2)
        torch.testing.assert_close(model(x), outside(model, x))
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("keep", [0, 1])
def test_a_conversion_of_the_model_is_seen_where_it_leaves_addresses_and_versions(grad, keep):
    model, x = alone(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"]).eval(), torch.randn(2, 6)
    weight = model.base_model.model[0].base_layer.weight
    with torch.set_grad_enabled(grad), flora.batched(model, keep):
        before, place = model(x), (weight._version, weight.data_ptr())
        model._apply(lambda numbers: numbers.data.mul_(2))  # as half().float() into the same memory
        assert (weight._version, weight.data_ptr()) == place
        torch.testing.assert_close(model(x), outside(model, x))
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_conversion_of_a_base_layer_is_seen_whatever_memory_the_allocator_gives(keep):
    model, x = alone(nn.Sequential(nn.Linear(640, 480)), target_modules=["0"]).eval(), torch.randn(2, 640)
    base = model.base_model.model[0].base_layer
    numbers = base.weight.detach().clone()
    with torch.no_grad(), flora.batched(model, keep):
        for _ in range(10):
            base.weight.copy_(numbers)
            model(x)
            base.bfloat16().float()
            torch.testing.assert_close(model(x), outside(model, x), rtol=1e-5, atol=1e-5)


def test_gradients_within_the_block_are_as_ever(double, x):
    model = several()
    twin = copy.deepcopy(model)
    with flora.batched(model, keep=1):
        with torch.no_grad():
            model(x)
        model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class Mixed(nn.Module):
    """Layers whose op is not a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.recurrent(self.attention(x, x, x)[0])[0]


def test_attention_and_recurrent_layers_are_kept_and_embeddings_look_their_rows_up(builds):
    config = flora.FloraConfig(target_modules=["embed", "attention", "recurrent"], r=3, init_weights=False)
    model, tokens = peft.get_peft_model(Mixed(), config).eval(), torch.arange(10).view(2, 5)
    with torch.inference_mode():
        expected = model(tokens)
        with flora.batched(model, keep=1):
            for _ in range(2):
                torch.testing.assert_close(model(tokens), expected)
    assert [type(layer.base_layer) for layer in builds] == [nn.MultiheadAttention, nn.GRU]


def test_another_module_within_a_base_layer_is_seen():
    config = flora.FloraConfig(target_modules=["attention"], r=3, init_weights=False)
    model, tokens = peft.get_peft_model(Mixed(), config).eval(), torch.arange(10).view(2, 5)
    attention = model.base_model.model.attention.base_layer
    with torch.no_grad(), flora.batched(model, keep=1):
        before = model(tokens)
        attention.out_proj = copy.deepcopy(attention.out_proj)
        attention.out_proj.weight.mul_(2)
        torch.testing.assert_close(model(tokens), outside(model, tokens))
    assert not torch.allclose(model(tokens), before)


def test_threads_that_share_a_block(double, x):
    model = several("second")
    expected, errors = outside(model, x), []

    def work():
        try:
            for i in range(60):
                mode = torch.no_grad if i % 2 else torch.inference_mode
                with mode():
                    torch.testing.assert_close(model(x), expected.detach())
        except BaseException as error:
            errors.append(error)

    with flora.batched(model, keep=2):
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_magnitudes_and_several_active_adapters_are_kept(x, builds):
    model = several("second", use_dora=True)
    model.base_model.set_adapter(["default", "second"])
    with torch.inference_mode():
        expected = model(x)
        with flora.batched(model, keep=1):
            for _ in range(2):
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(builds) == len(set(builds)) == 11


@pytest.mark.parametrize("kind", LINEAR)
def test_quantised_layers_run_in_their_own_way(kind, builds):
    model = alone(nn.Sequential(LINEAR[kind](nn.Linear(6, 5))), target_modules=["0"], forward="auto").eval()
    x = torch.randn(4, 6)
    with torch.no_grad(), flora.batched(model, keep=1):
        assert torch.equal(model(x), outside(model, x))
    assert not builds


def test_a_layer_with_dropout_on_or_a_hook_runs_in_its_own_way(builds):
    model = alone(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], forward="auto", flora_dropout=0.5)
    x = torch.randn(64, 6)
    with torch.no_grad(), flora.batched(model, keep=1):
        assert not torch.allclose(model(x), model(x))
        assert not builds
        expected = model.eval()(x)
        assert len(builds) == 1
        base = model.base_model.model[0].base_layer
        with base.register_forward_pre_hook(lambda module, args: (2 * args[0],)):
            update = expected - base.forward(x)
            torch.testing.assert_close(model(x), base.forward(2 * x) + update, rtol=1e-4, atol=1e-5)
    assert len(builds) == 1


def test_parameters_made_in_inference_mode_are_not_relied_on(x):
    with torch.inference_mode():
        model = several()
        with flora.batched(model, keep=1):
            before = model(x)
            model.base_model.model.conv[0].core("default").mul_(2)
            after = model(x)
            torch.testing.assert_close(after, outside(model, x))
    assert not torch.allclose(before, after)


def test_a_cuda_graph_reads_nothing_that_ends_with_the_block(x, builds, monkeypatch):
    model = several(forward="merged")
    with torch.no_grad(), flora.batched(model, keep=1):
        expected = model(x)
        built = list(builds)
        monkeypatch.setattr(kept, "captured", lambda: True)
        layer = built[0]
        assert passes.running().prepared_for(layer) is None
        torch.testing.assert_close(model(x), expected)
        monkeypatch.undo()
        assert passes.running().prepared_for(layer) is not None
    assert builds == built


def test_what_is_kept_goes_with_the_block(x):
    model = several(forward="merged")
    with torch.no_grad(), flora.batched(model, keep=1):
        model(x)
        prepared = passes.running().prepared_for(model.base_model.model.conv[0])
        reference = weakref.ref(prepared["weight"])
        del prepared
        assert reference() is not None
    gc.collect()
    assert reference() is None


def test_fewer_states_than_none_are_refused():
    with pytest.raises(ValueError, match="keep: must be 0 or more states, got -1"):
        flora.batched(nn.Linear(2, 2), keep=-1)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_fused_op_gives_the_same_bits_whether_it_is_recorded_or_not(autocast):
    model, x = (
        alone(nn.Sequential(nn.Linear(24, 20)), target_modules=["0"], forward="factored").eval(),
        torch.ones(3, 24),
    )
    with flora.batched(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        recorded = model(x)
        assert "LinearPlusThin" in type(recorded.grad_fn).__name__
        with torch.no_grad():
            assert torch.equal(model(x), recorded)
