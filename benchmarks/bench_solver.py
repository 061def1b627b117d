"""The bilateral solver against a plain SciPy formulation: images a second, peak memory, and the ratio.

    python benchmarks/bench_solver.py [--size 683 512] [--images 5] [--threads 1]

The baseline does the same steps in the straightforward way: float64, `np.unique` over hashed coordinates, a sparse
matrix for splatting and for each direction of the blur, and `scipy.sparse.linalg.cg`.
"""
import argparse, resource, time

import numpy as np
import torch
from PIL import Image
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg

from namedmask.bilateral import TO_YUV, bilateral_solve


def plain_solve(image, target, lam=256., confidence=0.999, sigma=(16, 16, 16, 8, 8)):
    h, w, _ = image.shape
    y, x = np.mgrid[:h, :w]
    yuv = np.tensordot(image, TO_YUV.numpy(), ([2], [1])) + [0, 128, 128]
    coords = (np.dstack([x, y, yuv]) / sigma).astype(int).reshape(-1, 5)
    base = 1 + coords.max() + 1
    powers = base ** np.arange(5)
    cells, first, vertex = np.unique(coords @ powers, return_index=True, return_inverse=True)
    n = len(cells)
    splat = sparse.csr_matrix((np.ones(h * w), (vertex, np.arange(h * w))), (n, h * w))
    blur = 10 * sparse.identity(n, format="csr")
    for axis in range(5):
        for step in (-1, 1):
            wanted = coords[first].copy()
            wanted[:, axis] += step
            hashed = wanted @ powers
            place = np.clip(np.searchsorted(cells, hashed), 0, n - 1)
            there = np.flatnonzero((cells[place] == hashed) & (wanted[:, axis] >= 0))
            blur = blur + sparse.csr_matrix((np.ones(len(there)), (there, place[there])), (n, n))
    mass, scale = splat @ np.ones(h * w), np.ones(n)
    for _ in range(10): scale = np.sqrt(scale * mass / (blur @ scale))
    m = scale * (blur @ scale)
    smooth = sparse.diags(m) - sparse.diags(scale) @ blur @ sparse.diags(scale)
    c = splat @ np.full(h * w, confidence)
    b = splat @ (confidence * target.reshape(-1).astype(float))
    A = lam * smooth + sparse.diags(c)
    inverse = 1 / np.maximum(A.diagonal(), 1e-5)
    try: x, _ = cg(A, b, x0=b / c, M=LinearOperator((n, n), lambda v: inverse * v), maxiter=25, rtol=1e-5)
    except TypeError: x, _ = cg(A, b, x0=b / c, M=LinearOperator((n, n), lambda v: inverse * v), maxiter=25, tol=1e-5)
    return (splat.T @ x).reshape(h, w)


def picture(size, seed):
    "A photograph-like picture of smooth patches, gradients and texture, and a rough mask."
    rng, (w, h) = np.random.default_rng(seed), size
    im = sum(np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC), float) * a
             for n, a in ((4, .5), (12, .3), (60, .2)))
    y, x = np.mgrid[-1:1:h * 1j, -1:1:w * 1j]
    return im.clip(0, 255).astype(np.uint8), (np.hypot(x, y) < .6).astype(np.float32)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--size", type=int, nargs=2, default=(683, 512), metavar=("W", "H"))
    args.add_argument("--images", type=int, default=5)
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--device", default="cpu")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    data, rows = [picture(tuple(args.size), k) for k in range(args.images)], {}
    for name, solve in (("namedmask", lambda i, t: bilateral_solve(i, t, device=args.device)), ("plain SciPy", plain_solve)):
        out = [solve(*data[0])]
        start = time.perf_counter()
        for image, target in data: out.append(solve(image, target))
        rows[name] = args.images / (time.perf_counter() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, out[-1]
        print(f"{name:12} {rows[name][0]:7.2f} images/s   peak memory so far {rows[name][1]:.0f} MB")
    ours, theirs = rows.values()
    print(f"ratio        {ours[0] / theirs[0]:7.1f}            largest difference {np.abs(ours[2] - theirs[2]).max():.1e}")


if __name__ == "__main__": main()
