"""Evaluation: the golden scores, ids by name, odd photographs and labels."""
import io, json, os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from namedmask.benchmarks import MERGED, VOC_NAMES, Benchmark
from namedmask.core import BadPhoto, UserError
from namedmask.deeplab import make_segmenter
from namedmask.evaluate import (PAPER_SCORES, map_ahead, beside_paper, by_size, confusion, contenders, evaluate, evaluate_published,
                                export_predictions, label_maps, largest, plot_confusion, plot_iou, score_table, scores_of, to_input, whole_logits)

SHARED = Path(os.environ.get("NAMEDMASK_SHARED", Path(__file__).parents[2] / "shared"))
GOLDEN = SHARED / "golden/metrics.npz"


class Bands(nn.Module):
    "A segmenter that reads the class off the red channel: red // 10."
    mean, std = [0.0] * 3, [1.0] * 3
    def __init__(self, names):
        super().__init__()
        self.names = list(names)
    def forward(self, x):
        ids = (x[:, 0] * 255 / 10).round().long().clamp(0, len(self.names))
        return nn.functional.one_hot(ids, len(self.names) + 1).permute(0, 3, 1, 2).float()


def painted(tmp_path, labels, file="p.png"):
    "A photograph whose red channel tells its labels."
    x = np.zeros((*labels.shape, 3), np.uint8)
    x[..., 0] = labels * 10
    Image.fromarray(x).save(tmp_path / file)
    return tmp_path / file


@pytest.fixture
def bench(tmp_path):
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 4, size).astype(np.uint8) for size in ((5, 7), (40, 30), (1, 1), (70, 65))]
    return Benchmark("toy", ["a", "b", "c"], [(painted(tmp_path, m, f"{k}.png"), lambda m=m: m) for k, m in enumerate(maps)])


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"needs {GOLDEN} (set NAMEDMASK_SHARED)")
@pytest.mark.parametrize("n", [21, 920, 2])
def test_golden(n):
    g = np.load(GOLDEN)
    matrix = sum(confusion(torch.from_numpy(t), torch.from_numpy(p), n) for t, p in zip(g[f"{n}/gt"], g[f"{n}/pred"]))
    s = scores_of(matrix, [f"c{i}" for i in range(1, n)])
    iou = np.array([np.nan if v is None else v for v in s.iou.values()])
    np.testing.assert_allclose(iou, g[f"{n}/iou"], rtol=1e-12)
    names = dict(miou="mean_iou", pixel_accuracy="pixel_acc", mean_accuracy="mean_acc", frequency_weighted_iou="freqw_acc")
    for ours, theirs in names.items():
        np.testing.assert_allclose(getattr(s, ours), g[f"{n}/{theirs}"], rtol=1e-12)


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"needs {GOLDEN} (set NAMEDMASK_SHARED)")
def test_golden_binary():
    g = np.load(GOLDEN)
    got = [scores_of(confusion(torch.from_numpy(t), torch.from_numpy(p), 2), ["thing"]).iou["thing"] for t, p in zip(g["2/gt"], g["2/pred"])]
    np.testing.assert_allclose(got, g["2/binary_iou"], rtol=1e-6)


def test_perfect_at_own_resolutions(bench):
    s = evaluate(Bands("abc"), bench, progress=None)
    assert s.miou == s.miou_present == s.pixel_accuracy == s.mean_accuracy == s.frequency_weighted_iou == 1
    assert s.confusion.sum() == 5 * 7 + 40 * 30 + 1 + 70 * 65


