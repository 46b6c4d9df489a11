"""Energy kept by each form, on tensors whose structure is known and against numpy."""

import numpy as np
import pytest
import torch

from flora.adapters.tucker import to_tensor
from flora.results.delta import energy_kept, matrix_energy, shuffle_kernel


def tucker(shape, ranks):
    return to_tensor(torch.randn(*ranks), [torch.randn(d, r) for d, r in zip(shape, ranks, strict=True)])


def test_a_change_of_low_tucker_rank_is_kept_whole_by_that_form_alone():
    kept = energy_kept("conv", tucker((24, 20, 5, 5), (4, 4, 1, 1)), r=4, kernel_rank=1)
    # 4 * 24 + 4 * 20 + 5 + 5 + 16 parameters; a rank of the flattened weight costs 24 + 20 * 25 = 524
    assert kept.params == 202
    assert kept.tucker == pytest.approx(1.0)
    assert kept.modes == pytest.approx((1.0,) * 4)
    assert kept.flattened < 0.6
    assert kept.shuffled < 0.9


def test_shuffling_moves_kernel_positions_and_changes_no_number():
    delta = torch.randn(3, 2, 3, 3)
    shuffled = shuffle_kernel(delta, seed=1)
    assert not torch.equal(shuffled, delta)
    positions = {tuple(column.tolist()) for column in delta.flatten(2).permute(2, 0, 1).flatten(1)}
    assert {tuple(column.tolist()) for column in shuffled.flatten(2).permute(2, 0, 1).flatten(1)} == positions


def test_the_matrix_form_against_numpy_with_a_fraction_of_a_rank():
    matrix = torch.randn(6, 4, dtype=torch.float64)
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    assert matrix_energy(matrix, 25) == pytest.approx((squares[0] + squares[1] + 0.5 * squares[2]) / squares.sum())
    assert matrix_energy(matrix, 1000) == pytest.approx(1.0)


def test_a_linear_layer_has_no_kernel_to_shuffle_and_modes_equal_the_matrix():
    delta = torch.randn(12, 10, dtype=torch.float64)
    kept = energy_kept("linear", delta, r=3, kernel_rank=2)
    squares = np.linalg.svd(delta.numpy(), compute_uv=False) ** 2
    assert kept.tucker == pytest.approx(squares[:3].sum() / squares.sum())
    assert kept.modes == pytest.approx((kept.tucker, kept.tucker))
    assert kept.shuffled is None
