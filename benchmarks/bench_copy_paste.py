"""Training samples a second: the copy-paste set against a plain Pillow and torchvision version of the same recipe, in one run, on one core.

    python benchmarks/bench_copy_paste.py [--seconds 5] [--side 400] [--crop 384]

Every sample has exactly two things. The photographs are those of the demo world, enlarged to `--side` pixels on the longer
side; where the demo world cannot be had, they are made up. The plain version decodes from disk for every sample, as the
published implementation does; ours is measured without a cache, and with one. The ratio is of samples per second of CPU time,
so that a busy machine does not change it; the memory is the process's, of which some 800 MB are PyTorch itself.
"""
import argparse, multiprocessing, random, resource, tempfile, time
from pathlib import Path

import numpy as np, torch
from PIL import Image, ImageFilter
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from namedmask.core import UserError, mask_file, read_mask, write_mask
from namedmask.copy_paste import Augment, CopyPaste, Item


def make_photos(folder: Path, side: int, n: int = 40) -> list[Item]:
    "Write `n` photographs with masks."
    try:
        from namedmask.demo import load_world
        world = load_world()
        names = [p for p in world.photos if world.kind(p)][:n]
        pairs = [(Image.open(world.index / p), world.truth(p) > 0) for p in names]
    except UserError:
        rng = np.random.default_rng(0)
        yy, xx = np.mgrid[:300, :400]
        pairs = [(Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC),
                  ((yy - rng.integers(80, 220)) / 70)**2 + ((xx - rng.integers(100, 300)) / 90)**2 < 1) for _ in range(n)]
    items = []
    for k, (im, mask) in enumerate(pairs):
        s = side / max(im.size)
        size = round(im.width * s), round(im.height * s)
        im.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(folder / f"{k}.jpg", quality=92)
        write_mask(mask_file(folder, f"{k}.jpg"), np.asarray(Image.fromarray(mask).resize(size)))
        items.append(Item(folder / f"{k}.jpg", mask_file(folder, f"{k}.jpg"), 1 + k % 8))
    return items


class Plain:
    "The recipe as one would write it down first: Pillow pictures, torchvision's transforms, everything at full size."
    def __init__(self, items, crop):
        self.items, self.crop = items, crop
        self.jitter = T.RandomApply([T.ColorJitter(.8, .8, .8, .2)], .8)
        self.grey = T.RandomGrayscale(.2)

    def augmented(self):
        item = random.choice(self.items)
        im = Image.open(item.photo).convert("RGB")
        mask = Image.fromarray(read_mask(item.mask).astype(np.uint8) * item.label)
        s = random.uniform(.1, 1.)
        size = max(1, round(im.height * s)), max(1, round(im.width * s))
        im, mask = TF.resize(im, size), TF.resize(mask, size, T.InterpolationMode.NEAREST)
        dx, dy = max(0, self.crop - im.width), max(0, self.crop - im.height)
        left, top = random.choice((0, dx)), random.choice((0, dy))
        fill = tuple(int(v) for v in np.asarray(im).mean((0, 1)))
        im, mask = TF.pad(im, [left, top, dx - left, dy - top], fill), TF.pad(mask, [left, top, dx - left, dy - top], 255)
        where = T.RandomCrop.get_params(im, (self.crop, self.crop))
        im, mask = TF.crop(im, *where), TF.crop(mask, *where)
        if random.random() < .5: im, mask = TF.hflip(im), TF.hflip(mask)
        im = self.grey(self.jitter(im))
        if random.random() < .5: im = im.filter(ImageFilter.GaussianBlur(random.uniform(.1, 2.)))
        return np.array(im), np.array(mask), item.label

    def sample(self):
        (image, labels, _), (other, other_labels, label) = self.augmented(), self.augmented()
        ys, xs = np.nonzero(other_labels == label)
        if len(ys):
            box = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
            thing = other_labels[box] == label
            y, x = (random.randint(0, self.crop - n) for n in thing.shape)
            spot = slice(y, y + thing.shape[0]), slice(x, x + thing.shape[1])
            image[spot][thing] = other[box][thing]
            labels[spot][thing] = label
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(labels)


def measure(version: str, items: list[Item], crop: int, seconds: float, result):
    "Samples a second and peak memory (MB) of one version, in a process of its own."
    torch.set_num_threads(1)
    random.seed(0)
    rng = np.random.default_rng(0)
    if version == "plain": sample = Plain(items, crop).sample
    else:
        ds = CopyPaste(items, Augment(crop=crop), cache_bytes=0 if version == "no cache" else 2**29)
        sample = lambda: ds.sample(2, rng)
    for _ in range(50): sample()
    n, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds: sample(); n += 1
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    result.put((n / wall, n / cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="how long each version runs")
    parser.add_argument("--side", type=int, default=400, help="longer side of the photographs, px")
    parser.add_argument("--crop", type=int, default=384, help="side of a sample, px")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        items = make_photos(Path(folder), args.side)
        print(f"two things a sample, {args.crop} px, photographs of {args.side} px, one process on one core")
        print(f"{'version':34}{'samples/s':>10}{'per CPU s':>11}{'peak MB':>9}{'ratio':>7}")
        context, plain = multiprocessing.get_context("spawn"), None
        versions = {"plain": "plain Pillow and torchvision", "no cache": "namedmask, decoding every time",
                    "cache": "namedmask, photographs cached"}
        for version, what in versions.items():
            result = context.Queue()
            process = context.Process(target=measure, args=(version, items, args.crop, args.seconds, result))
            process.start()
            speed, cpu, peak = result.get()
            process.join()
            plain = plain or cpu
            print(f"{what:34}{speed:10.0f}{cpu:11.0f}{peak:9.0f}{cpu / plain:6.1f}×", flush=True)


if __name__ == "__main__": main()
