"""Embedding an index, and ranking it: ours against a plain loop over the photographs, in one run.

    python benchmarks/bench_retrieval.py [--seconds 6] [--side 1200] [--threads 1] [--index 50000] [--names 20]

Plain is one photograph at a time, read at its full size with Pillow, through torchvision's transforms and the same network. Ours is
`embed_index` with its cache, from an empty one. Both read the demo world's photographs, enlarged to `--side` pixels on the longer side
(as a camera's or the web's are; with photographs of 320 px there is little to gain from reading less). The ranking is timed on
vectors that are made up. The memory is each process's, of which some 500 MB are PyTorch and the encoder.
"""
import argparse, multiprocessing, resource, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np, torch
from PIL import Image

from namedmask.core import UserError, list_photos
from namedmask.encoders import OfflineEncoder, lite0_classifier
from namedmask.retrieval import choose, embed_index


def make_photos(folder: Path, side: int, n: int = 96):
    "Write `n` photographs."
    try:
        from namedmask.demo import load_world
        world = load_world()
        photos = (Image.open(world.index / p) for p in world.photos[:n])
    except UserError:
        rng = np.random.default_rng(0)
        photos = (Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((320, 240)) for _ in range(n))
    for k, im in enumerate(photos):
        s = side / max(im.size)
        im.resize((round(im.width * s), round(im.height * s)), Image.Resampling.BICUBIC).save(folder / f"{k:03d}.jpg", quality=92)


def plain(folder: Path, seconds: float):
    "One at a time."
    from torchvision import transforms as T
    prepare = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(), T.Normalize([.5] * 3, [.5] * 3)])
    net, n, photos = lite0_classifier(), 0, sorted(folder.glob("*.jpg"))
    def embed(path):
        with torch.no_grad(): return net(prepare(Image.open(path).convert("RGB"))[None]).softmax(1).numpy()
    embed(photos[0])
    start = time.perf_counter()
    while time.perf_counter() - start < seconds: embed(photos[n % len(photos)]); n += 1
    return n / (time.perf_counter() - start)


def ours(folder: Path, seconds: float):
    "The stage's own function, again and again from an empty cache."
    encoder, n, photos = OfflineEncoder(), 0, list_photos(folder)[0]
    with tempfile.TemporaryDirectory() as cache:
        embed_index(encoder, folder, photos[:4], Path(cache) / "warm")
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            assert len(embed_index(encoder, folder, photos, Path(cache) / str(n)).photos) == len(photos)
            n += len(photos)
        speed = n / (time.perf_counter() - start)
        start = time.perf_counter()
        embed_index(encoder, folder, photos, Path(cache) / "0")
        return speed, len(photos) / (time.perf_counter() - start)


def measure(version, folder, seconds, threads):
    "Photographs a second and peak memory (MB) of one version, in a process of its own."
    torch.set_num_threads(threads)
    return dict(plain=plain, ours=ours)[version](folder, seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rank(n: int, names: int, seconds: float):
    "Photographs ranked a second: similarity and choice in one go against a loop over names and photographs."
    class Rule: tau, gap, margin, floor = OfflineEncoder.tau, OfflineEncoder.gap, OfflineEncoder.margin, OfflineEncoder.floor
    rng = np.random.default_rng(0)
    photos = rng.exponential(size=(n, 1000)).astype(np.float32) ** 3
    photos = (photos / photos.sum(1, keepdims=True)).astype(np.float16)
    words = rng.random((names, 1000), np.float32) ** 8
    def once():
        sims = OfflineEncoder.similarity(Rule, photos, words)
        return [choose(sims, i, 100, Rule) for i in range(names)]
    once()
    k, start = 0, time.perf_counter()
    while k == 0 or time.perf_counter() - start < seconds: once(); k += 1
    ours = k * n / (time.perf_counter() - start)
    few, start = photos[:min(n, 2000)], time.perf_counter()
    for w in words: sorted(range(len(few)), key=[float(1 + Rule.tau * np.log(w @ v.astype(np.float32) + 1e-12)) for v in few].__getitem__, reverse=True)[:100]
    return ours, len(few) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="how long each version runs, at least")
    parser.add_argument("--side", type=int, default=1200, help="longer side of the photographs, px")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--index", type=int, default=50_000, help="photographs to rank")
    parser.add_argument("--names", type=int, default=20, help="names to rank them for")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), args.side)
        print(f"embedding photographs of {args.side} px, PyTorch on {args.threads} thread{'s' * (args.threads > 1)}")
        print(f"{'version':34}{'photos/s':>10}{'peak MB':>9}{'ratio':>8}")
        for version in ("plain", "ours"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows[version] = pool.submit(measure, version, Path(folder), args.seconds, args.threads).result()
    (base, base_peak), ((speed, again), peak) = rows["plain"], rows["ours"]
    print(f"{'plain: one at a time':34}{base:10.1f}{base_peak:9.0f}{1:7.1f}×")
    print(f"{'namedmask, an empty cache':34}{speed:10.1f}{peak:9.0f}{speed / base:7.1f}×")
    print(f"{'namedmask, all in the cache':34}{again:10.0f}{peak:9.0f}{again / base:7.0f}×")
    torch.set_num_threads(args.threads)
    speed, base = rank(args.index, args.names, 1)
    print(f"ranking {args.index} photographs for {args.names} names")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'plain: a loop':34}{base:10.0f}{peak:9.0f}{1:7.1f}×\n{'namedmask':34}{speed:10.0f}{peak:9.0f}{speed / base:7.1f}×")


if __name__ == "__main__": main()