def imagenet_s_plainly(pairs, n):
    "What ImageNet-S's evaluator prints, counted pixel by pixel: a second version, with sets of pixels in place of tables."
    area = lambda x, c: np.count_nonzero(x == c)
    sizes, groups, right, f, everything = (("S", 5), ("MS", 25), ("ML", 50), ("L", 100)), {}, 0, [], []
    for truth, said in pairs:
        truth, said = truth[truth != 1000], said[truth != 1000]
        everything.append((truth, said))
        for c in set(truth.tolist()) - {0}:
            kind = next(k for k, most in sizes if 100 * area(truth, c) / truth.size <= most)
            groups.setdefault(kind, {}).setdefault(len(everything), set()).add(c)
        called = [area(said, c) for c in range(1, n + 1)]
        right += max(called) > 0 and area(truth, 1 + called.index(max(called))) > 0
        both, thing, call = ((truth > 0) & (said > 0)).sum(), (truth > 0).sum(), (said > 0).sum()
        precision, recall = both / max(call, 1), both / max(thing, 1)
        f.append(1.3 * precision * recall / max(0.3 * precision + recall, 1e-20))
    def ious(pairs, only_there):
        truth, said = (np.concatenate(x) for x in zip(*pairs))
        either = [((truth == c) | (said == c)).sum() for c in range(n + 1)]
        return np.mean([((truth == c) & (said == c)).sum() / max(either[c], 1) for c in range(n + 1) if not only_there or (truth == c).any()])
    found = dict(Acc=right / len(pairs), mIoU=ious(everything, False), **dict.fromkeys("S MS ML L".split()), FMeasure=np.mean(f))
    for kind, photos in groups.items():
        kept = [(t[keep], p[keep]) for i, (t, p) in enumerate(everything, 1) if i in photos for keep in [np.isin(t, [0, *photos[i]])]]
        found[kind] = ious(kept, True)
    return found


def test_imagenet_s_as_its_own_evaluator(tmp_path):
    "Ignored pixels, classes that never occur, things of every size, a photograph without things, and one where nothing counts."
    rng, n, pairs, maps = np.random.default_rng(1), 50, [], []
    for k in range(14):
        truth = np.zeros((40, 50), np.uint16)
        for c in rng.integers(1, 12, 3): truth[:rng.integers(1, 40), rng.integers(40):] = c
        if k == 3: truth[:] = 0
        truth[rng.random(truth.shape) < 0.1] = 1000
        if k == 5: truth[:] = 1000
        if k == 6: truth[:], truth[:2] = 0, 7           # exactly 5 %
        said = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 14, truth.shape), np.where(truth == 1000, 0, truth))
        if k == 8: said[:] = 0
        maps.append((truth.astype(int), said))
        pairs.append((painted(tmp_path, said, f"{k}.png"), lambda t=truth: t))
    names = [f"c{i}" for i in range(1, n + 1)]
    bench, model = Benchmark("imagenet_s50", names, pairs, ignore=1000), Bands(names)
    s = evaluate(model, bench, progress=None)
    assert s.imagenet_s == pytest.approx(imagenet_s_plainly(maps, n), rel=1e-6) and None not in s.imagenet_s.values()
    assert s.imagenet_s["mIoU"] < 0.5 * s.miou and s.to_json()["imagenet_s"] == s.imagenet_s
    assert evaluate(model, bench, progress=None, bs=4).imagenet_s == s.imagenet_s
    assert evaluate(model, replace(bench, name="imagenet_s50", names=names[:20]), progress=None).imagenet_s is None
    console = Console(width=90, file=io.StringIO()); console.print(score_table(s))
    assert f"ImageNet-S FMeasure {100 * s.imagenet_s['FMeasure']:.1f}" in " ".join(console.file.getvalue().replace("│", " ").split())


def test_names_with_brackets(bench):
    "Rich takes [x] for markup."
    s = evaluate(Bands(["[/a]", "b [c]", "[red]"]), replace(bench, names=["[/a]", "b [c]", "[red]"]), progress=None)
    console = Console(width=90, file=io.StringIO()); console.print(score_table(s, "[/x]")); console.print(beside_paper(s, "[/x]", "[/y]"))
    for text in ("[/a]", "b [c]", "[red]", "[/x]", "[/y]"): assert text in console.file.getvalue()


@pytest.mark.parametrize("arch", ["resnet50", "tf_efficientnet_lite0"])
def test_small_photographs_as_the_network_sees_them(arch):
    "The paper's network takes any size as it is; others get a margin, which is cut off again."
    torch.manual_seed(0)
    model = make_segmenter(arch, 4, pretrained=False).eval(); model.names = list("abc")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (15, 20, 3), np.uint8))
    with torch.no_grad():
        own = label_maps(model, [photo])[0]
        assert own.shape == (15, 20) and (own != whole_logits(model, photo).argmax(0)).float().mean() < 0.02
        if arch == "resnet50": assert (own != model(to_input(photo, model))[0].argmax(0)).float().mean() < 0.02


