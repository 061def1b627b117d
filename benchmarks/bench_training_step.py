"""Training samples a second: the recipe's step against the same step in plain memory order, and in bfloat16; and what the loader costs.

    python benchmarks/bench_training_step.py [--seconds 8] [--bs 8] [--crop 256] [--threads 2] [--device cpu]

Every version trains DeepLabv3+ on the EfficientNet-Lite0 with Adam. Plain is a loop written down first: pictures and weights in PyTorch's
own order, float32, scaled by 1/255 on the way, batches ready in memory. Recipe is the learner that `namedmask.training` makes, on
batches ready in memory, in float32 and in bfloat16; and on the copy-paste set, whose samples are made on the way by the same process.
"""
import argparse, multiprocessing, resource, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException

from namedmask.copy_paste import Augment, CopyPaste
from namedmask.core import UserError
from namedmask.deeplab import make_segmenter, param_groups
from namedmask.training import Recipe, make_learner

sys.path.insert(0, str(Path(__file__).parent))
from bench_copy_paste import make_photos


class Ready(torch.utils.data.Dataset):
    "A few samples, kept in memory."
    def __init__(self, ds, length, n=16): self.samples, self.length = [ds[i] for i in range(n)], length
    def __len__(self): return self.length
    def __getitem__(self, i): return self.samples[i % len(self.samples)]


class Clock(Callback):
    "Counts the steps of some seconds, after two to get warm."
    order = 90
    def __init__(self, seconds): self.seconds, self.n = seconds, -2
    def after_batch(self):
        self.n += 1
        if self.loss.device.type == "cuda": torch.cuda.synchronize()
        if self.n == 0: self.t = time.perf_counter()
        elif self.n > 0: self.spent = time.perf_counter() - self.t
        if self.n > 0 and self.spent > self.seconds: raise CancelFitException()


def plain(model, samples, recipe, seconds, device):
    "The loop that one would write first: seconds a step."
    opt = torch.optim.Adam(param_groups(model, recipe.lr, recipe.backbone_lr), weight_decay=recipe.weight_decay)
    x = torch.stack([s[0] for s in samples[:recipe.bs]])
    y = torch.stack([s[1] for s in samples[:recipe.bs]]).long().to(device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (model.mean, model.std))
    def step():
        loss = F.cross_entropy(model((x.to(device).float() / 255 - mean) / std), y, ignore_index=255)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return float(loss.detach())
    for _ in range(2): step()
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds: step(); n += 1
    return (time.perf_counter() - start) / n


def measure(version, items, args):
    "Seconds a step and peak memory (MB) of one version, in a process of its own."
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recipe = Recipe(steps=100_000, bs=args.bs, amp=version == "bfloat16", eval_every=10**9)
    try: model = make_segmenter(n_classes=9).to(args.device)
    except UserError: model = make_segmenter(n_classes=9, pretrained=False).to(args.device)
    ds = CopyPaste(items, Augment(crop=args.crop), length=recipe.steps * recipe.bs)
    ready = Ready(ds, len(ds))
    if version == "plain": spent = plain(model.train(), ready.samples, recipe, args.seconds, args.device)
    elif version == "loader":
        for i in range(64): ds[i]
        n, start = 0, time.perf_counter()
        while time.perf_counter() - start < args.seconds / 3: torch.utils.data.default_collate([ds[64 + n * args.bs + k] for k in range(args.bs)]); n += 1
        spent = (time.perf_counter() - start) / n
    else:
        model.to(memory_format=torch.channels_last)
        clock = Clock(args.seconds)
        learn = make_learner(model, ds if version == "copy-paste" else ready, recipe, cbs=[clock])
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        spent = clock.spent / clock.n
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device.startswith("cuda") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return spent, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="how long each version runs")
    parser.add_argument("--bs", type=int, default=8, help="samples a step")
    parser.add_argument("--crop", type=int, default=256, help="side of a sample, px")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(f"batches of {args.bs}, {args.crop} px, {args.device}, PyTorch on {args.threads} thread{'s' * (args.threads > 1)}")
    print(f"{'version':52}{'samples/s':>10}{'ms/step':>9}{'peak MB':>9}{'ratio':>7}")
    spent = {}
    with tempfile.TemporaryDirectory() as folder:
        items = make_photos(Path(folder), 400)
        for version, what in {"plain": "plain loop, float32, contiguous", "float32": "recipe, float32, channels_last", "bfloat16": "recipe, bfloat16, channels_last",
                              "copy-paste": "recipe as it runs, samples made on the way", "loader": "  of which the copy-paste set, by itself"}.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool: spent[version], peak = pool.submit(measure, version, items, args).result()
            ratio = f"{spent['plain'] / spent[version]:6.2f}×" if version != "loader" else ""
            print(f"{what:52}{args.bs / spent[version]:10.2f}{1000 * spent[version]:9.0f}{peak:9.0f}{ratio}", flush=True)
    print(f"making the samples takes {100 * spent['loader'] / spent['copy-paste']:.0f} % of a step")


if __name__ == "__main__": main()
