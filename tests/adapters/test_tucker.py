"""The mathematics against tensorly and numpy, in float64."""

import math

import hypothesis
import numpy as np
import pytest
import tensorly
import torch
from hypothesis import strategies as st
from tensorly.decomposition import tucker as tensorly_tucker

from flora.adapters import tucker

sizes = st.lists(st.integers(1, 6), min_size=1, max_size=6)
examples = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def random_form(shape, ranks):
    """Core and factors with entries of unit variance; no factor for modes of size and rank 1."""
    core = torch.randn(*ranks, dtype=torch.float64)
    factors = [
        torch.randn(size, rank, dtype=torch.float64) if size > 1 or rank > 1 else None
        for size, rank in zip(shape, ranks, strict=True)
    ]
    return core, factors


def dense(core, factors) -> np.ndarray:
    """By tensorly."""
    matrices = [np.eye(rank) if f is None else f.numpy() for f, rank in zip(factors, core.shape, strict=True)]
    return tensorly.tucker_to_tensor((core.numpy(), matrices))


@examples
@hypothesis.given(shape=sizes, data=st.data())
def test_full_tensor_is_tensorlys(shape, data):
    ranks = [data.draw(st.integers(1, 7)) for _ in shape]
    core, factors = random_form(shape, ranks)
    np.testing.assert_allclose(tucker.to_tensor(core, factors).numpy(), dense(core, factors), rtol=1e-10, atol=1e-10)


@examples
@hypothesis.given(shape=sizes, data=st.data())
def test_a_tensor_is_added_to_a_weight_of_any_layout(shape, data):
    core, factors = random_form(shape, [data.draw(st.integers(1, 4)) for _ in shape])
    order = data.draw(st.permutations(range(len(shape))))
    weight = torch.randn(*(shape[mode] for mode in order), dtype=torch.float64)
    weight = weight.permute([order.index(mode) for mode in range(len(shape))])
    if data.draw(st.booleans()):  # with gaps
        weight = weight.repeat_interleave(2, dim=0)[::2]
    total = tucker.add_tensor(weight, core, factors, 0.7)
    expected = weight.numpy() + 0.7 * dense(core, factors)
    np.testing.assert_allclose(total.numpy(), expected, rtol=1e-10, atol=1e-10)
    if weight.is_contiguous() or 1 not in shape:
        dense_layout = sorted(weight.stride()) == sorted(total.stride())
        assert not dense_layout or weight.stride() == total.stride()
    narrow = tucker.add_tensor(weight.float(), core.float(), [f if f is None else f.float() for f in factors], 0.7)
    np.testing.assert_allclose(narrow.numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("weight", "core"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_sum_has_the_wider_dtype(weight, core):
    base, (small, factors) = torch.randn(6, 5, 3, 3), random_form((6, 5, 3, 3), (2, 2, 2, 2))
    total = tucker.add_tensor(base.to(weight), small.to(core), [factor.to(core) for factor in factors], 2.0)
    assert total.dtype == torch.float32
    rounded = dense(small.to(core).double(), [factor.to(core).double() for factor in factors])
    np.testing.assert_allclose(total.numpy(), base.to(weight).double().numpy() + 2 * rounded, rtol=1e-4, atol=1e-4)


@examples
@hypothesis.given(shape=sizes, data=st.data())
def test_mode_product_is_tensorlys(shape, data):
    mode = data.draw(st.integers(0, len(shape) - 1))
    tensor = torch.randn(*shape, dtype=torch.float64)
    factor = torch.randn(data.draw(st.integers(1, 5)), shape[mode], dtype=torch.float64)
    expected = tensorly.tenalg.mode_dot(tensor.numpy(), factor.numpy(), mode)
    np.testing.assert_allclose(tucker.mode_product(tensor, factor, mode).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (8, 1, 3, 3), (3, 6, 5), (2, 3, 4, 2, 3)])
def test_same_shaped_tensors_are_built_together(shape):
    ranks = tucker.clip_ranks(shape, [2] * len(shape))
    forms = [random_form(shape, ranks) for _ in range(4)]
    core = torch.stack([core for core, _ in forms])
    factors = [
        None if column[0] is None else torch.stack(column) for column in zip(*(f for _, f in forms), strict=True)
    ]
    together = tucker.to_tensor(core, factors)
    for built, form in zip(together, forms, strict=True):
        np.testing.assert_allclose(built.numpy(), dense(*form), rtol=1e-12, atol=1e-12)


@examples
@hypothesis.given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=5), data=st.data())
def test_clipped_ranks_are_those_a_general_core_reaches(shape, data):
    ranks = [data.draw(st.integers(1, 8)) for _ in shape]
    clipped = tucker.clip_ranks(shape, ranks)
    core, factors = random_form(shape, ranks)
    reached = [np.linalg.matrix_rank(tensorly.unfold(dense(core, factors), mode)) for mode in range(len(shape))]
    assert list(clipped) == reached


def test_clipping_a_depthwise_convolution():
    assert tucker.clip_ranks((96, 1, 7, 7), (16, 16, 2, 2)) == (4, 1, 2, 2)
    assert tucker.clip_ranks((96, 1, 7, 7), (16, 16, 2, 2), "mode") == (16, 1, 2, 2)
    assert tucker.clip_ranks((96, 1, 7, 7), (16, 16, 2, 2), "none") == (16, 16, 2, 2)


@pytest.mark.parametrize(("ranks", "message"), [((2, 0), "1 or more"), ((2, -1), "1 or more"), ((2,), "2 modes")])
def test_clipping_rejects(ranks, message):
    with pytest.raises(ValueError, match=message):
        tucker.clip_ranks((4, 4), ranks)


