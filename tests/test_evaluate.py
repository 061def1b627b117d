"""Evaluation: the golden scores, ids by name, odd photographs and labels."""
import json, os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from namedmask.benchmarks import Benchmark
from namedmask.core import BadPhoto, UserError
from namedmask.evaluate import ahead, confusion, evaluate, plot_confusion, plot_iou, score_table, scores_of, whole_logits

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
    got = [scores_of(confusion(torch.from_numpy(t), torch.from_numpy(p), 2), ["thing"]).miou for t, p in zip(g["2/gt"], g["2/pred"])]
    np.testing.assert_allclose(np.mean(got), np.mean(g["2/binary_iou"]), rtol=0.05)   # per image and by name; a mean of means is near


def test_perfect_at_own_resolutions(bench):
    s = evaluate(Bands("abc"), bench, progress=None)
    assert s.miou == s.miou_present == s.pixel_accuracy == s.mean_accuracy == s.frequency_weighted_iou == 1
    assert s.confusion.sum() == 5 * 7 + 40 * 30 + 1 + 70 * 65


def test_ids_go_by_name(bench):
    "A segmenter with other ids, other spelling and an unknown name: unknown predictions are background."
    class Other(Bands):
        def forward(self, x): return super().forward(x)[:, [0, 3, 1, 2]]    # its ids: 1 = what is painted as 3, ...
    assert evaluate(Other(["C", "a", "b"]), bench, progress=None).miou == 1
    s = evaluate(Bands(["a", "b", "dragon"]), bench, progress=None)
    assert s.iou["a"] == s.iou["b"] == 1 and s.iou["c"] == 0 and s.confusion[3, 0] == (sum((l() == 3).sum() for _, l in bench))


def test_json_is_exact_and_plain(bench):
    d = evaluate(Bands("abc"), replace(bench, names=["a", "b", "c", "never"]), progress=None).to_json()
    assert list(d) == ["miou", "miou_present", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "iou"]
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
        for x in ahead(f, range(9)): got.append(x)
    assert got == [0, 1, 2]


def test_many_classes_are_drawn():
    m = np.random.default_rng(0).integers(0, 9, (120, 120))
    s = scores_of(m, [f"c{i}" for i in range(1, 120)])
    plot_confusion(s), plot_iou(s), score_table(s)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_is_the_same(bench):
    a, b = evaluate(Bands("abc"), bench, progress=None), evaluate(Bands("abc").cuda(), bench, "cuda", progress=None)
    assert np.array_equal(a.confusion, b.confusion)