def test_a_file_of_ours_knows_its_names(tmp_path):
    "Scored or exported, by name and not by place: a head in another order with its names gives the same."
    from namedmask.deeplab import save_segmenter
    from namedmask.evaluate import load_weights
    torch.manual_seed(0)
    model = make_segmenter("resnet50", 4, pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    head, order = model.classifier.classifier[-1], [0, 3, 2, 1]
    with torch.no_grad(): head.weight.copy_(head.weight[order]); head.bias.copy_(head.bias[order])
    save_segmenter(tmp_path / "b.safetensors", model, ["c", "b", "a"])
    photos = [(painted(tmp_path, np.random.default_rng(k).integers(0, 20, (40, 50)), f"{k}.jpg"), lambda: np.zeros((40, 50), np.uint8)) for k in range(2)]
    bench = Benchmark("imagenet_s50", list("abc"), photos)
    for file in "a.pt", "b.safetensors": export_predictions(load_weights(tmp_path / file, bench.names), bench, tmp_path / file[0], progress=None)
    files = sorted((tmp_path / "a").rglob("*.png"))
    assert len(files) == 2 and all(f.read_bytes() == (tmp_path / "b" / f.relative_to(tmp_path / "a")).read_bytes() for f in files)


def test_ids_go_by_name(bench):
    "A segmenter with other ids, other spelling and an unknown name: unknown predictions are background."
    class Other(Bands):
        def forward(self, x): return super().forward(x)[:, [0, 3, 1, 2]]    # its ids: 1 = what is painted as 3, ...
    assert evaluate(Other(["C", "a", "b"]), bench, progress=None).miou == 1
    s = evaluate(Bands(["a", "b", "dragon"]), bench, progress=None)
    assert s.iou["a"] == s.iou["b"] == 1 and s.iou["c"] == 0 and s.confusion[3, 0] == (sum((l() == 3).sum() for _, l in bench))


def test_json_is_exact_and_plain(bench):
    d = evaluate(Bands("abc"), replace(bench, names=["a", "b", "c", "never"]), progress=None).to_json()
    assert list(d) == ["miou", "miou_present", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "iou", "photos"] and d["photos"] == 4
    assert d["iou"]["never"] is None and list(d["iou"]) == ["background", "a", "b", "c", "never"]
    assert json.loads(json.dumps(d, allow_nan=False)) == d


def test_nothing_marked_is_null():
    s = scores_of(np.zeros((3, 3), int), ["a", "b"])
    assert s.to_json() == dict(miou=None, miou_present=None, pixel_accuracy=None, mean_accuracy=None, frequency_weighted_iou=None,
                               iou=dict(background=None, a=None, b=None))
    score_table(s), plot_iou(s)


def test_present_leaves_out_what_is_only_predicted():
    s = scores_of(np.array([[8, 0, 2], [0, 10, 0], [0, 0, 0]]), ["a", "b"])
    assert s.miou == pytest.approx((0.8 + 1 + 0) / 3) and s.miou_present == pytest.approx(0.9)


def test_ignored_and_negative_labels():
    m = confusion(torch.tensor([0, 1, 255, -1, 1000]), torch.tensor([0, 1, 1, 1, 1]), 2)
    assert m.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError): confusion(torch.zeros(3), torch.tensor([0, 1, 2]), 2)
    with pytest.raises(ValueError): confusion(torch.zeros(3), torch.zeros(4), 2)


def test_wide_ids(tmp_path):
    "uint16 label maps with ids beyond 255 and 1000 to ignore."
    class Wide(nn.Module):
        names, mean, std = [f"c{i}" for i in range(1, 400)], [0.0] * 3, [1.0] * 3
        def forward(self, x): return nn.functional.one_hot(torch.full(x[:, 0].shape, 300), 400).permute(0, 3, 1, 2).float()
    labels = np.full((4, 6), 300, np.uint16)
    labels[0] = 1000
    Image.new("RGB", (6, 4)).save(tmp_path / "p.png")
    s = evaluate(Wide(), Benchmark("wide", Wide.names, [(tmp_path / "p.png", lambda: labels)], ignore=1000), progress=None)
    assert s.miou == 1 and s.confusion.sum() == 18


def test_limit_is_spread(bench):
    seen = []
    pairs = [(p, lambda k=k, l=l: (seen.append(k), l())[1]) for k, (p, l) in enumerate(bench.pairs * 3)]
    evaluate(Bands("abc"), replace(bench, pairs=pairs), limit=3, progress=None)
    assert sorted(seen) == [0, 4, 8]


