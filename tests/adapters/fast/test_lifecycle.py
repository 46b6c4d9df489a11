"""What the builder leaves behind: after errors, deleted, copied and pickled models, and hooks of base layers."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.fast.nets import Net, adapt, builder

pytestmark = pytest.mark.usefixtures("double")


def test_weights_are_handed_out_after_an_error_in_a_hook_or_a_layer(x):
    model, handed = adapt(Net()), []
    hook = model.base_model.model.register_forward_pre_hook(lambda *args: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model(x)
    hook.remove()
    with pytest.raises(RuntimeError, match="channels"):
        model(x[:, :2])
    layer = model.base_model.model.fc[0]
    layer.register_forward_hook(lambda *args: handed.append(builder(model).prepared_for(layer)))
    model(x)
    assert isinstance(handed[0]["weight"], Tensor)


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_deleted_model_is_freed(form, backward):
    model = adapt(Net(), target_modules=r"(conv|fc)\.\d", forward=form)
    kept = [
        weakref.ref(part) for part in (builder(model), model.base_model.model.fc[0], model.base_model.model.stem.weight)
    ]
    output = model(torch.randn(2, 3, 6, 6)).sum()
    if backward:
        output.backward()
    del model, output
    gc.collect()
    assert [part() for part in kept] == [None, None, None]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_and_a_pickled_model_build_their_own_weights(again):
    model, x = adapt(Net()), torch.randn(2, 3, 6, 6)
    twin = again(model)
    built = {}
    with torch.no_grad():
        for layer in builder(twin).layers:
            layer.core("default").mul_(2)
            layer.register_forward_hook(
                lambda layer, args, output: built.update({layer: builder(twin)._prepared.get(id(layer))})
            )
    assert not torch.allclose(twin(x), model(x))
    assert len(built) == len(builder(model).layers) > 0
    assert all(isinstance(weights["weight"], Tensor) for weights in built.values())


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_a_base_layer_are_called(form, kind):
    model, called = adapt(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"], forward=form), []
    base = model.base_model.model[0].base_layer
    getattr(base, f"register_{kind}_hook")(lambda *args: called.append(kind))
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert called == [kind]
