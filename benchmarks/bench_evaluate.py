"""Evaluation: photographs a second and peak memory of `evaluate`, against a plain per-image NumPy evaluation in the same run.

The plain one reads a photograph, normalises it in NumPy, runs the same network, takes NumPy's argmax, and counts intersection and union
class by class. Both mark the demo world's test set with an untrained segmenter, once with its 8 names and once as if there were 80; ours
also in batches of photographs of one size, which must give the same figures.

Then the paper's network with the 919 names of ImageNet-S on photographs of 500×375 pixels: what the network costs up to its logits at
stride 4, what the label maps cost beyond it (of which the plain way enlarges all 920 and takes the argmax), and the confusion matrix.
Untrained weights are an unkind case, for many classes contend everywhere.

    python benchmarks/bench_evaluate.py [--device auto] [--limit 24] [--threads N]
"""
import argparse, multiprocessing, resource, time
from dataclasses import replace

import numpy as np


def plain(model, benchmark, device, n):
    "IoU by class, the straightforward way."
    import torch
    from PIL import Image
    both, either = np.zeros(n), np.zeros(n)
    for path, labels in benchmark:
        x = (np.asarray(Image.open(path).convert("RGB")) / 255 - np.array(model.mean)) / np.array(model.std)
        with torch.no_grad(): logits = model(torch.tensor(x.transpose(2, 0, 1)[None], dtype=torch.float32, device=device))[0].cpu().numpy()
        guess, truth = logits.argmax(0), labels()
        for c in range(n):
            both[c] += ((guess == c) & (truth == c)).sum()
            either[c] += (((guess == c) | (truth == c)) & (truth != 255)).sum()
    return both / np.maximum(either, 1)


def measure(way, n_names, device, limit, threads):
    "Photographs a second (the second of two passes), peak memory in MB, and the IoU values, in a process of its own."
    import torch
    from namedmask.benchmarks import load_benchmark
    from namedmask.core import pick_device
    from namedmask.deeplab import make_segmenter
    from namedmask.evaluate import evaluate
    if threads: torch.set_num_threads(threads)
    device, bench = pick_device(device), load_benchmark("demo")
    names = bench.names + [f"unused {i}" for i in range(n_names - len(bench.names))]
    bench = replace(bench, names=names, pairs=bench.pairs[:limit])
    torch.manual_seed(0)
    model = make_segmenter(n_classes=n_names + 1, pretrained=False).to(device).eval()
    model.names = names
    for _ in range(2):
        start = time.perf_counter()
        if way == "plain": iou = plain(model, bench, device, n_names + 1)
        else: iou = np.array([v or 0 for v in evaluate(model, bench, device, progress=None, bs=8 if way == "batches" else 1).iou.values()])
        seconds = time.perf_counter() - start
    if device.type == "cuda": peak = torch.cuda.max_memory_allocated() / 2**20
    else: peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return len(bench) / seconds, peak, iou


def wide(way, device, threads, n=920, photos=2):
    "Seconds a photograph of the network, of its label map beyond that, and of the confusion matrix; peak memory in MB; the label maps."
    import torch
    import torch.nn.functional as F
    from namedmask.benchmarks import load_benchmark
    from namedmask.core import pick_device, read_photo
    from namedmask.deeplab import make_segmenter
    from namedmask.evaluate import _count, largest, to_input
    if threads: torch.set_num_threads(threads)
    device = pick_device(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.manual_seed(0)
    model = make_segmenter("resnet50", n, pretrained=False).to(device, memory_format=torch.channels_last).eval()
    ims = [read_photo(p).resize((500, 375)) for p, _ in load_benchmark("demo").pairs[:photos + 1]]
    spent, maps, matrix = np.zeros(3), [], torch.zeros(n, n, dtype=torch.int64, device=device)
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter      # other work may share a CPU core
    for k, im in enumerate(ims):
        with torch.inference_mode():
            x = to_input(im, model, device)
            wait(); start = clock()
            logits = model.classifier(*model.backbone(x)).contiguous()
            wait(); middle = clock()
            if way == "plain": labels = F.interpolate(logits, size=(375, 500), mode="bilinear", align_corners=False).argmax(1)[0]
            else: labels = largest(logits[0], (375, 500))
            wait(); end = clock()
            matrix += _count(labels, labels, n)
            wait(); counted = clock()
        if k: spent += middle - start, end - middle, counted - end                                # the first one warms up
        maps.append(labels.cpu().numpy())
    if device.type == "cuda": peak = torch.cuda.max_memory_allocated() / 2**20
    else: peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return spent / photos, peak, np.stack(maps)


def counting(threads, n=81, size=(480, 640), times=20):
    "Label maps a second of the confusion matrix alone: ours, and class by class in NumPy."
    import torch
    from namedmask.evaluate import confusion
    if threads: torch.set_num_threads(threads)
    truth, guess = (np.random.default_rng(s).integers(0, n, size).astype(np.uint8) for s in (0, 1))
    start = time.perf_counter()
    for _ in range(times): confusion(torch.from_numpy(truth), torch.from_numpy(guess), n)
    middle = time.perf_counter()
    for c in range(n): ((guess == c) & (truth == c)).sum(), ((guess == c) | (truth == c)).sum()
    return times / (middle - start), 1 / (time.perf_counter() - middle)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--limit", type=int, default=24, help="photographs")
    p.add_argument("--threads", type=int, default=0, help="of torch; 0 = its own choice")
    a = p.parse_args()
    def alone(f, *args):
        with multiprocessing.get_context("spawn").Pool(1) as pool: return pool.apply(f, args)
    for n_names in (8, 80):
        row = {way: alone(measure, way, n_names, a.device, a.limit, a.threads) for way in ("plain", "evaluate", "batches")}
        assert np.array_equal(row["batches"][2], row["evaluate"][2]) or a.device != "cpu", "batches change the scores"
        assert np.allclose(row["plain"][2], row["evaluate"][2], atol=2e-3), "the two evaluations disagree"
        (fast, peak, _), (slow, slow_peak, _) = row["evaluate"], row["plain"]
        print(f"evaluate, {n_names} names: {fast:.2f} photographs/s, peak {peak:.0f} MB; "
              f"plain NumPy {slow:.2f}/s, {slow_peak:.0f} MB; ratio {fast / slow:.2f}; in batches {row['batches'][0]:.2f}/s")
    (network, ours, count), peak, maps = alone(wide, "ours", a.device, a.threads)
    (_, plainly, _), plain_peak, plain_maps = alone(wide, "plain", a.device, a.threads)
    assert (maps != plain_maps).mean() < 1e-5, "the two label maps disagree"
    print(f"920 classes, ResNet-50, 500×375: network {network:.3f} s; label map {ours:.3f} s ({ours / network:.1%} of it), "
          f"all classes enlarged {plainly:.3f} s ({plainly / network:.1%}), ratio {plainly / ours:.1f}; "
          f"confusion matrix {1000 * count:.1f} ms ({count / network:.2%}); "
          f"peak {peak:.0f} MB against {plain_peak:.0f} MB")
    fast, slow = counting(a.threads)
    print(f"confusion matrix alone, 81 classes, 640×480: {fast:.0f} label maps/s; "
          f"class by class in NumPy {slow:.1f}/s; ratio {fast / slow:.1f}")


if __name__ == "__main__": main()