def test_mode_is_kept_even_when_it_fails(bench, tmp_path):
    model = Bands("abc").train()
    evaluate(model, bench, progress=None)
    assert model.training
    (tmp_path / "broken.png").write_bytes(b"x")
    broken = replace(bench, pairs=[*bench.pairs, (tmp_path / "broken.png", bench.pairs[0][1])])
    with pytest.raises(BadPhoto): evaluate(model, broken, progress=None)
    assert model.training


def test_turned_photo(tmp_path):
    "A photograph with an EXIF orientation: labels belong to the stored pixels."
    labels = np.random.default_rng(1).integers(0, 4, (9, 14)).astype(np.uint8)
    x = np.repeat((labels * 10)[..., None], 3, 2)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(x).save(tmp_path / "t.png", exif=exif)
    assert evaluate(Bands("abc"), Benchmark("t", list("abc"), [(tmp_path / "t.png", lambda: labels)]), progress=None).miou == 1


def test_wrong_size_and_wrong_names(bench):
    with pytest.raises(UserError, match="label map"):
        evaluate(Bands("abc"), replace(bench, pairs=[(bench.pairs[0][0], lambda: np.zeros((3, 3), np.uint8))]), progress=None)
    with pytest.raises(UserError, match="none of"): evaluate(Bands("xyz"), bench, progress=None)


def test_small_photos_are_not_changed_by_the_continuation():
    "What is added beyond the edges is cut off again."
    assert torch.equal(whole_logits(Bands("abc"), Image.new("RGB", (3, 2), (20, 0, 0))).argmax(0), torch.full((2, 3), 2))


def test_ahead_raises_in_place():
    def f(x):
        if x == 3: raise KeyError(x)
        return x
    got = []
    with pytest.raises(KeyError):
        for x in map_ahead(f, range(9)): got.append(x)
    assert got == [0, 1, 2]


def test_many_classes_are_drawn():
    m = np.random.default_rng(0).integers(0, 9, (120, 120))
    s = scores_of(m, [f"c{i}" for i in range(1, 120)])
    plot_confusion(s), plot_iou(s), score_table(s)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_is_the_same(bench):
    a, b = evaluate(Bands("abc"), bench, progress=None), evaluate(Bands("abc").cuda(), bench, "cuda", progress=None)
    assert np.array_equal(a.confusion, b.confusion)


# --- batches, many classes, published weights, export

@pytest.fixture(scope="module")
def network():
    "The paper's network with 21 classes and weights of no meaning, but not all alike."
    torch.manual_seed(0)
    model = make_segmenter("resnet50", 21, pretrained=False).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_var.uniform_(.5, 2), m.running_mean.normal_(0, .1), nn.init.uniform_(m.weight, .5, 1.5)
    model.names = list(VOC_NAMES)
    return model


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    "Photographs of three sizes in a mixed order, with random labels and ignored pixels, as VOC would have them."
    folder, rng, pairs = tmp_path_factory.mktemp("noisy"), np.random.default_rng(0), []
    for k, size in enumerate([(40, 56), (33, 47), (40, 56), (40, 56), (33, 47), (90, 35), (40, 56)]):
        x = cv2.resize(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), size[::-1])
        Image.fromarray(x).save(folder / f"{k}.png")
        labels = rng.integers(0, 21, size).astype(np.uint8)
        labels[:2] = 255
        pairs.append((folder / f"{k}.png", lambda labels=labels: labels))
    return Benchmark("noisy", list(VOC_NAMES), pairs)


def plainly(model, benchmark, n):
    "A confusion matrix the straightforward way: each photograph alone, the network's own forward, NumPy's argmax."
    m = np.zeros((n, n), np.int64)
    for path, labels in benchmark:
        x = (np.asarray(Image.open(path).convert("RGB"), np.float32) / 255 - np.float32(model.mean)) / np.float32(model.std)
        with torch.no_grad(): guess = model(torch.from_numpy(x.transpose(2, 0, 1)[None]))[0].numpy().argmax(0)
        truth = labels().astype(int)
        np.add.at(m, (truth[truth < n], guess[truth < n]), 1)
    return m


