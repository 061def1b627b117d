"""Prediction: any size at bounded memory, tiles without seams, formats, folders, broken files."""
import contextlib, copy, io, json, os, stat, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from pycocotools.coco import COCO
from torch import nn

from namedmask.core import UserError, read_json
from namedmask.predict import cuts, gather_photos, journal, legend, model_key, overlay_image, predict, predict_many, tile_size
from namedmask.viz import lettering, letters_of, readable

torch.manual_seed(0)


class Net(nn.Module):
    "A segmenter with a wide view and a global one, random weights; ids depend on the neighbourhood."
    mean, std = [0.5] * 3, [0.25] * 3
    def __init__(self, n=6):
        super().__init__()
        self.names = [f"name {i}" for i in range(1, n)]
        conv = lambda i, o, d: nn.Sequential(nn.Conv2d(i, o, 3, padding=d, dilation=d), nn.ReLU())
        self.body = nn.Sequential(nn.AvgPool2d(8), conv(3, 24, 1), conv(24, 24, 2), conv(24, 24, 3))
        self.look, self.head = nn.Linear(24, 24), nn.Conv2d(24, n, 1)
    def forward(self, x):
        f = self.body(x)
        f = f + 0.1 * self.look(f.mean((2, 3)))[..., None, None]
        return nn.functional.interpolate(self.head(f) * 20, x.shape[-2:], mode="bilinear")


