"""Embedding an index, and ranking it: ours against a plain loop over the photographs, in one run.

    python benchmarks/bench_retrieval.py [--seconds 6] [--side 1200] [--threads 1] [--index 50000] [--names 20] [--rows 1281167]

Plain is one photograph at a time, read at its full size with Pillow, through torchvision's transforms and the same network. Ours is
`embed_index` with its cache, from an empty one. Both read the demo world's photographs, enlarged to `--side` pixels on the longer side
(as a camera's or the web's are; with photographs of 320 px there is little to gain from reading less). The ranking is timed on
vectors that are made up. The memory is each process's, of which some 500 MB are PyTorch and the encoder.

The last part is the paper's size: the 500 most similar of 1.28 million photographs for each of 80 names, from vectors of width 768 that are
made up and mapped from a file (2 GB in the temporary folder, removed at the end; `--rows`, or NAMEDMASK_BENCH_ROWS, makes it smaller, and 0
leaves it out). Plain is the same from a file read whole, made float32, multiplied at once, and sorted; as that takes 7 GB, it gets an eighth
of the rows. The memory of this part is what comes on top of the process before it.
"""
import argparse, multiprocessing, os, resource, shutil, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np, torch
from PIL import Image

from namedmask.core import UserError, list_photos, write_json
from namedmask.encoders import ClipEncoder, OfflineEncoder, lite0_classifier
from namedmask.retrieval import choose, embed_index, top_n


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
    class Rule(OfflineEncoder):
        def __init__(self): pass
    rng = np.random.default_rng(0)
    photos = rng.exponential(size=(n, 1000)).astype(np.float32) ** 3
    photos = (photos / photos.sum(1, keepdims=True)).astype(np.float16)
    words = rng.random((names, 1000), np.float32) ** 8
    def once():
        sims = Rule().similarity(photos, words)
        return [choose(sims, i, 100, Rule) for i in range(names)]
    once()
    k, start = 0, time.perf_counter()
    while k == 0 or time.perf_counter() - start < seconds: once(); k += 1
    ours = k * n / (time.perf_counter() - start)
    few, start = photos[:min(n, 2000)], time.perf_counter()
    for w in words: sorted(range(len(few)), key=[float(1 + Rule.tau * np.log(w @ v.astype(np.float32) + 1e-12)) for v in few].__getitem__, reverse=True)[:100]
    return ours, len(few) / (time.perf_counter() - start)


class Clip(ClipEncoder):
    "CLIP without its network."
    name, dim = "clip", 768
    def __init__(self): pass


def unit(rng, *shape):
    "Vectors of length 1."
    x = rng.random(shape, np.float32) - np.float32(.5)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def names_of(rows: int): return [f"train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(rows)]


def write_vectors(folder: Path, rows: int):
    "A cache as `embed_index` leaves it, of photographs that are not there."
    rng = np.random.default_rng(0)
    (folder / "clip").mkdir()
    out = np.lib.format.open_memmap(folder / "clip" / "000000.npy", "w+", np.float16, (rows, 768))
    for a in range(0, rows, 65_536): out[a:a + 65_536] = unit(rng, min(65_536, rows - a), 768)
    write_json(folder / "clip" / "000000.json", dict(signatures=[f"{p}|gone" for p in names_of(rows)], skipped={}))


def peak() -> float:
    "The most memory (MB) that this process has held; `ru_maxrss` also counts the one that started it."
    try: return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def paper(version: str, folder: Path, rows: int, names: int, n: int, threads: int):
    "Seconds, seconds of processor time, and further memory (MB) of one version, in a process of its own."
    torch.set_num_threads(threads)
    words, file, clip = unit(np.random.default_rng(1), names, 768), folder / "clip" / "000000.npy", Clip()
    top_n(clip, words.astype(np.float16), words, 5)                        # libraries are loaded, threads started
    before, cpu = peak(), time.process_time()
    if version == "read":
        photos, start = names_of(rows), time.perf_counter()
        index = embed_index(clip, folder / "photos", photos, folder)
        assert len(index.photos) == rows and (rows < 200_000 or isinstance(index.vectors, np.memmap))
    if version == "ours":
        vectors, start = np.load(file, mmap_mode="r"), time.perf_counter()
        got, best = top_n(clip, vectors, words, n)
    if version == "plain":
        rows, start = rows // 8, time.perf_counter()
        vectors = np.fromfile(file, np.float16, rows * 768, offset=128).reshape(rows, 768).astype(np.float32)
        [row[:n] for row in np.argsort(-(words @ vectors.T), axis=1, kind="stable")]
    seconds, cpu, extra = time.perf_counter() - start, time.process_time() - cpu, peak() - before
    if version == "ours":                                                  # in float64, for a sample of the names
        some = words[:3].astype(float)
        exact = np.concatenate([some @ np.array(vectors[a:a + 16_384], float).T for a in range(0, rows, 16_384)], 1)
        for s, r in zip(exact, got):
            assert len(set(r)) == min(n, rows) and (np.diff(s[r]) < 1e-6).all() and (len(r) == rows or np.delete(s, r).max() < s[r].min() + 1e-6)
    return rows, seconds, cpu, extra


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="how long each version runs, at least")
    parser.add_argument("--side", type=int, default=1200, help="longer side of the photographs, px")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--index", type=int, default=50_000, help="photographs to rank")
    parser.add_argument("--names", type=int, default=20, help="names to rank them for")
    parser.add_argument("--rows", type=int, default=int(os.environ.get("NAMEDMASK_BENCH_ROWS", 1_281_167)), help="photographs of the paper's size")
    parser.add_argument("--only-paper", action="store_true", help="leave out all but the paper's size")
    args = parser.parse_args()
    if not args.only_paper: small(args)
    if args.rows: large(args)


def large(args):
    "The paper's size."
    rows, free = args.rows, shutil.disk_usage(tempfile.gettempdir()).free
    if rows * 768 * 2 > .8 * free: rows = int(.8 * free) // (768 * 2); print(f"the temporary folder has room for {rows} rows only")
    with tempfile.TemporaryDirectory() as folder:
        write_vectors(Path(folder), rows)
        told = {}
        for version in ("read", "plain", "ours"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                told[version] = pool.submit(paper, version, Path(folder), rows, 80, 500, args.threads).result()
    print(f"the 500 best of {rows} photographs for 80 names, vectors of width 768 in a file, PyTorch on {args.threads} thread{'s' * (args.threads > 1)}")
    print(f"{'version':34}{'photos/s':>10}{'seconds':>9}{'of CPU':>9}{'more MB':>9}{'ratio':>8}")
    base = told["plain"][0] / told["plain"][1]
    for version, text in ("plain", "plain: all at once, sorted"), ("ours", "namedmask"), ("read", "namedmask, opening the cache"):
        n, seconds, cpu, extra = told[version]
        print(f"{text:34}{n / seconds:10.0f}{seconds:9.2f}{cpu:9.2f}{extra:9.0f}" + (f"{n / seconds / base:7.1f}×" if version != "read" else ""))
    print("exact: equal to float64 over all photographs, for 3 of the names")


def small(args):
    "Embedding, and ranking a small index."
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