@examples
@hypothesis.given(shape=sizes, data=st.data())
def test_parameter_count_is_the_number_of_entries(shape, data):
    ranks = [data.draw(st.integers(1, 7)) for _ in shape]
    core, factors = random_form(shape, ranks)
    assert tucker.parameter_count(shape, ranks) == core.numel() + sum(f.numel() for f in factors if f is not None)


def low_rank(shape, ranks, noise: float) -> torch.Tensor:
    tensor = torch.from_numpy(dense(*random_form(shape, ranks)))
    return tensor + noise * tensor.std() * torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("shape", "ranks"), [((9, 7), (3, 3)), ((8, 6, 5), (3, 2, 4)), ((12, 5, 3, 3), (4, 3, 2, 2))])
class TestDecompositions:
    def test_hosvd_takes_the_leading_singular_vectors(self, shape, ranks):
        tensor = low_rank(shape, ranks, noise=0.1)
        core, factors = tucker.hosvd(tensor, ranks)
        for mode, factor in enumerate(factors):
            left = np.linalg.svd(tensorly.unfold(tensor.numpy(), mode), full_matrices=False)[0][:, : ranks[mode]]
            np.testing.assert_allclose((factor @ factor.T).numpy(), left @ left.T, atol=1e-10)
        expected = tensorly.tenalg.multi_mode_dot(tensor.numpy(), [f.numpy().T for f in factors])
        np.testing.assert_allclose(core.numpy(), expected, atol=1e-10)

    def test_hooi_fits_as_well_as_tensorlys(self, shape, ranks):
        tensor = low_rank(shape, ranks, noise=0.5)
        fit = torch.linalg.norm(tensor - tucker.to_tensor(*tucker.hooi(tensor, ranks))).item()
        theirs = tensorly_tucker(tensor.numpy(), rank=list(ranks), init="svd", n_iter_max=50, tol=1e-10)
        assert fit == pytest.approx(np.linalg.norm(tensor.numpy() - tensorly.tucker_to_tensor(theirs)), rel=1e-6)

    def test_exact_at_the_true_ranks(self, shape, ranks):
        tensor = low_rank(shape, ranks, noise=0)
        for decompose in (tucker.hosvd, tucker.hooi):
            np.testing.assert_allclose(tucker.to_tensor(*decompose(tensor, ranks)).numpy(), tensor.numpy(), atol=1e-9)

    def test_energy_asks_for_the_ranks_numpy_finds(self, shape, ranks):
        tensor = low_rank(shape, ranks, noise=0.3)
        for energy in (0.5, 0.9, 0.99):
            expected = []
            for mode in range(len(shape)):
                spectrum = np.linalg.svd(tensorly.unfold(tensor.numpy(), mode), compute_uv=False) ** 2
                expected.append(next(r for r in range(1, 99) if spectrum[:r].sum() >= energy * spectrum.sum()))
            assert tucker.ranks_for_energy(tensor, energy) == tuple(expected)
        assert tucker.ranks_for_energy(low_rank(shape, ranks, noise=0), 1 - 1e-12) == tuple(ranks)

    def test_truncating_a_form_equals_decomposing_its_tensor(self, shape, ranks):
        core, factors = random_form(shape, [min(size, rank + 1) for size, rank in zip(shape, ranks, strict=True)])
        tensor = torch.from_numpy(dense(core, factors))
        short = tucker.truncate(core, factors, ranks)
        assert tuple(short[0].shape) == tuple(ranks)
        fit = torch.linalg.norm(tensor - torch.from_numpy(dense(*short)))
        best = torch.linalg.norm(tensor - tucker.to_tensor(*tucker.hooi(tensor, ranks)))
        assert fit.item() == pytest.approx(best.item(), rel=1e-6)


def test_subspace_wider_than_the_weight_is_completed():
    basis = tucker.leading_subspace(torch.randn(6, 1, 2, dtype=torch.float64), 0, 4)
    np.testing.assert_allclose((basis.T @ basis).numpy(), np.eye(4), atol=1e-12)


@pytest.mark.parametrize("energy", [0, -1, 1.5])
def test_energy_outside_its_range_is_rejected(energy):
    with pytest.raises(ValueError, match="energy"):
        tucker.ranks_for_energy(torch.ones(2, 2), energy)


@examples
@hypothesis.given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=5), parts=st.integers(1, 4), data=st.data())
def test_concatenation_is_the_exact_sum_at_ranks_no_larger_than_useful(shape, parts, data):
    forms = []
    for _ in range(parts):
        ranks = tucker.clip_ranks(shape, [data.draw(st.integers(1, 4)) for _ in shape])
        forms.append(random_form(shape, ranks))
    core, factors = tucker.concatenate(forms)
    total = sum(dense(*form) for form in forms)
    np.testing.assert_allclose(dense(core, factors), total, rtol=1e-9, atol=1e-9 * np.abs(total).max())
    summed = [sum(form[0].shape[mode] for form in forms) for mode in range(len(shape))]
    assert all(rank <= limit for rank, limit in zip(core.shape, summed, strict=True))
    assert tuple(core.shape) == tucker.clip_ranks(shape, core.shape)
    assert [factor is None for factor in factors] == [size == 1 for size in shape]


def test_contracting_in_this_order_is_cheap():
    """The largest intermediate of a convolution is the result itself."""
    shape, ranks = (256, 128, 7, 7), (16, 16, 2, 2)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        tucker.to_tensor(*random_form(shape, ranks))
    assert largest == math.prod(shape)
