"""Pseudo-masks a second: `save_saliency` against one photograph at a time with dense, exact and general methods, in one run.

    python benchmarks/bench_saliency.py [--seconds 8] [--side 640] [--threads 1]

Plain reads a photograph at its full size, sends it through the same network alone, takes the generalised eigenvectors from
`torch.linalg.eigh` of the whole matrix, refines the mask with the bilateral solver as bench_solver.py formulates it with SciPy, and
writes it. Once it makes the masks that ours makes, from ten eigenvectors and the choice among their thresholds; and once it does less,
as published: the second eigenvector, cut at its mean. The photographs are the demo world's, enlarged to `--side` pixels on the longer side.
"""
import argparse, multiprocessing, resource, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np, torch
import torch.nn.functional as F
from PIL import Image

from namedmask.core import list_photos, mask_file, read_photo, write_mask
from namedmask.encoders import lite0_classifier
from namedmask.saliency import save_saliency
from namedmask.spectral import (SpectralDetector, affinity, best_mask, biased_cut, border_contrast, patch_similarity, resize_soft, slow_modes, stage_maps,
                                to_batch, working_size)

sys.path.insert(0, str(Path(__file__).parent))
from bench_retrieval import make_photos
from bench_solver import plain_solve


def dense(weights, k=1):
    "The generalised eigenvectors of one graph, (1, N, N), after the constant one, exactly: values (1, k), vectors (1, N, k)."
    scale = weights.sum(-1, keepdim=True).rsqrt()
    values, vectors = torch.linalg.eigh(torch.eye(weights.shape[-1]) - scale * weights * scale.mT)
    return values[:, 1:k + 1], (scale * vectors)[..., 1:k + 1]


def plain(folder: Path, out: Path, seconds: float, same: bool):
    "One at a time: the second eigenvector cut at its mean, or (`same`) ten of them and our choice among the masks they give."
    net, n, photos = lite0_classifier(), 0, list_photos(folder)[0]
    def one(photo):
        im = read_photo(folder / photo)
        maps, head = stage_maps(net, to_batch([im]))
        similarity = patch_similarity(maps)
        weights = affinity(similarity)
        values, modes = dense(weights, 10 if same else 1)
        cut = biased_cut(weights, values, modes, border_contrast(similarity, maps[-1])) if same else modes[..., 0]
        cut = F.interpolate(cut.view(1, 1, 24, 24), size=(96, 96), mode="bicubic")[0, 0].numpy()
        if same: mask = best_mask(net, head[0], cut)
        else: mask = cut * np.sign(cut.flat[np.abs(cut).argmax()]) > cut.mean()
        size = working_size(im.size, 192)
        solved = plain_solve(np.asarray(im.resize(size)), resize_soft(mask, size), 64.) > 0.5
        write_mask(mask_file(out, photo), np.asarray(Image.fromarray(solved).resize(im.size, Image.Resampling.NEAREST)))
    one(photos[0])
    start = time.perf_counter()
    while time.perf_counter() - start < seconds: one(photos[n % len(photos)]); n += 1
    return n / (time.perf_counter() - start)


def ours(folder: Path, out: Path, seconds: float):
    "The stage's own function, a few batches at a time, into empty folders."
    detector, n, photos = SpectralDetector("cpu"), 0, list_photos(folder)[0][:32]
    save_saliency(photos[:8], folder, out / "warm", detector)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        assert save_saliency(photos, folder, out / str(n), detector) == []
        n += len(photos)
    return n / (time.perf_counter() - start)


def cuts(threads: int):
    "The cut alone: graphs a second of subspace iteration in batches of 8, and of the dense solver."
    torch.set_num_threads(threads)
    x = torch.randn(8, 576, 40, generator=torch.Generator().manual_seed(0))
    weights = affinity(F.normalize(x + 3 * x[:, :1], dim=-1) @ F.normalize(x + 3 * x[:, :1], dim=-1).mT)
    speeds = []
    for solve, graphs in ((lambda w: slow_modes(w), weights), (dense, weights[:1])):
        solve(graphs)
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < 1.5: solve(graphs); n += len(graphs)
        speeds.append(n / (time.perf_counter() - start))
    return speeds


def measure(version, folder, seconds, threads):
    "Photographs a second and peak memory (MB) of one version, in a process of its own."
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as out:
        speed = ours(folder, Path(out), seconds) if version == "ours" else plain(folder, Path(out), seconds, same=version == "plain")
    return speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="how long each version runs, at least")
    parser.add_argument("--side", type=int, default=640, help="longer side of the photographs, px")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    args = parser.parse_args()
    print(f"photographs of {args.side} px to masks on disk, PyTorch on {args.threads} thread{'s' * (args.threads > 1)}")
    print(f"{'version':44}{'photos/s':>10}{'peak MB':>9}{'ratio':>8}")
    base = None
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), args.side)
        for version, what in dict(plain="plain: one at a time, dense eigh, SciPy", ours="namedmask, batches of 8", less="plain, second eigenvector only: less work").items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                speed, peak = pool.submit(measure, version, Path(folder), args.seconds, args.threads).result()
            base = base or speed
            print(f"{what:44}{speed:10.2f}{peak:9.0f}{speed / base:7.1f}×", flush=True)
    fast, slow = cuts(args.threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'  the cut alone, torch.linalg.eigh':44}{slow:10.1f}{peak:9.0f}{1:7.1f}×\n{'  the cut alone, ten modes, subspace iteration':44}{fast:10.1f}{peak:9.0f}{fast / slow:7.1f}×")


if __name__ == "__main__": main()
