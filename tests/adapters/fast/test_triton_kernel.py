"""The GPU kernel against float64; without a GPU test_triton_plan.py runs these tests in Triton's interpreter."""

import dataclasses

import peft
import pytest
import torch
from torch import nn

import flora
from flora.adapters.fast.batched import INTERPRETED
from tests.adapters.fast.nets import plans_of, together
from tests.adapters.fast.test_triton_plan import DEVICE, ready

pytestmark = ready
TILE = (16, 32, 16)


@pytest.fixture(autouse=True)
def kernels():
    return pytest.importorskip(
        "flora.adapters.fast.triton_kernel", reason="Triton comes with torch for CUDA and ROCm only"
    )


def buffer(*shape):
    return torch.randn(*shape, device=DEVICE)


def same(actual, expected):
    rtol = 4 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def test_products_of_many_shapes_and_layouts_in_one_buffer_and_sums_with_tensors_elsewhere(kernels):
    # m, n, k, which nothing divides; whether a and b lie transposed
    shapes = [(70, 49, 4, 0, 0), (64, 304, 16, 1, 0), (40, 128, 17, 0, 1), (1, 1, 1, 1, 1), (16, 16, 200, 0, 0)]
    a, b, c = buffer(20_000), buffer(20_000), buffer(40_000)
    products, expected, places, at = [], [], [], [0, 0, 0]
    for scale, (m, n, k, a_turned, b_turned) in enumerate(shapes, start=1):
        left, right = a[at[0] :][: m * k], b[at[1] :][: k * n]
        left = left.view(k, m).T if a_turned else left.view(m, k)
        right = right.view(n, k).T if b_turned else right.view(k, n)
        a_m, a_k, b_k = (kernels.Walk(step) for step in (*left.stride(), right.stride(0)))
        product = kernels.Product(
            m, n, k, at[0], a_m, a_k, at[1], b_k, right.stride(1), at[2], kernels.Walk(n), 1, scale / 2
        )
        products.append(product)
        expected.append(scale / 2 * left.double() @ right.double())
        places.append((slice(at[2], at[2] + m * n), (m, n)))
        at = [at[0] + m * k, at[1] + k * n, at[2] + m * n]

    kernels.Products(products, TILE, c.device)(a, b, c)
    for (place, shape), wanted in zip(places, expected, strict=True):
        same(c[place].view(shape), wanted)

    bases = [buffer(*shape).bfloat16() for _, shape in places]
    c = torch.empty(40_000, device=DEVICE, dtype=torch.bfloat16)
    kernels.Products(products, (64, 64, 32), c.device)(a, b, c, kernels.scattered(bases))
    for (place, shape), wanted, base in zip(places, expected, bases, strict=True):
        same(c[place].view(shape), wanted + base.double())


