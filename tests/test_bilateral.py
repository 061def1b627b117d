"Parity of the bilateral solver with reference outputs, and its behaviour on awkward input, in tensors and in loops."
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from namedmask import bilateral
from namedmask.bilateral import (TO_YUV, bilateral_solve, bilateral_solve_batch, conjugate_gradients, exact_codes, grid_coords,
                                 largest_component, make_grid, solve_compiled, solve_stacked)

SHARED = Path(os.environ.get("NAMEDMASK_SHARED", Path(__file__).parents[2] / "shared"))
GOLDEN = SHARED / "golden" / "bilateral.npz"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no reference outputs at {GOLDEN} (set NAMEDMASK_SHARED)")


def tensors(image, target, **kw): return solve_stacked([image], [target], **kw)[0]


both_ways = pytest.mark.parametrize("solve", [bilateral_solve, tensors, solve_compiled])   # without Numba the loops run uncompiled


def load_golden(picture):
    data = np.load(GOLDEN)
    return [data[f"{picture}/{key}"] for key in ("image", "target", "soft", "largest")]


def random_pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape, 3), dtype=np.uint8), (rng.random(shape) > 0.5).astype(np.float32)


@needs_golden
@both_ways
@pytest.mark.parametrize("picture", ["astronaut", "chelsea", "coffee"])
def test_golden(picture, solve):
    image, target, soft, largest = load_golden(picture)
    ours = solve(image, target)
    assert ours.dtype == np.float32 and ours.shape == soft.shape
    assert np.abs(ours - soft).max() < 1e-3
    assert ((ours > 0.5) == (soft > 0.5)).mean() >= 0.999
    assert (largest_component(ours > 0.5) == largest).mean() >= 0.999


@needs_golden
def test_golden_batch_of_unlike_sizes():
    golden = [load_golden(p) for p in ("astronaut", "chelsea", "coffee")]
    for solve in (solve_stacked, bilateral_solve_batch):
        for ours, (_, _, soft, _) in zip(solve([g[0] for g in golden], [g[1] for g in golden]), golden, strict=True):
            assert np.abs(ours - soft).max() < 1e-3


@both_ways
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (37, 1), (5, 900), (64, 48)])
def test_any_shape(shape, solve):
    image, target = random_pair(shape)
    out = solve(image, target)
    assert out.shape == shape and np.isfinite(out).all() and -0.1 <= out.min() and out.max() <= 1.1


@pytest.mark.parametrize("sigma", [{}, dict(sigma_spatial=5), dict(sigma_luma=4, sigma_chroma=4),
                                   dict(sigma_spatial=24, sigma_luma=7.5, sigma_chroma=12)])
def test_loops_equal_tensors(sigma):
    for shape in ((70, 45), (16, 48), (33, 17)):
        image, target = random_pair(shape, shape[0])
        image[10:30, :20], image[:5] = 128, 48                                  # greys lie on the border of two cells
        np.testing.assert_allclose(solve_compiled(image, target, **sigma), tensors(image, target, **sigma), atol=1e-4)


def test_batch_equals_single():
    pairs = [random_pair(shape, k) for k, shape in enumerate([(40, 56), (40, 56), (17, 90), (1, 1)])]
    pairs.append((np.full((32, 32, 3), 90, np.uint8), np.ones((32, 32))))       # converged before its first step
    images, targets = zip(*pairs)
    for batch, single in ((solve_stacked, tensors), (bilateral_solve_batch, bilateral_solve)):
        for out, image, target in zip(batch(images, targets, lam=64.), images, targets, strict=True):
            np.testing.assert_allclose(out, single(image, target, lam=64.), atol=1e-4)
    assert solve_stacked([], []) == [] and bilateral_solve_batch([], []) == []
    with pytest.raises(ValueError): bilateral_solve_batch(images, targets[:2])


