"""Pseudo-masks a second: `save_saliency` against one photograph at a time with plain methods, in one run; for both detectors.

    python benchmarks/bench_saliency.py [--only spectral|selfmask] [--seconds 8] [--side 640] [--threads 1]
                                        [--photos 8] [--shorter 512] [--bs 8] [--device auto]

**Spectral.** Plain reads a photograph at its full size, sends it through the same network alone, takes the generalised eigenvectors
from `torch.linalg.eigh` of the whole matrix, refines the mask with the bilateral solver as bench_solver.py formulates it with SciPy,
and writes it. Once it makes the masks that ours makes, from ten eigenvectors and the choice among their thresholds; and once it does
less, as published: the second eigenvector, cut at its mean. The photographs are the demo world's, enlarged to `--side` pixels on the
longer side.

**SelfMask**, on `--photos` of the same photographs at `--shorter` pixels, with weights from a fixed seed (speed does not depend on
them). Plain is the network as the paper tells it, in plain products of matrices: a photograph is read and prepared, goes alone and in
float32 through the network, which enlarges all features and all twenty masks; then SciPy's solver; then the mask is written; then
comes the next. Ours is `save_saliency` with `SelfMaskDetector`, one by one and in batches. "network/s" is the network alone. At the
end the masks are compared, photograph by photograph.
"""
import argparse, multiprocessing, resource, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np, torch
import torch.nn.functional as F
from PIL import Image

from torch import nn

from namedmask.core import list_photos, mask_file, pick_device, read_mask, read_photo, write_mask
from namedmask.encoders import lite0_classifier
from namedmask.saliency import save_saliency
from namedmask.selfmask import SelfMask, SelfMaskDetector, to_batch
from namedmask.spectral import (SpectralDetector, affinity, best_mask, biased_cut, border_contrast, patch_similarity, resize_soft,
                                slow_modes, stage_maps, to_batch, working_size)

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


def seeded(device) -> SelfMask:
    "SelfMask with random weights that give masks of some size."
    torch.manual_seed(4)
    net = SelfMask().eval().to(device)
    with torch.no_grad(): net.query_embed.mul_(5)
    return net


