"""The GPU kernel against float64; without a GPU it runs in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "flora" / "adapters" / "kernels.py"
# layers, rows, rank, columns, dtype of the weights, dtype of the result
CASES = [
    (3, 50, 4, 49, torch.float32, torch.bfloat16),  # depthwise 7 x 7: nothing divides anything
    (2, 64, 16, 304, torch.float32, torch.float32),
    (2, 40, 17, 128, torch.bfloat16, torch.bfloat16),
    (1, 33, 1, 1, torch.float32, torch.float16),
]


def check(device: str) -> None:
    """Each case against the same sum in float64, rounded once; not nearer than the dtype can be told apart."""
    spec = importlib.util.spec_from_file_location("kernels", KERNELS)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    torch.manual_seed(0)
    for layers, rows, rank, columns, stored, result in CASES:
        bases = [torch.randn(rows, columns, device=device).to(stored) for _ in range(layers)]
        left, right = (torch.randn(layers, *s, device=device) for s in ((rows, rank), (rank, columns)))
        expected = torch.stack(bases).double() + 0.5 * left.double() @ right.double()
        found = kernels.add_products(bases, left, right, 0.5, result)
        assert found.dtype == result
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(result).eps, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_are_added_on_the_gpu():
    check("cuda")


def test_products_are_added_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA and ROCm only")
    # The interpreter is chosen when Triton is imported, so by a process of its own.
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    check("cpu")
