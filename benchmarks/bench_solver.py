"""The bilateral solver against a plain SciPy formulation: images a second, peak memory, and the ratio.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/bench_solver.py [--size 683 512] [--images 6] [--repeats 5]
                                                                     [--device cpu] [--photos DIR]

The baseline does the published steps in the straightforward way: float64, `np.unique` over the hashes of five coordinates,
a sparse matrix for splatting and one for each dimension of the blur (neighbours by binary search), sparse products for the
bistochastised matrix, and `scipy.sparse.linalg.cg` with the Jacobi preconditioner. Pictures are photographs of the demo
world, or those of a folder, resized; the targets are rough masks. All ways work on the same pictures, taking turns. A time
is the median over repeats of the processor's seconds (`time.process_time`); wall time stands beside it.
"""
import argparse, resource, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import sparse
from scipy.sparse.linalg import cg

from namedmask.bilateral import TO_YUV, bilateral_solve, bilateral_solve_batch, numba, solve_stacked


def plain_grid(image, sigma=(16, 16, 16, 8, 8)):
    "The splat matrix, and the neighbour matrix of every dimension."
    h, w, _ = image.shape
    yuv = np.tensordot(image, TO_YUV.numpy(), ([2], [1])) + [0, 128, 128]
    y, x = np.mgrid[:h, :w]
    coords = np.dstack([(c / s).astype(int) for c, s in zip([x, y, *np.moveaxis(yuv, 2, 0)], sigma)]).reshape(-1, 5)
    powers = 255 ** np.arange(5)
    cells, first, vertex = np.unique(coords @ powers, return_index=True, return_inverse=True)
    occupied, n = coords[first], len(cells)
    splat = sparse.csr_matrix((np.ones(h * w), (vertex, np.arange(h * w))))
    blurs = []
    for axis in range(5):
        both = 0.
        for step in (-1, 1):
            shift = np.zeros((1, 5)); shift[0, axis] = step
            wanted = (occupied + shift) @ powers
            place = np.clip(np.searchsorted(cells, wanted), 0, n - 1)
            there = np.flatnonzero(cells[place] == wanted)
            both = both + sparse.csr_matrix((np.ones(len(there)), (there, place[there])), (n, n))
        blurs.append(both)
    return splat, blurs


def plain_solve(image, target, lam=256., confidence=0.999):
    h, w, _ = image.shape
    splat, blurs = plain_grid(image)
    def blur(x):
        out = 10 * x
        for b in blurs: out = out + b @ x
        return out
    mass = splat @ np.ones(h * w)
    scale = np.ones(len(mass))
    for _ in range(10): scale = np.sqrt(scale * mass / blur(scale))
    m, n = sparse.diags(scale * blur(scale)), sparse.diags(scale)
    c = np.full(h * w, confidence)
    weight, b = splat @ c, splat @ (c * target.reshape(-1).astype(float))
    A = lam * (m - n @ blur(n)) + sparse.diags(weight)
    jacobi = sparse.diags(1 / np.maximum(A.diagonal(), 1e-5))
    try: x, _ = cg(A, b, x0=b / weight, M=jacobi, maxiter=25, rtol=1e-5)
    except TypeError: x, _ = cg(A, b, x0=b / weight, M=jacobi, maxiter=25, tol=1e-5)   # SciPy before 1.12
    return (splat.T @ x).reshape(h, w)


def pictures(folder, size, n):
    "Photographs resized, each with its rough mask: the true outline of the demo world on a coarse grid, or an ellipse."
    if folder is None:
        from namedmask.demo import load_world
        world = load_world()
        names = world.photos[::max(1, len(world.photos) // n)][:n]
        found = [(world.index / name, Image.fromarray(world.truth(name) > 0)) for name in names]
    else:
        y, x = np.mgrid[-1:1:48j, -1:1:64j]
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
        found = [(p, Image.fromarray(np.hypot(x, y) < .6)) for p in paths[::max(1, len(paths) // n)][:n]]
    for path, mask in found:
        image = Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR)
        mask = mask.resize((32, 24), Image.Resampling.BOX).resize(size, Image.Resampling.NEAREST)
        yield np.asarray(image), np.asarray(mask, np.float32)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--size", type=int, nargs=2, default=(683, 512), metavar=("W", "H"))
    args.add_argument("--images", type=int, default=6)
    args.add_argument("--repeats", type=int, default=5)
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--device", default="cpu")
    args.add_argument("--photos", metavar="DIR", help="a folder of photographs (default: those of the demo world)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    data = list(pictures(args.photos, tuple(args.size), args.images))
    ways = {"plain SciPy": plain_solve, "tensors": lambda i, t: solve_stacked([i], [t], device=args.device)[0],
            "namedmask": lambda i, t: bilateral_solve(i, t, device=args.device)}
    spent, answers, peak = {name: [] for name in ways}, {}, {}
    for name in reversed(ways):                              # compile, and fill caches; memory only grows, so the thriftiest comes first
        answers[name] = [ways[name](*pair) for pair in data]
        peak[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(args.repeats):
        for name, solve in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for pair in data: solve(*pair)
            spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    spent = {name: np.median(times, 0) / len(data) for name, times in spent.items()}
    print(f"{len(data)} photographs of {args.size[0]}x{args.size[1]}, {args.threads} thread(s), {args.device}, "
          f"Numba {getattr(numba, '__version__', 'is not installed')}")
    for name, (cpu, wall) in spent.items():
        ratio = spent["plain SciPy"] / (cpu, wall)
        error = max(np.abs(a - b).max() for a, b in zip(answers[name], answers["plain SciPy"]))
        print(f"{name:12} {1 / wall:7.1f} images/s   cpu {cpu * 1e3:6.1f} ms  wall {wall * 1e3:6.1f} ms an image   "
              f"ratio cpu {ratio[0]:5.1f}  wall {ratio[1]:5.1f}   peak memory so far {peak[name]:.0f} MB   largest difference {error:.1e}")
    if args.device != "cpu":
        images, targets = zip(*data)
        start = time.perf_counter()
        for _ in range(args.repeats): bilateral_solve_batch(images, targets, device=args.device)
        wall = (time.perf_counter() - start) / args.repeats / len(data)
        print(f"batch of {len(data):3} {1 / wall:7.1f} images/s   wall {wall * 1e3:6.1f} ms an image   "
              f"ratio wall {spent['plain SciPy'][1] / wall:5.1f}")


if __name__ == "__main__": main()
