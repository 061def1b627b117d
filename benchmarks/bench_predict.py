"""Prediction: photographs a second and peak memory of `predict_many` and `predict`, against a plain loop in the same run.

The plain loop reads a photograph, runs the whole of it through the same network, takes the argmax and saves it as PNG.
Both get a folder of the demo world's test photographs, and then one large photograph, for which the plain loop's memory grows
and ours does not.

    python benchmarks/bench_predict.py [--device auto] [--limit 24] [--large 3000x2000] [--names 20] [--threads N]
"""
import argparse, multiprocessing, resource, tempfile, time
from pathlib import Path


def plain(model, photos, out, device):
    "Whole photographs, one after the other."
    import numpy as np, torch
    from PIL import Image
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (model.mean, model.std))
    for path in photos:
        x = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).to(device).permute(2, 0, 1).float() / 255
        with torch.no_grad(): labels = model(((x - mean) / std)[None]).softmax(1).argmax(1)[0]
        Image.fromarray(labels.cpu().numpy().astype(np.uint8)).save(out / f"{path.name}.png")


def measure(way, photos, n_names, device, threads):
    "Photographs a second (the last of two passes over many, or of one) and peak memory in MB, in a process of its own."
    import torch
    from namedmask.core import pick_device
    from namedmask.deeplab import make_segmenter
    from namedmask.predict import predict_many
    if threads: torch.set_num_threads(threads)
    device = pick_device(device)
    torch.manual_seed(0)
    model = make_segmenter(n_classes=n_names + 1, pretrained=False).to(device).eval()
    model.names = [f"name {i}" for i in range(n_names)]
    with tempfile.TemporaryDirectory() as out:
        for _ in range(2 if len(photos) > 1 or device.type == "cuda" else 1):
            start = time.perf_counter()
            if way == "plain": plain(model, photos, Path(out), device)
            else: predict_many(model, photos, out, "png", device, progress=None)
            seconds = time.perf_counter() - start
    if device.type == "cuda": peak = torch.cuda.max_memory_allocated() / 2**20
    else: peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return len(photos) / seconds, peak


def compare(title, photos, a):
    "One line: ours, the plain loop, the ratio."
    row = {}
    for way in ("plain", "ours"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row[way] = pool.apply(measure, (way, photos, a.names, a.device, a.threads))
    (fast, peak), (slow, slow_peak) = row["ours"], row["plain"]
    print(f"{title}: {fast:.2f} photographs/s, peak {peak:.0f} MB; plain loop {slow:.2f}/s, {slow_peak:.0f} MB; "
          f"ratio {fast / slow:.2f}, memory {peak / slow_peak:.2f}")


def main():
    from PIL import Image
    from namedmask.demo import load_world
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--limit", type=int, default=24, help="photographs of the folder")
    p.add_argument("--large", default="3000x2000", help="pixels of the large photograph")
    p.add_argument("--names", type=int, default=20)
    p.add_argument("--threads", type=int, default=0, help="of torch; 0 = its own choice")
    a = p.parse_args()
    photos = [photo for photo, _ in load_world().test[:a.limit]]
    compare(f"folder of {len(photos)}, 320×240", photos, a)
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.jpg"
        Image.open(photos[0]).convert("RGB").resize(tuple(map(int, a.large.split("x")))).save(large)
        compare(f"one of {a.large}", [large], a)


if __name__ == "__main__": main()
