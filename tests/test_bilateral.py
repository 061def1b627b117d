"Parity of the bilateral solver with reference outputs, and its behaviour on awkward input."
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from namedmask.bilateral import bilateral_solve, largest_component, make_grid

SHARED = Path(os.environ.get("NAMEDMASK_SHARED", Path(__file__).parents[2] / "shared"))
GOLDEN = SHARED / "golden" / "bilateral.npz"


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no reference outputs at {GOLDEN} (set NAMEDMASK_SHARED)")
@pytest.mark.parametrize("picture", ["astronaut", "chelsea", "coffee"])
def test_golden(picture):
    data = np.load(GOLDEN)
    image, target, soft, largest = (data[f"{picture}/{key}"] for key in ("image", "target", "soft", "largest"))
    ours = bilateral_solve(image, target)
    assert ours.dtype == np.float32 and ours.shape == soft.shape
    assert np.abs(ours - soft).max() < 1e-3
    assert ((ours > 0.5) == (soft > 0.5)).mean() >= 0.999
    assert (largest_component(ours > 0.5) == largest).mean() >= 0.999


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (37, 1), (5, 900), (64, 48)])
def test_any_shape(shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    target = (rng.random(shape) > 0.5).astype(np.float32)
    out = bilateral_solve(image, target)
    assert out.shape == shape and np.isfinite(out).all() and -0.1 <= out.min() and out.max() <= 1.1


def test_flat_picture_takes_the_mean_of_a_cell():
    target = np.zeros((16, 16)); target[:, :8] = 1
    out = bilateral_solve(np.full((16, 16, 3), 90, np.uint8), target)
    np.testing.assert_allclose(out, 0.5, atol=1e-5)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="target"): bilateral_solve(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4)))


def test_wide_pictures_have_no_collisions():
    "Cells whose numbers would coincide under a short hash stay apart."
    image = np.zeros((40, 6000, 3), np.uint8)
    grid = make_grid(torch.as_tensor(image))
    assert len(grid.mass) == 375 * 3
    assert int(grid.edges.values().sum()) == 2 * (374 * 3 + 375 * 2)


def test_largest_component():
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8], mask[3, 3], mask[10, 10] = True, False, True
    out = largest_component(mask)
    assert out[3, 3] and not out[10, 10] and out.sum() == 49
