"""torch's own transforms, tracers and exporters over an adapted model."""

import copy
import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from ..frame import trial
from ..methods import Method
from ..reference import TIGHT, assert_close, assert_same_gradients, by_hand, gradients, three_steps
from .passes import ALL, Mixed, image_loss, mlp, rows

IMAGES = (4, 3, 6, 6)


def pair(method: Method) -> tuple[nn.Module, nn.Module]:
    """An adapted model and the same by hand."""
    base = Mixed()
    model = method.wrap(copy.deepcopy(base), ALL)
    return model.eval(), by_hand(method, base, model).eval()


def trained(method: Method, model: nn.Module) -> dict[tuple[str, str, str], nn.Parameter]:
    """Its adapter's parameters, by layer, weight and part."""
    if hasattr(model, "updates"):
        return {(*place, k[1:]): p for place, update in model.updates.items() for k, p in update.parts.items()}
    return {(*place, part): p for place, parts in method.parameters(model).items() for part, p in parts.items()}


def functional(method: Method, model: nn.Module):
    """The model as a function of its adapter's parameters and its input; and these parameters."""
    parameters = trained(method, model)
    names = {id(p): name for name, p in model.named_parameters()}

    def call(values: dict, x: Tensor) -> Tensor:
        return functional_call(model, {names[id(parameters[key])]: value for key, value in values.items()}, (x,))

    return call, {key: p.detach() for key, p in parameters.items()}


def both(method: Method, compute) -> None:
    """What is computed from the function of a model must be the same by hand."""
    results = [compute(*functional(method, model)) for model in pair(method)]
    for actual, expected in zip(*map(_flat, results), strict=True):
        assert_close(actual, expected, TIGHT, "result", floor=1e-6)


def _flat(result: object) -> list[Tensor]:
    if isinstance(result, dict):
        return [tensor for key in sorted(result) for tensor in _flat(result[key])]
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in _flat(part)]


@trial("torch", "torch.func: vmap(grad), gradients of single examples")
def single_gradients(method: Method) -> None:
    def compute(call, values):
        def loss(values, x):
            return call(values, x[None]).square().mean()

        return vmap(grad(loss), in_dims=(None, 0))(values, rows(*IMAGES))

    both(method, compute)


@trial("torch", "torch.func: jvp, jacfwd, jacrev")
def jacobians(method: Method) -> None:
    x = rows(2, *IMAGES[1:])

    def compute(call, values):
        tangents = {key: torch.ones_like(value) for key, value in values.items()}
        forward = jvp(lambda v: call(v, x), (values,), (tangents,))
        keys = sorted(values)[:2]

        def few(*chosen: Tensor) -> Tensor:
            return call(values | dict(zip(keys, chosen, strict=True)), x)

        chosen = [values[key] for key in keys]
        return forward, jacfwd(few, (0, 1))(*chosen), jacrev(few, (0, 1))(*chosen)

    both(method, compute)


@trial("torch", "torch.func: a Hessian of the loss; vmap over inputs and over adapters")
def hessians(method: Method) -> None:
    x = rows(2, *IMAGES[1:])

    def compute(call, values):
        key = min(values)

        def loss(value: Tensor) -> Tensor:
            return call(values | {key: value}, x).square().mean()

        stacked = {key: torch.stack([value, 2 * value]) for key, value in values.items()}
        ensemble = vmap(call, in_dims=(0, None))(stacked, x)
        return torch.func.hessian(loss)(values[key]), vmap(call, (None, 0))(values, x[:, None]), ensemble

    both(method, compute)


@trial("torch", "forward-mode AD: autograd.forward_ad with dual numbers")
def forward_ad(method: Method) -> None:
    import torch.autograd.forward_ad as fwAD

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        with fwAD.dual_level():
            output = model(fwAD.make_dual(rows(*IMAGES), rows(*IMAGES, seed=1)))
            return tuple(fwAD.unpack_dual(output))

    for actual, expected in zip(*map(run, pair(method)), strict=True):
        assert_close(actual, expected, TIGHT)


@trial("torch", "autograd.functional.jacobian with vectorize=True, in both modes")
def vectorised_jacobian(method: Method) -> None:
    def run(model: nn.Module, strategy: str) -> Tensor:
        return torch.autograd.functional.jacobian(model, rows(2, *IMAGES[1:]), vectorize=True, strategy=strategy)

    model, reference = pair(method)
    for strategy in ("reverse-mode", "forward-mode"):
        assert_close(run(model, strategy), run(reference, strategy), TIGHT, strategy)


@trial("torch", "make_fx of the loss and of its gradient", slow=True)
def traced_by_fx(method: Method) -> None:
    def loss(values):
        return call(values, rows(*IMAGES)).square().mean()

    results = []
    for model in pair(method):
        call, values = functional(method, model)
        results.append(_flat([make_fx(loss)(values)(values), make_fx(grad(loss))(values)(values)]))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, TIGHT)


def _same_at_other_sizes(exported, model: nn.Module, reference: nn.Module, sizes=(4,)) -> None:
    with torch.no_grad():
        for size in sizes:
            images = rows(size, *IMAGES[1:], seed=size)
            assert_close(exported(images), reference(images), TIGHT, "output of what was exported")
            assert_close(model(images), reference(images), TIGHT, "output after exporting")


@trial("torch", "torch.jit.trace, saved and loaded; a trace takes new values of parameters")
def jit_trace(method: Method) -> None:
    model, reference = pair(method)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            traced = torch.jit.trace(model, rows(*IMAGES))
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        _same_at_other_sizes(torch.jit.load(buffer), model, reference, sizes=(4, 2))
    # What a trace computes is to follow the parameters, not to hold the update as a constant.
    for network in (model, reference):
        for parameter in trained(method, network).values():
            parameter.data.mul_(1.5)
    _same_at_other_sizes(traced, model, reference)