def scene(w, h, seed=0):
    "A picture with soft blobs of all sizes."
    rng, im = np.random.default_rng(seed), Image.new("RGB", (w, h), "white")
    draw = ImageDraw.Draw(im)
    for _ in range(60):
        x, y, r = rng.integers(0, w), rng.integers(0, h), rng.integers(8, max(9, min(w, h) // 4))
        draw.ellipse([x - r, y - r, x + r, y + r], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return im.filter(ImageFilter.GaussianBlur(2))


@pytest.fixture(scope="module")
def model():
    "A network whose classes all occur: its biases even out what random weights prefer."
    torch.manual_seed(1)
    net = Net().eval()
    with torch.inference_mode():
        x = (torch.from_numpy(np.array(scene(600, 600))).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        net.head.bias -= net(x).mean((0, 2, 3)) / 20
    return net


@pytest.mark.parametrize("size", [(1, 1), (1, 777), (3, 2), (63, 64), (64, 65), (517, 389), (4001, 5)])
def test_any_size(model, size):
    labels = predict(model, scene(*size) if min(size) > 20 else Image.new("RGB", size, "green"))
    assert labels.shape == size[::-1] and labels.dtype == np.uint8 and labels.max() <= 5


def test_tiles_cover_and_overlap():
    for length in range(1, 3000, 37):
        for tile in (200, 500, 999):
            c = cuts(length, tile)
            assert c[0][0] == 0 and c[-1][1] == length and all(a % 32 == 0 for a, _ in c) and max(b - a for a, b in c) <= tile + 31
            assert all(a1 - b0 >= tile // 5 - 31 for (_, a1), (b0, _) in zip(c, c[1:]))
    for h, w in [(1, 10**6), (10**6, 1), (5000, 5000), (100, 90), (64, 10**5)]:
        th, tw = tile_size(h, w, 250_000)
        assert th <= h and tw <= w and th * tw <= 250_000


def test_tiled_is_like_untiled(model):
    photo = scene(900, 700)
    whole, tiled = predict(model, photo), predict(model, photo, max_pixels=500 * 500)
    assert len(np.unique(whole)) >= 4
    assert (whole == tiled).mean() > 0.95


def test_a_seam_is_no_edge(model):
    "Labels change along the tiles' edges, and where one tile hands over to the next, no more than in the undivided prediction."
    photo = scene(900, 700, seed=3)
    whole, tiled = predict(model, photo), predict(model, photo, max_pixels=300 * 300)
    changes = lambda m: (m[:, 1:] != m[:, :-1]).mean(0)
    tiles = cuts(900, tile_size(700, 900, 300 * 300)[1])
    for (a0, a1), (b0, b1) in zip(tiles, tiles[1:]):
        for x in (a1, b0, (a1 + b0) // 2):
            near = slice(x - 6, x + 6)
            assert changes(tiled)[near].max() < changes(whole)[near].max() + 0.06


def test_every_pixel_gets_an_opinion():
    "A segmenter that is sure of one class leaves no pixel as background, tiles or not."
    class Sure(nn.Module):
        names, mean, std = ["x"], [0.5] * 3, [0.5] * 3
        def forward(self, x): return torch.cat([torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])], 1)
    for size in ((1000, 800), (65, 1000), (2000, 70)): assert (predict(Sure(), Image.new("RGB", size), max_pixels=5000) == 1).all()


def test_many_names_are_16_bit(tmp_path):
    class Many(nn.Module):
        names, mean, std = [f"n{i}" for i in range(1, 320)], [0.5] * 3, [0.5] * 3
        def forward(self, x): return nn.functional.one_hot((x[:, 0] > 0).long() * 310, 320).permute(0, 3, 1, 2).float()
    photo = Image.new("RGB", (30, 20), "black")
    photo.paste("white", (0, 0, 10, 20))
    photo.save(tmp_path / "p.png")
    labels = predict(Many(), photo)
    assert labels.dtype == np.uint16 and (labels[:, :10] == 310).all() and not labels[:, 10:].any()
    predict_many(Many(), tmp_path / "p.png", tmp_path / "out")
    written = Image.open(tmp_path / "out/p.png.png")
    assert written.mode == "I;16" and np.array_equal(np.array(written), labels)
    overlay_image(photo, labels, Many.names)


def test_mode_is_kept(model):
    model.train()
    predict(model, Image.new("RGB", (10, 10)))
    assert model.training
    model.eval()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    for k, name in enumerate(["cat.jpg", "cat.png", "sub/cat.jpg", "sub/é è/日本.webp", "odd name #1.bmp"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        scene(60 + k, 50, k).save(root / name)
    (root / "empty.jpg").write_bytes(b"")
    (root / "half.jpg").write_bytes((root / "cat.jpg").read_bytes()[:400])
    (root / "text.jpg").write_text("not a photograph")
    return root


GOOD = {"cat.jpg", "cat.png", "sub/cat.jpg", "sub/é è/日本.webp", "odd name #1.bmp"}


@pytest.mark.parametrize("format, ending", [("png", ".png"), ("overlay", ".overlay.jpg"), ("npz", ".npz")])
def test_folder_formats(model, folder, tmp_path, format, ending):
    out = tmp_path / "new" / "out"
    r = predict_many(model, folder, out, format, progress=None)
    assert set(r.done) == GOOD and all(s["reason"] for s in r.skipped)
    assert {s["photo"] for s in r.skipped} == {"empty.jpg", "half.jpg", "text.jpg"}
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {g + ending for g in GOOD} | ({"names.json"} if format == "png" else set())
    for g in GOOD:
        want = predict(model, Image.open(folder / g).convert("RGB"))
        if format == "png": got = np.array(Image.open(out / (g + ending)))
        elif format == "npz":
            z = np.load(out / (g + ending), allow_pickle=False)
            got = z["labels"]
            assert z["names"].tolist() == ["background", *model.names]
        else: continue
        assert np.array_equal(got, want)


def test_palette_png(model, folder, tmp_path):
    predict_many(model, folder / "cat.jpg", tmp_path / "o", progress=None)
    im = Image.open(tmp_path / "o/cat.jpg.png")
    assert im.mode == "P" and im.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert read_json(tmp_path / "o/names.json") == ["background", *model.names]


def test_coco(model, folder, tmp_path):
    r = predict_many(model, folder, tmp_path / "o", "coco", progress=None)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "o/predictions.json")
        again = coco.loadRes([dict(a, score=1.0) for a in coco.dataset["annotations"]])
    assert {im["file_name"] for im in coco.dataset["images"]} == set(r.done) == GOOD and len(again.anns) == len(coco.anns) > 0
    assert [c["name"] for c in coco.dataset["categories"]] == model.names
    for im in coco.dataset["images"]:
        labels = predict(model, Image.open(folder / im["file_name"]).convert("RGB"))
        assert (im["height"], im["width"]) == labels.shape
        anns = coco.imgToAnns[im["id"]]
        assert {a["category_id"] for a in anns} == set(np.unique(labels)) - {0}
        for a in anns:
            m = coco.annToMask(a).astype(bool)
            ys, xs = np.nonzero(m)
            assert np.array_equal(m, labels == a["category_id"]) and a["area"] == m.sum()
            assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_inputs_that_meet(model, folder, tmp_path):
    found, _ = gather_photos([folder / "cat.jpg", folder / "sub/cat.jpg", folder, folder / "cat.jpg"], tmp_path / "o")
    names = [n for _, n in found]
    assert len(names) == len(set(names)) == 8 and len({p.resolve() for p, _ in found}) == 8     # five good and three broken ones, each once
    assert names[:2] == ["cat.jpg", "sub/cat.jpg"]


def test_out_inside_in_is_no_input(model, folder):
    out = folder / "predictions"
    first = predict_many(model, folder, out, "overlay", progress=None)
    second = predict_many(model, folder, out, "overlay", progress=None)
    assert first.done == second.done and first.skipped == second.skipped


def test_errors(model, folder, tmp_path):
    (tmp_path / "void").mkdir()
    (tmp_path / "file").write_text("x")
    o = tmp_path / "o"
    for photos, out, format, says in [(tmp_path / "no.jpg", o, "png", "There is no"), (tmp_path / "void", o, "png", "No photographs"),
                                      (folder, o, "gif", "There are: png"), (folder, tmp_path / "file", "png", "is a file"),
                                      (folder, tmp_path / "file/below", "png", "Cannot write"), ([], o, "png", "No photographs")]:
        with pytest.raises(UserError, match=says): predict_many(model, photos, out, format, progress=None)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_read_only(model, folder, tmp_path):
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError): predict_many(model, folder, tmp_path / "ro", progress=None)


def test_too_large_is_skipped(model, folder, tmp_path):
    r = predict_many(model, folder, tmp_path / "o", max_pixels=61 * 50, progress=None)
    assert set(r.done) == {"cat.jpg", "cat.png"} and any("guard" in s["reason"] for s in r.skipped)


def test_nothing_half_written(model, folder, tmp_path, monkeypatch):
    "A failure in the middle of a write leaves the old file and no scraps."
    predict_many(model, folder / "cat.jpg", tmp_path / "o", progress=None)
    before = (tmp_path / "o/cat.jpg.png").read_bytes()
    def dies(self, f, *a, **k):
        f.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(Image.Image, "save", dies)
    with pytest.raises(KeyboardInterrupt): predict_many(model, folder / "cat.jpg", tmp_path / "o", progress=None)
    assert (tmp_path / "o/cat.jpg.png").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["cat.jpg.png", "names.json"]


@pytest.mark.parametrize("size", [(1, 1), (9, 4), (4000, 30), (30, 4000), (300, 200), (5000, 4000)])
def test_overlay_sizes(size):
    labels = np.zeros(size[::-1], np.uint8)
    labels[: max(1, size[1] // 2)] = 3
    im = overlay_image(Image.new("RGB", size, "grey"), labels, ["a", "b", "a rather long name " * 9])
    assert 240 <= im.width <= 2048 and im.height < 2048 + 400 and im.mode == "RGB"


def test_legend_fits_and_lists_all():
    strip = legend([(f"name {i}", (i, 0, 0)) for i in range(1, 40)], 300, 16)
    colours = {c for _, c in strip.getcolors(100_000)}
    assert strip.width == 300 and all((i, 0, 0) in colours for i in range(1, 40))
    assert legend([("ж" * 500, (9, 9, 9))], 240, 14).width == 240


LARGE = """
import resource, sys, torch
from PIL import Image
from torch import nn
from namedmask.predict import predict
torch.set_num_threads(1)
class Net(nn.Module):
    names, mean, std = [f"n{i}" for i in range(20)], [0.5]*3, [0.5]*3
    def __init__(self): super().__init__(); self.c = nn.Conv2d(3, 21, 1)
    def forward(self, x): return self.c(x)
side = int(sys.argv[1])
predict(Net(), Image.new("RGB", (side, side), "orange"), max_pixels=512*512)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_is_bounded():
    "16 megapixels with 21 classes: undivided logits would need 1.3 GB; the growth over one megapixel is photo and label map."
    run = lambda side: subprocess.run([sys.executable, "-c", LARGE, str(side)], capture_output=True, text=True, check=True).stdout
    peak = {side: int(run(side)) for side in (1000, 4000)}
    assert peak[4000] - peak[1000] < 16 * 3 + 16 * 1 + 64, peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_is_near(model):
    photo = scene(500, 400)
    same = predict(model.cuda(), photo, "cuda")
    assert (predict(model.cpu(), photo) == same).mean() > 0.99


# Going on after an interruption

class Halt:
    "A progress bar that ends the job after `n` photographs."
    def __init__(self, n, error=KeyboardInterrupt): self.n, self.error = n, error
    def __call__(self, photos, *args, **kwargs):
        for k, photo in enumerate(photos):
            if k == self.n: raise self.error
            yield photo


def passes(model, *args, **kwargs):
    "How often the segmenter was asked, and what `predict_many` said."
    asked = []
    hook = model.register_forward_hook(lambda *a: asked.append(1))
    try: return (predict_many(model, *args, progress=None, **kwargs), len(asked))
    finally: hook.remove()


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("format", ["png", "overlay", "coco"])
def test_an_interrupted_job_goes_on(model, folder, tmp_path, format):
    "The same files as an unbroken job, and nothing predicted twice."
    whole = predict_many(model, folder, tmp_path / "whole", format, progress=None)
    with pytest.raises(KeyboardInterrupt): predict_many(model, folder, tmp_path / "o", format, progress=Halt(4))
    assert (tmp_path / "o" / f".predicting-{format}" / "done.jsonl").read_text().count("\n") >= 2
    assert not (tmp_path / "o/predictions.json").exists()
    done = (tmp_path / "o" / f".predicting-{format}" / "done.jsonl").read_text().count("\n")
    again, asked = passes(model, folder, tmp_path / "o", format)
    assert asked == len(GOOD) - done and again == whole
    assert files(tmp_path / "o") == files(tmp_path / "whole")
    assert passes(model, folder, tmp_path / "o", format)[1] == len(GOOD)      # a finished job is done afresh


def test_only_what_still_holds_is_reused(model, folder, tmp_path):
    "Another photograph under an old name, a lost result, a line cut by a kill: predicted again."
    out = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt): predict_many(model, folder, out, progress=Halt(6))
    journal = out / ".predicting-png/done.jsonl"
    done = [json.loads(line)["photo"] for line in journal.read_text().splitlines()]
    assert len(done) == 4
    scene(60, 50, 9).save(folder / done[0])
    (out / f"{done[1]}.png").unlink()
    journal.write_bytes(journal.read_bytes()[:-5])
    assert passes(model, folder, out)[1] == 4                                  # these three, and the one that was not reached
    predict_many(model, folder, tmp_path / "whole", progress=None)
    assert files(out) == files(tmp_path / "whole")


def test_another_segmenter_starts_afresh(model, folder, tmp_path):
    with pytest.raises(KeyboardInterrupt): predict_many(model, folder, tmp_path / "o", "coco", progress=Halt(7))
    other = copy.deepcopy(model)
    other.names = [n.upper() for n in model.names]
    assert model_key(other) != model_key(model) == model_key(copy.deepcopy(model))
    assert passes(other, folder, tmp_path / "o", "coco")[1] == len(GOOD)


def test_two_jobs_do_not_meet(model, folder, tmp_path):
    with journal(tmp_path / "o/.predicting-png"), pytest.raises(UserError, match="Another process"):
        predict_many(model, folder, tmp_path / "o", progress=None)
    predict_many(model, folder, tmp_path / "o", progress=None)


KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[4])
torch.set_num_threads(1)
from test_predict import Net
from namedmask.predict import predict_many
torch.manual_seed(1)
net = Net().eval()
if sys.argv[3] == "slow": net.register_forward_hook(lambda *a: (print("one", flush=True), time.sleep(0.3)) and None)
predict_many(net, sys.argv[1], sys.argv[2], "coco", progress=None)
"""


def test_sigkill(folder, tmp_path):
    run = lambda out, pace: subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(out), pace, str(Path(__file__).parent)], stdout=subprocess.PIPE)
    job = run(tmp_path / "o", "slow")
    for _ in range(3): job.stdout.readline()
    job.kill(); job.wait()
    assert (tmp_path / "o/.predicting-coco/done.jsonl").exists() and not (tmp_path / "o/predictions.json").exists()
    assert run(tmp_path / "o", "fast").wait() == run(tmp_path / "whole", "fast").wait() == 0
    assert files(tmp_path / "o") == files(tmp_path / "whole")


def test_coco_of_odd_names(model, tmp_path):
    "Names that are no valid Unicode, names of no photographs, and a photograph with nothing in it."
    odd = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / "in").mkdir()
    for k, n in enumerate((odd, "new\nline.png", "\U0001f431.jpg")): scene(60, 50, k).save(tmp_path / "in" / n, "PNG")
    predict_many(model, tmp_path / "in", tmp_path / "o", "coco", progress=None)
    with contextlib.redirect_stdout(io.StringIO()): coco = COCO(str(tmp_path / "o/predictions.json"))
    assert {im["file_name"] for im in coco.dataset["images"]} == {odd, "new\nline.png", "\U0001f431.jpg"}
    assert all(set(im) == {"id", "file_name", "width", "height"} for im in coco.dataset["images"])
    assert all(set(a) == {"id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd"} and a["iscrowd"] == 0 for a in coco.dataset["annotations"])
    assert [a["id"] for a in coco.dataset["annotations"]] == list(range(1, len(coco.anns) + 1))


def test_tiles_lie_on_the_grid():
    "Only the last tile may end off the network's grid, for a tile that does is stretched."
    for length in range(1, 5000, 53):
        for tile in (64, 100, 300, 450, 1224): assert all(a % 32 == 0 and b % 32 == 0 for a, b in cuts(length, tile)[:-1])


# Letters

def test_no_empty_boxes():
    "What no font can write is called by its number; what some font has the letters of is written."
    lost = "\U000f0000"
    assert readable("größe", 1) == "größe" and readable(lost, 3) == "name 3" and readable(f"cat {lost}", 4) == "cat (name 4)"
    assert readable("", 2) == "name 2" and readable("\u200d", 5) == "name 5"
    for text in ("größe", "кошка", "γάτα", "قطة", "a" + lost, "猫"):
        for part, font in lettering(text, 16): assert {ord(c) for c in part} <= letters_of(font.path)
    photo, labels = Image.new("RGB", (300, 200), "grey"), np.ones((200, 300), np.uint8)
    assert overlay_image(photo, labels, [lost]).tobytes() == overlay_image(photo, labels, ["name 1"]).tobytes()