def test_several_elements_are_moved_at_once_where_all_is_aligned_and_half_precision_is_that_of_the_operands(kernels):
    a, b, c = buffer(2, 64, 32), buffer(2, 32, 128).half(), buffer(2, 64, 128)
    short, long, unit = kernels.Walk(32), kernels.Walk(128), kernels.Walk(1)
    products = [
        kernels.Product(64, 128, 32, i * 64 * 32, short, unit, i * 32 * 128, long, 1, i * 64 * 128, long, 1)
        for i in range(2)
    ]
    together = kernels.Products(products, (64, 64, 32), c.device)
    assert [launch.layout.aligned for launch in together.launches] == [True]
    together(a, b, c)
    torch.testing.assert_close(c.double(), a.half().double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_rows_and_depth_may_be_pairs_of_indices_as_in_a_convolutions_weight(kernels):
    rank, wide, small, inside = 5, 33, 9, 3
    core, factor, columns = buffer(rank, inside, small), buffer(wide, inside), buffer(rank, wide, small)
    of_core = kernels.Walk(inside * small, 1, small)  # a rank and a small position
    of_columns = kernels.Walk(wide * small, 1, small)
    unit, step = kernels.Walk(1), kernels.Walk(small)
    there = kernels.Product(rank * small, wide, inside, 0, of_core, step, 0, unit, inside, 0, of_columns, small)
    kernels.Products([there], TILE, columns.device)(core, factor, columns)
    same(columns, torch.einsum("ris,wi->rws", core.double(), factor.double()))

    back = torch.empty_like(factor)
    again = kernels.Product(
        wide, inside, rank * small, 0, step, of_columns, 0, of_core, small, 0, kernels.Walk(inside), 1
    )
    kernels.Products([again], TILE, back.device)(columns, core, back)
    same(back, torch.einsum("rws,ris->wi", columns.double(), core.double()))


@pytest.fixture
def watch(monkeypatch):
    if not INTERPRETED:
        pytest.skip("watches the loads and stores of Triton's interpreter")
    from tests.adapters.fast.lanes import Watch

    return Watch(monkeypatch)


@pytest.mark.parametrize("tile", [None, (16, 256, 16), (32, 32, 128)])
def test_every_lane_stays_within_its_own_product(watch, monkeypatch, tile):
    shapes = [nn.Conv2d(3, 16, 7), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 40, 1), nn.Conv2d(40, 40, 3, groups=40)]
    base = nn.Sequential(*shapes, nn.Conv2d(40, 7, 3), nn.Flatten(), nn.Linear(28, 72), nn.Linear(72, 24))
    targets = [name for name, module in base.named_modules() if hasattr(module, "weight")]
    config = flora.FloraConfig(target_modules=targets, r=8, kernel_rank=2, init_weights=False, forward="merged")
    model = together(peft.get_peft_model(base.to(memory_format=torch.channels_last), config))
    if tile is not None:
        monkeypatch.setattr("flora.adapters.fast.triton_plan._tile", lambda step, products: tile)
    with torch.autocast(DEVICE, torch.bfloat16):
        model(torch.randn(1, 3, 14, 14)).sum().backward()
        (plan,) = plans_of(model)
    assert len(plan.layers) == 7
    assert {product for products in watch.calls for product in products} == {product for _, product in plan._products()}
    assert {launch.layout.aligned for step in plan._steps.values() for launch in step.launches} == {True, False}


ROW = 16
OUTSIDE = [{"a_m": ROW + 1}, {"a_k": 2}, {"b_k": ROW + 1}, {"c_m": ROW + 1}]


@pytest.mark.parametrize("wrong", OUTSIDE, ids=str)
def test_a_lane_in_the_part_of_a_neighbour_is_seen(watch, kernels, wrong):
    long, unit = kernels.Walk(ROW), kernels.Walk(1)
    products = [
        kernels.Product(ROW, ROW, ROW, i * ROW**2, long, unit, i * ROW**2, long, 1, i * ROW**2, long, 1)
        for i in range(3)
    ]
    flat = buffer(3 * ROW**2)
    kernels.Products(products, TILE, flat.device)(flat, flat, torch.empty_like(flat))
    wrong = {name: kernels.Walk(step) for name, step in wrong.items()}
    products[1] = dataclasses.replace(products[1], **wrong)
    with pytest.raises(kernels.triton.TritonError, match="leaves its part"):
        kernels.Products(products, TILE, flat.device)(flat, flat, torch.empty_like(flat))


def test_a_promise_that_is_not_kept_is_seen(watch, kernels):
    long, unit = kernels.Walk(ROW), kernels.Walk(1)
    product = kernels.Product(ROW, ROW, ROW, 0, long, unit, 0, long, 1, 0, long, 1)
    flat = buffer(4 + ROW**2)
    odd = kernels.Operand([flat[4:]], torch.tensor([4]), even=True)
    with pytest.raises(kernels.triton.TritonError, match="4 is no multiple of 8"):
        kernels.Products([product], TILE, flat.device)(odd, flat, torch.empty_like(flat))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA streams")
def test_offsets_copied_on_one_stream_are_not_read_on_another(kernels):
    tensors = [buffer(16), buffer(16)]
    here = kernels.scattered(tensors)
    with torch.cuda.stream(torch.cuda.Stream()):
        there = kernels.scattered(tensors)
    assert kernels.scattered(tensors).starts is here.starts
    assert there.starts is not here.starts
