"""flora_flat: exactly the modes are taken away."""

import numpy as np
import pytest

from flora.methods.rivals import FloraFlatConfig
from tests.methods.rivals.ablated import LAYERS, filled, update_of


@pytest.mark.parametrize("layer", LAYERS)
def test_flat_is_a_matrix_between_outputs_and_everything_else(layer):
    adapted, parts = filled(layer, FloraFlatConfig(scale=0.5, rank_pattern={"0": 3}))
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    assert [parts[key].shape for key in ("weight", "weight_0", "weight_1")] == [(3, 3), (rows, 3), (columns, 3)]
    expected = 0.5 * parts["weight_0"] @ parts["weight"] @ parts["weight_1"].T
    np.testing.assert_allclose(update_of(adapted), expected.reshape(layer.weight.shape), rtol=1e-4, atol=1e-5)
