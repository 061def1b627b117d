"How an expert is judged, and what a segmenter with views sees."
import numpy as np, pytest, torch
from PIL import Image
from torch import nn

from namedmask.benchmarks import Benchmark
from namedmask.core import UserError
from namedmask.deeplab import load_segmenter, make_segmenter, save_segmenter
from namedmask.bilateral import bilateral_solve
from namedmask.evaluate import label_maps, to_edges, whole_logits
from namedmask.experts import judge_expert
from namedmask.predict import predict


class Red(nn.Module):
    "Calls a pixel object where it is red."
    mean, std, names = [0.] * 3, [1.] * 3, ["thing"]
    def forward(self, x): return torch.stack([torch.full_like(x[:, 0], .5), x[:, 0]], 1)


@pytest.fixture
def bench(tmp_path):
    "Two photographs, 40 × 40: the expert marks the upper half of the first, and all of the second."
    truths = []
    for k, rows in enumerate((20, 40)):
        x = np.zeros((40, 40, 3), np.uint8)
        x[:rows, :, 0] = 255
        Image.fromarray(x).save(tmp_path / f"{k}.png")
        truths.append(np.zeros((40, 40), np.uint8))
    truths[0][:10] = 1; truths[0][10:15] = 2; truths[0][15:20] = 255     # 10 rows right, 5 rows of another name, 5 that do not count
    truths[1][:] = 2
    return Benchmark("two", ["cat", "dog"], [(tmp_path / f"{k}.png", lambda t=t: t) for k, t in enumerate(truths)])


def test_other_names_are_background_and_ignored_pixels_do_not_count(bench):
    iou, n = judge_expert(Red(), bench, "cat")
    assert n == 1 and iou == pytest.approx(10 / 15)


def test_the_mean_is_over_photographs_that_contain_the_name(bench):
    iou, n = judge_expert(Red(), bench, "dog")
    assert n == 2 and iou == pytest.approx((5 / 15 + 1) / 2)
    assert judge_expert(Red(), bench, "dog", limit=1)[1] == 1


def test_a_name_that_is_nowhere_is_an_error(bench):
    with pytest.raises(UserError, match="no class"): judge_expert(Red(), bench, "cow")
    bench.pairs.pop(0)
    with pytest.raises(UserError, match="shows cat"): judge_expert(Red(), bench, "cat")


class Blurry(Red):
    "Calls a pixel object where its surroundings, five pixels wide, are red: another answer at another size."
    views = (96, 64)
    def forward(self, x): return 20 * super().forward(nn.functional.avg_pool2d(x, 5, 1, 2))


def test_views_are_kept_in_the_file(tmp_path):
    model = make_segmenter(n_classes=4, pretrained=False)
    assert (model.views, model.edges) == ((), None)
    model.views, model.edges = (96, 64), 32.0
    save_segmenter(tmp_path / "s.safetensors", model, ["a", "b", "c"])
    again = load_segmenter(tmp_path / "s.safetensors")
    assert (again.views, again.edges) == ((96, 64), 32.0)
    model.views, model.edges = (), None
    save_segmenter(tmp_path / "s.safetensors", model, ["a", "b", "c"])
    again = load_segmenter(tmp_path / "s.safetensors")
    assert (again.views, again.edges) == ((), None)


def test_views_are_averaged():
    model, photo = Blurry().eval(), Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    seen = [whole_logits(model, photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)).softmax(0)[None] for size in ((64, 48), (96, 72))]
    mean = sum(nn.functional.interpolate(p, size=(72, 96), mode="bilinear") for p in seen)
    want = nn.functional.interpolate(mean, size=(90, 120), mode="bilinear")[0].argmax(0)
    assert 0.2 < want.float().mean() < 0.8
    assert torch.equal(label_maps(model, [photo])[0], want) and (predict(model, photo) == want.numpy()).all()
    model.views = ()
    assert not torch.equal(label_maps(model, [photo])[0], want)


class Half(nn.Module):
    "Says `sure` of red against background in the left half, whatever is there, and `sure` of the background in the right."
    mean, std, names, views, edges = (0, 0, 0), (1, 1, 1), ["red"], (64,), None
    sure = 2.0
    def forward(self, x):
        left = self.sure * (2.0 * (torch.arange(x.shape[-1]) < x.shape[-1] // 2) - 1).expand(x.shape[0], *x.shape[-2:])
        return torch.stack([-left, left], 1)


def test_an_opinion_is_drawn_to_the_edges_of_the_photograph():
    pixels = np.full((48, 64, 3), 40, np.uint8)
    pixels[:, :40] = 220                                 # the thing ends at column 40, the network says 32
    model, photo = Half().eval(), Image.fromarray(pixels)
    rough = label_maps(model, [photo])[0]
    assert rough[:, :32].all() and not rough[:, 32:].any()
    model.edges = 64.0
    fine = label_maps(model, [photo])[0]
    want = np.stack([bilateral_solve(pixels, p.numpy(), 64.0) for p in whole_logits(model, photo).softmax(0)])
    assert np.array_equal(fine.numpy(), want.argmax(0)) and (predict(model, photo) == want.argmax(0)).all()
    assert fine[:, :40].all() and not fine[:, 40:].any()


def test_a_class_that_is_nowhere_is_not_drawn():
    opinion = torch.tensor([0.9, 0.0, 0.05])[:, None, None].expand(3, 6, 8).clone()
    opinion[2, 0, 0] = 0.1
    drawn = to_edges(opinion, Image.new("RGB", (16, 12)), 64.0)
    assert torch.equal(drawn[1:], opinion[1:]) and torch.allclose(drawn[0], opinion[0], atol=1e-3)