def test_batches_are_the_same_to_the_last_pixel(network, noisy):
    alone = evaluate(network, noisy, progress=None, bs=1).confusion
    for bs in (2, 3, 8): assert np.array_equal(evaluate(network, noisy, progress=None, bs=bs).confusion, alone), bs
    assert np.array_equal(evaluate(network, noisy, progress=None).confusion, alone)
    plain = plainly(network, noisy, 21)
    assert np.abs(alone - plain).sum() <= 4 and alone.sum() == plain.sum()      # normalised in another order: a tie may fall otherwise


@pytest.mark.parametrize("arch, n", [("resnet50", 920), ("tf_efficientnet_lite0", 920), ("tf_efficientnet_lite0", 5)])
@pytest.mark.parametrize("size", [(33, 47), (64, 96), (101, 40)])
def test_label_maps_are_the_argmax_of_the_network(arch, n, size):
    torch.manual_seed(n)
    model = make_segmenter(arch, n, pretrained=False).eval()
    photos = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (*size, 3)).astype(np.uint8)) for k in range(2)]
    got = label_maps(model, photos)
    for im, labels in zip(photos, got): assert torch.equal(labels, whole_logits(model, im).max(0).indices)


def test_contenders_never_miss_a_winner():
    rng = torch.Generator().manual_seed(0)
    for k in range(60):
        c, h, w = (int(torch.randint(1, most, (), generator=rng)) for most in (60, 9, 9))
        logits = torch.randn(c, h, w, generator=rng) * 10 ** float(torch.randint(-2, 3, (), generator=rng))
        if k % 3 == 0: logits += torch.randn(c, 1, 1, generator=rng) * 3
        size = (h * 4 - k % 3, w * 4 - k % 2) if h > 1 and w > 1 else (h * 4, w * 4)
        full = nn.functional.interpolate(logits[None], size=size, mode="bilinear")[0]
        assert set(full.argmax(0).unique().tolist()) <= set(contenders(logits).tolist())
        for at_once in (1, 300, 2**25): assert torch.equal(largest(logits, size, at_once), full.max(0).indices)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_logits_do_not_stop_it(bad):
    logits = torch.randn(40, 5, 6)
    logits[3, 2, 2] = bad
    assert largest(logits, (20, 24)).shape == (20, 24)
    assert largest(torch.full((40, 5, 6), bad), (20, 24)).shape == (20, 24)


def test_memory_of_enlarging_is_bounded(monkeypatch):
    most, plain = [0], nn.functional.interpolate
    def watched(x, **kw):
        y = plain(x, **kw)
        most[0] = max(most[0], y.numel())
        return y
    monkeypatch.setattr("namedmask.evaluate.F.interpolate", watched)
    for at_once in (10**5, 2**22):
        most[0] = 0
        largest(torch.randn(920, 50, 60), (200, 240), at_once)
        assert 0 < most[0] <= at_once


def test_by_size_keeps_everything_and_little_waits():
    rng = np.random.default_rng(0)
    sizes = [(int(a), int(b)) for a, b in rng.integers(1, 5, (200, 2))]
    read = []
    def stream():
        for k, s in enumerate(sizes): read.append(k); yield Image.new("L", s), k
    seen, waiting = [], 0
    for group in by_size(stream(), 4, max_pixels=20):
        assert len({im.size for im, _ in group}) == 1 and 1 <= len(group) <= 4
        seen += [k for _, k in group]
        waiting = max(waiting, sum(sizes[k][0] * sizes[k][1] for k in set(read) - set(seen)))
    assert sorted(seen) == list(range(200)) and waiting <= 8 * 20 + 16


def voc_copy(root, noisy):
    "The noisy photographs in VOC's layout."
    voc = root / "VOCdevkit/VOC2012"
    for part in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"): (voc / part).mkdir(parents=True)
    for path, labels in noisy:
        (voc / f"JPEGImages/{path.stem}.jpg").write_bytes(path.read_bytes())
        Image.fromarray(labels()).save(voc / f"SegmentationClass/{path.stem}.png")
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n".join(p.stem for p, _ in noisy))