@trial("torch", "torch.export of an unmerged model, with a dynamic batch", slow=True)
def exports(method: Method) -> None:
    model, reference = pair(method)
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(model.get_base_model(), (rows(*IMAGES),), dynamic_shapes=({0: batch},), strict=False)
    _same_at_other_sizes(program.module(), model, reference, sizes=(4, 2))


@trial("torch", "torch.compile (backend aot_eager, whole graph), forward and backward", slow=True)
def compiles(method: Method) -> None:
    model, reference = pair(method)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step in range(2):
            losses = [network(rows(*IMAGES, seed=step)).square().mean() for network in (compiled, reference)]
            assert_close(*losses, TIGHT, "loss")
            for loss in losses:
                loss.backward()
            assert_same_gradients(gradients(method, model), gradients(method, reference), TIGHT)
        with torch.no_grad(), model.disable_adapter():
            assert_close(compiled(rows(*IMAGES)), Mixed().eval()(rows(*IMAGES)), TIGHT, "disabled after compiling")
    finally:
        torch._dynamo.reset()


@trial("torch", "torch.compile of each block, under non-reentrant checkpointing", slow=True)
def compiles_blocks(method: Method) -> None:
    torch._dynamo.reset()

    def loss(network: nn.Module) -> Tensor:
        inner = network.get_base_model() if hasattr(network, "get_base_model") else network
        block = torch.compile(inner.mlp, backend="aot_eager")
        x = inner.act(inner.up(inner.act(inner.conv(rows(*IMAGES)))))
        return torch.utils.checkpoint.checkpoint(block, x.mean((2, 3)), use_reentrant=False).square().mean()

    try:
        three_steps(method, Mixed(), ALL, loss, steps=2)
    finally:
        torch._dynamo.reset()


@trial("torch", "model.float() and back to double, share_memory")
def moved(method: Method) -> None:
    base = Mixed()
    model = method.wrap(copy.deepcopy(base), ALL)
    image_loss(model)
    model.float()
    model.double()
    model.share_memory()
    assert_close(model(rows(*IMAGES)), by_hand(method, base, model)(rows(*IMAGES)), 1e-6)


@trial("torch", "state_dict loaded into another adapted model, also with assign=True")
def state_dicts(method: Method) -> None:
    model, reference = pair(method)
    for assign in (False, True):
        torch.manual_seed(7)
        other = method.wrap(Mixed(), ALL).eval()
        other(rows(*IMAGES))
        other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        assert_close(other(rows(*IMAGES)), reference(rows(*IMAGES)), TIGHT, f"output with assign={assign}")


@trial("torch", "ONNX without dynamo (TorchScript's exporter)", needs=("onnx",))
def onnx_by_script(method: Method) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, reference = pair(method)
    torch.onnx.export(model, (rows(*IMAGES),), "model.onnx", dynamo=False, input_names=["x"])
    output = ReferenceEvaluator(onnx.load("model.onnx")).run(None, {"x": rows(*IMAGES).numpy()})[0]
    assert_close(torch.from_numpy(output), reference(rows(*IMAGES)), 1e-6)


@trial("torch", "ONNX with dynamo", needs=("onnx", "onnxscript"), slow=True)
def onnx_by_dynamo(method: Method) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, reference = pair(method)
    torch.onnx.export(model, (rows(*IMAGES),), "model.onnx", dynamo=True, input_names=["x"], verbose=False)
    output = ReferenceEvaluator(onnx.load("model.onnx")).run(None, {"x": rows(*IMAGES).numpy()})[0]
    assert_close(torch.from_numpy(output), reference(rows(*IMAGES)), 1e-6)


@trial("tensorboard", "SummaryWriter.add_graph", needs=("tensorboard",))
def tensorboard_graph(method: Method) -> None:
    from torch.utils.tensorboard import SummaryWriter

    model, reference = pair(method)
    with SummaryWriter("logs") as writer:
        writer.add_graph(model, rows(*IMAGES))
    assert any(Path("logs").iterdir())
    _same_at_other_sizes(model, model, reference)


@trial("fvcore", "FlopCountAnalysis counts the base layers and the update", needs=("fvcore",))
def flop_count(method: Method) -> None:
    from fvcore.nn import FlopCountAnalysis

    base = Mixed().eval()
    model = method.wrap(copy.deepcopy(base), ALL).eval()
    counted, own = (FlopCountAnalysis(m, rows(*IMAGES)).unsupported_ops_warnings(False).total() for m in (model, base))
    assert own < counted < 4 * own, f"{counted} operations, of the base {own}"


@trial(
    "opacus",
    "GradSampleModule: gradients of single examples",
    needs=("opacus",),
    # Its hooks are on modules that have parameters and are called; cores and factors lie in containers. The gradients
    # of torch.func (single_gradients) are right.
    expected={"FLoRA": "fails: TypeError: 'NoneType' object is not subscriptable"},
)
def opacus_samples(method: Method) -> None:
    from opacus import GradSampleModule

    base = mlp()
    targets = ["0", "2", "4"]
    model = method.wrap(copy.deepcopy(base), targets)
    reference = by_hand(method, base, model)
    sampled = GradSampleModule(model, loss_reduction="sum")
    x = rows(4, 12)
    sampled(x).square().mean(1).sum().backward()
    for row in range(4):
        reference.zero_grad()
        reference(x[row : row + 1]).square().mean(1).sum().backward()
        for key, parameter in trained(method, model).items():
            expected = trained(method, reference)[key].grad
            assert_close(parameter.grad_sample[row], expected, 1e-6, f"gradient of {key}", floor=1e-3)