def test_every_system_converges_by_itself():
    "A hard system beside an easy one takes the steps it takes alone."
    torch.manual_seed(0)
    hard = torch.randn(30, 30).double()
    hard, easy = hard @ hard.T + torch.eye(30), torch.eye(4).double()
    A, b = torch.block_diag(easy, hard), torch.ones(34).double()
    together = conjugate_gradients(lambda v: A @ v, b, 0 * b, 1 / A.diagonal(), sizes=torch.tensor([4, 30]))
    alone = conjugate_gradients(lambda v: hard @ v, b[4:], 0 * b[4:], 1 / hard.diagonal())
    torch.testing.assert_close(together[4:], alone)
    torch.testing.assert_close(together[:4], b[:4])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    images, targets = zip(*[random_pair(shape, k) for k, shape in enumerate([(64, 48), (64, 48), (30, 80)])])
    for gpu, cpu in zip(bilateral_solve_batch(images, targets, device="cuda"), solve_stacked(images, targets), strict=True):
        np.testing.assert_allclose(gpu, cpu, atol=1e-3)


@both_ways
def test_flat_picture_takes_the_mean_of_a_cell(solve):
    target = np.zeros((16, 16)); target[:, :8] = 1
    np.testing.assert_allclose(solve(np.full((16, 16, 3), 90, np.uint8), target), 0.5, atol=1e-5)


@both_ways
@pytest.mark.parametrize("level", [0, 1])
def test_level_targets_stay(level, solve):
    image, _ = random_pair((40, 30))
    np.testing.assert_allclose(solve(image, np.full((40, 30), level, bool)), level, atol=1e-5)


@both_ways
def test_views_and_tensors(solve):
    image, target = random_pair((30, 44))
    straight = solve(image, target)
    padded = np.zeros((30, 44, 4), np.uint8); padded[..., :3] = image
    np.testing.assert_array_equal(solve(padded[..., :3], np.asfortranarray(target)), straight)
    np.testing.assert_array_equal(solve(np.ascontiguousarray(image[::-1])[::-1], target), straight)
    image.flags.writeable = False
    np.testing.assert_array_equal(solve(image, torch.as_tensor(target, dtype=torch.float64)), straight)
    np.testing.assert_array_equal(solve(torch.as_tensor(image.copy()).permute(2, 0, 1).contiguous().permute(1, 2, 0), target), straight)


@both_ways
def test_wrong_shapes_are_refused(solve):
    with pytest.raises(ValueError, match="target"): solve(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4)))
    for image in (np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5, 3)), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match="image"): solve(image, np.zeros(image.shape[:2]))


def test_wide_pictures_have_no_collisions():
    "Cells whose numbers would coincide under a short hash stay apart."
    image = np.zeros((40, 6000, 3), np.uint8)
    grid = make_grid(torch.as_tensor(image))
    assert len(grid.mass) == 375 * 3
    assert int(grid.edges.values().sum()) == 2 * (374 * 3 + 375 * 2)


def reference_cells(rgb):
    "(N, 3) cells in whole numbers, and whether luma is on a border: there a float's rounding decides."
    weights = np.round(TO_YUV.numpy() * 1e6).astype(np.int64)
    value, width = rgb.astype(np.int64) @ weights.T + np.array([0, 128, 128]) * 10**6, np.array([16, 8, 8]) * 10**6
    return value // width, value[:, 0] % width[0] == 0


@pytest.mark.skipif(bilateral.numba is None, reason="needs Numba to be quick")
@pytest.mark.parametrize("red", range(0, 256, 15))
def test_every_colour_has_its_exact_cell(red):
    image = np.stack([np.full((256, 256), red), *np.mgrid[:256, :256]], -1).astype(np.uint8)
    codes, n_luma, n_chroma = exact_codes(image)
    ours = np.stack([codes % n_luma, codes // n_luma % n_chroma, codes // n_luma // n_chroma], -1) - 1
    theirs, border = reference_cells(image.reshape(-1, 3))
    assert (ours[:, 1:] == theirs[:, 1:]).all() and (ours[~border] == theirs[~border]).all()
    assert (ours[:, 0] == grid_coords(torch.as_tensor(image))[2].numpy()).all()


def test_greys_have_exact_cells():
    image = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, 2)
    codes, n_luma, n_chroma = exact_codes(image)
    _, _, luma, u, v = (c.numpy() for c in grid_coords(torch.as_tensor(image)))
    assert (codes == 1 + luma + n_luma * (1 + u + n_chroma * (1 + v))).all() and (u == 16).all() and (v == 16).all()


def test_largest_component():
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8], mask[3, 3], mask[10, 10] = True, False, True
    out = largest_component(mask)
    assert out[3, 3] and not out[10, 10] and out.sum() == 49