@pytest.mark.parametrize("key", [None, "model"])
def test_published_weights_on_voc(tmp_path, network, noisy, key):
    "The one command of the paper's table: a plain state dict, or under a key, and a benchmark in its own layout."
    voc_copy(tmp_path, noisy)
    state = network.state_dict()
    torch.save({key: state} if key else state, tmp_path / "namedmask_voc2012.pt")
    s = evaluate_published(tmp_path / "namedmask_voc2012.pt", "voc2012", tmp_path, device="cpu", progress=None)
    assert np.abs(s.confusion - plainly(network, noisy, 21)).sum() <= 4 and list(s.iou)[1:] == VOC_NAMES
    few = evaluate_published(tmp_path / "namedmask_voc2012.pt", "voc2012", tmp_path / "VOCdevkit", limit=2, device="cpu", progress=None)
    assert few.confusion.sum() < s.confusion.sum()


def test_published_weights_of_another_benchmark(tmp_path, network, noisy):
    voc_copy(tmp_path, noisy)
    torch.save(make_segmenter("resnet50", 81, pretrained=False).state_dict(), tmp_path / "coco.pt")
    with pytest.raises(UserError, match="80 names.*20 names"): evaluate_published(tmp_path / "coco.pt", "voc2012", tmp_path, device="cpu")
    with pytest.raises(UserError, match="gone.pt"): evaluate_published(tmp_path / "gone.pt", "voc2012", tmp_path, device="cpu")
    with pytest.raises(UserError, match="not complete"): evaluate_published(tmp_path / "coco.pt", "coco2017", tmp_path, device="cpu")


def test_the_papers_figures():
    assert PAPER_SCORES == dict(cityscapes=(18.2, 93.0), coca=(27.4, 82.0), coco2017=(27.7, 76.4), imagenet_s50=(47.5, None),
                         imagenet_s300=(33.1, None), imagenet_s919=(23.1, None), voc2012=(59.3, 89.2))
    half = scores_of(np.array([[6, 2], [2, 0]]), ["a"])
    for name in (*PAPER_SCORES, "demo"):
        out = io.StringIO()
        Console(file=out, width=100).print(beside_paper(half, name, "val, 3 photographs"))
        if name in PAPER_SCORES: assert str(PAPER_SCORES[name][0]) in out.getvalue() and f"{30 - PAPER_SCORES[name][0]:+.1f}" in out.getvalue()
    beside_paper(scores_of(np.zeros((2, 2), int), ["a"]), "voc2012")


class Wide(Bands):
    "The class is what red and green say: red + 256 · green."
    def forward(self, x):
        ids = ((x[:, 0] + 256 * x[:, 1]) * 255).round().long().clamp(0, len(self.names))
        return nn.functional.one_hot(ids, len(self.names) + 1).permute(0, 3, 1, 2).float()


@pytest.fixture
def imagenet_s(tmp_path):
    "Photographs in folders of classes whose colours tell their labels, up to 919; nobody may look at the labels."
    rng, pairs, maps = np.random.default_rng(0), [], {}
    def closed(): raise AssertionError("labels were read")
    for k, wnid in enumerate(["n01440764", "n01440764", "n03642806", "n15075141"]):
        ids = rng.integers(0, 920, (36, 40 + k // 2))
        maps[wnid, f"ILSVRC2012_test_{k:08d}"] = ids
        path = tmp_path / f"test/{wnid}/ILSVRC2012_test_{k:08d}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)).save(path)
        pairs.append((path, closed))
    return Benchmark("imagenet_s919", [f"c{i}" for i in range(1, 920)], pairs, ignore=1000), maps


def test_export_in_the_servers_format(tmp_path, imagenet_s):
    bench, maps = imagenet_s
    out = tmp_path / "out/predictions"
    assert export_predictions(Wide(bench.names), bench, out, progress=None, bs=2) == 4
    files = sorted(out.rglob("*"))
    assert [f.name for f in files if f.is_dir()] == ["n01440764", "n03832673", "n15075141"]     # a merged class goes to its other
    for (wnid, stem), ids in maps.items():
        with Image.open(out / MERGED.get(wnid, wnid) / f"{stem}.png") as im:
            x = np.array(im)
            assert im.mode == "RGB" and im.format == "PNG" and not x[..., 2].any()
            assert np.array_equal(x[..., 0] + 256 * x[..., 1].astype(int), ids)
    assert len([f for f in files if f.is_file()]) == 4


def test_export_goes_on_after_a_kill(tmp_path, imagenet_s):
    bench, _ = imagenet_s
    class Stops(Wide):
        left = 2
        def forward(self, x):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            return super().forward(x)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt): export_predictions(Stops(bench.names), bench, out, progress=None)
    first = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in out.rglob("*.png")}
    assert len(first) == 2
    (out / "n01440764/.writing-abc.tmp").write_bytes(b"half")
    assert export_predictions(Wide(bench.names), bench, out, progress=None) == 2
    assert all((f.stat().st_mtime_ns, f.read_bytes()) == v for f, v in first.items()) and not list(out.rglob("*.tmp"))
    export_predictions(Wide(bench.names), bench, tmp_path / "unbroken", progress=None)
    assert {f.relative_to(out): f.read_bytes() for f in out.rglob("*.png")} == \
        {f.relative_to(tmp_path / "unbroken"): f.read_bytes() for f in (tmp_path / "unbroken").rglob("*.png")}
    with pytest.raises(UserError, match="another segmenter"):
        export_predictions(Wide(bench.names), replace(bench, name="imagenet_s50"), out)
    other = [(Path("/elsewhere/validation") / p.parent.name / p.name, l) for p, l in bench]
    with pytest.raises(UserError, match="or split"): export_predictions(Wide(bench.names), replace(bench, pairs=other), out)
    (tmp_path / "strange").mkdir(); (tmp_path / "strange/x.png").touch()
    with pytest.raises(UserError, match="not empty"): export_predictions(Wide(bench.names), bench, tmp_path / "strange")


