"""Energy kept by each form, on tensors whose structure is known and against numpy."""

import numpy as np
import pytest
import torch

from flora.adapters.tucker import to_tensor
from flora.errors import DataError
from flora.results import energy
from flora.results.delta import energy_kept, matrix_energy, shuffle_kernel
from flora.results.plots import written_hash


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


def test_energies_are_means_over_layers_then_over_runs(tmp_path):
    head = "layer,shape,params,tucker,flattened,shuffled,modes,dataset,model,r,kernel_rank\n"
    for run, shares in (("a", ("0.8", "0.6")), ("b", ("0.9", "0.5"))):
        lines = [f"l{i},8x4x3x3,9,{share},0.5,0.4,,eurosat,net,8,2\n" for i, share in enumerate(shares)]
        lines += ["dw,8x1x3x3,9,0.3,0.2,0.1,,eurosat,net,8,2\n", "fc,8x4x1x1,9,0.7,0.7,,,eurosat,net,8,2\n"]
        (tmp_path / f"delta_{run}.csv").write_text(head + "".join(lines))
    measured = energy.read(tmp_path)
    convolution = [kept for kept in measured if kept.kind == "convolution"]
    assert [kept.shares["tucker"] for kept in convolution] == pytest.approx([0.7, 0.7])
    assert energy.over_runs(convolution, "shuffled") == pytest.approx((0.4, 0.0))
    text = energy.markdown(measured)
    row = "| net | convolution | r = 8, kernel rank 2 | 2 | 2 | eurosat | 0.7000 ± 0.0000 | 0.5000 ± 0.0000 |"
    assert row in text
    assert "| net | linear | r = 8, kernel rank 2 | 1 | 2 | eurosat | 0.7000 ± 0.0000 | 0.7000 ± 0.0000 | - |" in text
    plot = energy.plot(measured)
    plot.write(tmp_path / plot.name)
    assert (plot.name, written_hash(tmp_path / plot.name)) == ("energy.svg", plot.hash)


def test_a_file_that_analyze_delta_did_not_write_is_named(tmp_path):
    (tmp_path / "delta_x.csv").write_text("layer\nstem\n")
    with pytest.raises(DataError, match=r"delta_x\.csv: not what analyze_delta\.py writes"):
        energy.read(tmp_path)