class PlainSelfMask(nn.Module):
    "The weights of a `SelfMask` in a network that follows the paper's account literally."
    def __init__(self, net: SelfMask): super().__init__(); self.net = net

    def attend(self, block, x):
        q, k, v = block.attn.qkv(x).unflatten(-1, (3, 6, 64)).permute(2, 0, 3, 1, 4)
        return block.attn.proj(((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x):
        e, h, w = self.net.encoder, *x.shape[-2:]
        x = F.pad(x, (0, -w % 8, 0, -h % 8))
        x = e.patch_embed["proj"](x)
        size = x.shape[-2:]
        grid = F.interpolate(e.pos_embed[:, 1:].mT.unflatten(2, (28, 28)), size=size, mode="bicubic", align_corners=False)
        t = torch.cat([(e.cls_token + e.pos_embed[:, :1]).expand(len(x), -1, -1), (x + grid).flatten(2).mT], 1)
        for b in e.blocks:
            t = t + self.attend(b, b.norm1(t))
            t = t + b.mlp(b.norm2(t))
        memory = e.norm(t)[:, 1:]
        queries = self.net.decoder(self.net.query_embed.expand(len(x), -1, -1), memory)
        features = F.interpolate(memory.mT.unflatten(2, size), scale_factor=2, mode="bilinear", align_corners=False)
        masks = torch.einsum("bqc,bchw->bqhw", queries, features).sigmoid()
        masks = F.interpolate(masks, scale_factor=4, mode="bilinear", align_corners=False)
        return masks[torch.arange(len(x)), self.net.ffn(queries).sigmoid().argmax(1), :h, :w] > 0.5


@torch.inference_mode()
def selfmask_plain(folder, out, photos, shorter, device):
    "One photograph after the other; seconds in all and in the network."
    detector, network = SelfMaskDetector(seeded(device), device, shorter), 0
    net = PlainSelfMask(detector.net)
    def one(photo):
        nonlocal network
        im = read_photo(folder / photo)
        small = detector.prepare(im)
        x = to_batch([small], device)
        start = time.perf_counter()
        found = net(x)[0, :small.height, :small.width].cpu().numpy()
        network += time.perf_counter() - start
        solved = plain_solve(np.asarray(small), found.astype(np.float32), 256.) > 0.5
        write_mask(mask_file(out, photo), np.asarray(Image.fromarray(solved).resize(im.size, Image.Resampling.NEAREST)))
    if torch.device(device).type == "cuda": one(photos[0])
    start, network = time.perf_counter(), 0
    for p in photos: one(p)
    return time.perf_counter() - start, network


def selfmask_ours(folder, out, photos, shorter, device, bs):
    "The stage's own function; seconds in all and in the network."
    detector, network = SelfMaskDetector(seeded(device), device, shorter, bs), 0
    batch = detector.batch
    def timed(photos):
        nonlocal network
        start = time.perf_counter()
        try: return batch(photos)
        finally: network += time.perf_counter() - start
    detector.batch = timed
    if torch.device(device).type == "cuda": save_saliency(photos, folder, out / "warm", detector, bs=bs)
    start, network = time.perf_counter(), 0
    assert save_saliency(photos, folder, out, detector, bs=bs) == []
    return time.perf_counter() - start, network


def selfmask(version, folder, out, photos, shorter, device, bs, threads):
    "Seconds in all, in the network, and peak memory (MB) of one version, in a process of its own."
    torch.set_num_threads(threads)
    took = (selfmask_plain(folder, out, photos, shorter, device) if version == "plain" else
            selfmask_ours(folder, out, photos, shorter, device, bs if version == "ours" else 1))
    return *took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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


def alone(f, *args):
    "What `f` gives in a process of its own, so that its peak memory is its own."
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool: return pool.submit(f, *args).result()


def threads_of(args): return f"PyTorch on {args.threads} thread{'s' * (args.threads > 1)}"


def bench_spectral(args, folder):
    def line(what, speed, peak, base, digits=2): print(f"{what:44}{speed:10.{digits}f}{peak:9.0f}{speed / base:7.1f}×", flush=True)
    print(f"photographs of {args.side} px to masks on disk, {threads_of(args)}")
    print(f"{'version':44}{'photos/s':>10}{'peak MB':>9}{'ratio':>8}")
    base = None
    for version, what in dict(plain="plain: one at a time, dense eigh, SciPy", ours="namedmask, batches of 8",
                              less="plain, second eigenvector only: less work").items():
        speed, peak = alone(measure, version, folder, args.seconds, args.threads)
        base = base or speed
        line(what, speed, peak, base)
    fast, slow = cuts(args.threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line("  the cut alone, torch.linalg.eigh", slow, peak, slow, 1)
    line("  the cut alone, ten modes, subspace iteration", fast, peak, slow, 1)


def bench_selfmask(args, folder, out):
    photos, device, base = list_photos(folder)[0][:args.photos], str(pick_device(args.device)), None
    print(f"\nSelfMask (random weights), {len(photos)} photographs, shorter side {args.shorter} px, {device}, {threads_of(args)}")
    print(f"{'version':44}{'photos/s':>10}{'peak MB':>9}{'ratio':>8}{'network/s':>11}{'ratio':>8}")
    for version, what in dict(plain="plain: one at a time, all features, SciPy", one="namedmask, one by one",
                              ours=f"namedmask, batches of up to {args.bs}").items():
        total, network, peak = alone(selfmask, version, folder, out / version, photos, args.shorter, device, args.bs, args.threads)
        base = base or (total, network)
        print(f"{what:44}{len(photos) / total:10.3f}{peak:9.0f}{base[0] / total:7.2f}×"
              f"{len(photos) / network:11.3f}{base[1] / network:7.2f}×", flush=True)
    masks = {v: [read_mask(mask_file(out / v, p)) for p in photos] for v in ("plain", "one", "ours")}
    one, ours = (min((a == b).mean() for a, b in zip(masks[v], masks["plain"])) for v in ("one", "ours"))
    print(f"pixels on which the masks agree with plain's, at worst: one by one {one:.4%}, batched {ours:.4%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="how long each version of the spectral part runs, at least")
    parser.add_argument("--side", type=int, default=640, help="longer side of the photographs, px")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--shorter", type=int, default=512, help="shorter side for SelfMask, px")
    parser.add_argument("--photos", type=int, default=8, help="photographs for SelfMask")
    parser.add_argument("--bs", type=int, default=8, help="photographs in a batch of SelfMask")
    parser.add_argument("--device", default="auto", help="where SelfMask runs")
    parser.add_argument("--only", choices=["spectral", "selfmask"], help="one part of the two")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
        make_photos(Path(folder), args.side)
        if args.only != "selfmask": bench_spectral(args, Path(folder))
        if args.only != "spectral": bench_selfmask(args, Path(folder), Path(out))


if __name__ == "__main__": main()