def test_scores_are_those_of_imagenet_s_own_marking(tmp_path, imagenet_s):
    "Counted anew from exported files: areas over pixels that are not 1000, IoU of all classes."
    bench, maps = imagenet_s
    rng = np.random.default_rng(1)
    truths = {k: np.where(rng.random(v.shape) < .3, rng.integers(0, 920, v.shape), v) for k, v in maps.items()}
    for t in truths.values(): t[:3] = 1000
    bench = replace(bench, pairs=[(p, lambda t=t: t.astype(np.uint16)) for (p, _), t in zip(bench.pairs, truths.values())])
    scores = evaluate(Wide(bench.names), bench, progress=None)
    export_predictions(Wide(bench.names), bench, tmp_path / "out", progress=None)
    t, p, both = np.zeros(920), np.zeros(920), np.zeros(920)
    for (wnid, stem), truth in truths.items():
        x = np.array(Image.open(tmp_path / "out" / MERGED.get(wnid, wnid) / f"{stem}.png")).astype(int)
        guess = (x[..., 1] * 256 + x[..., 0])[truth != 1000]
        truth = truth[truth != 1000]
        for k, counts in ((truth, t), (guess, p), (truth[truth == guess], both)): counts += np.bincount(k, minlength=920)
    iou = both / np.maximum(t + p - both, 1)
    np.testing.assert_allclose([v or 0 for v in scores.iou.values()], iou, rtol=1e-12)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_labels_belong_to_stored_pixels(tmp_path, orientation):
    "Also where a turned photograph would have the same size as its label map."
    labels = np.random.default_rng(orientation).integers(0, 4, (12, 12)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.repeat((labels * 10)[..., None], 3, 2)).save(tmp_path / "t.png", exif=exif)
    assert evaluate(Bands("abc"), Benchmark("t", list("abc"), [(tmp_path / "t.png", lambda: labels)]), progress=None).miou == 1


def test_labels_of_turned_photographs(tmp_path):
    "Where labels have the size of the upright photograph, they are of it."
    labels = np.random.default_rng(1).integers(0, 4, (9, 14)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6                                                   # to be turned by a quarter, clockwise
    Image.fromarray(np.repeat((np.rot90(labels) * 10)[..., None], 3, 2)).save(tmp_path / "t.png", exif=exif)
    assert evaluate(Bands("abc"), Benchmark("t", list("abc"), [(tmp_path / "t.png", lambda: labels)]), progress=None).miou == 1


def test_broken_labels_name_the_photograph(bench):
    def fails(): raise IndexError("boolean index did not match")
    with pytest.raises(UserError, match="0.png cannot be read"):
        evaluate(Bands("abc"), replace(bench, pairs=[(bench.pairs[0][0], fails)]), progress=None)


def test_a_grey_photograph(tmp_path):
    labels = np.full((8, 9), 2, np.uint8)
    Image.fromarray(labels * 10).save(tmp_path / "g.png")
    assert evaluate(Bands("abc"), Benchmark("g", list("abc"), [(tmp_path / "g.png", lambda: labels)]), progress=None).miou == 1
