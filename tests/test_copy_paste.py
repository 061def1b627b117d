"The training set: its distribution, its colours against torchvision's, what breaks, and its speed."
import logging, time
from pathlib import Path

import cv2, numpy as np, pytest, torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch.utils.data import DataLoader

from namedmask.copy_paste import (Augment, ByteCache, CopyPaste, Item, augment, blur, colour_jitter, label_type, make_items,
                                  normalise, pad, paste, read_item, resize, scale_and_crop)
from namedmask.core import UserError, mask_file, write_mask

STILL = dict(jitter_p=0., grey=0., blur=0., flip=0.)  # an Augment that leaves colours and sides alone


def picture(rng, h=60, w=80):
    "A smooth coloured picture with a textured ellipse, and its mask."
    x = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
    yy, xx = np.mgrid[:h, :w]
    mask = ((yy - h / 2) / (h / 4))**2 + ((xx - w / 2) / (w / 4))**2 < 1
    x[mask] = rng.integers(0, 256, (int(mask.sum()), 3), np.uint8)
    return x, mask


@pytest.fixture
def items(tmp_path):
    rng, archive = np.random.default_rng(0), {}
    for name, n in ("a", 2), ("b", 5), ("c", 1):
        archive[name] = [f"{name}{k}.png" for k in range(n)]
        for p in archive[name]:
            x, mask = picture(rng)
            Image.fromarray(x).save(tmp_path / p)
            write_mask(mask_file(tmp_path / "masks", p), mask)
    return make_items(archive, tmp_path, tmp_path / "masks")[0]


def evenly(counts, z=4.5):
    "Whether counts are what equal probabilities would give, within `z` deviations each."
    counts = np.asarray(counts); n, p = counts.sum(), 1 / len(counts)
    return (abs(counts - n * p) < z * (n * p * (1 - p))**.5).all()


# ---- the distribution

def test_scale_is_uniform():
    rng, photo, mask = np.random.default_rng(0), np.zeros((200, 300, 3), np.uint8), np.zeros((200, 300), np.uint8)
    s = [scale_and_crop(photo, mask, Augment(), rng)[1].shape[1] / 300 for _ in range(2000)]
    assert min(s) >= .095 and max(s) <= 1 and evenly(np.histogram(s, 9, (.1, 1.))[0])


def test_window_is_uniform():
    rng = np.random.default_rng(0)
    photo = np.repeat(np.arange(100, dtype=np.uint8)[:, None, None], 60, 1).repeat(3, 2)
    tops = [scale_and_crop(photo, photo[..., 0], Augment(crop=91, scale=(1., 1.), flip=0), rng)[1][0, 0] for _ in range(2000)]
    assert evenly(np.bincount(tops, minlength=10)) and len(np.bincount(tops)) == 10


def test_corner_and_flip_are_unbiased():
    rng, counts = np.random.default_rng(0), {}
    photo = np.zeros((20, 30, 3), np.uint8); photo[:, 15:] = 255
    for _ in range(2000):
        x, m = scale_and_crop(photo, np.zeros((20, 30), np.uint8), Augment(crop=64), rng)
        flipped = x[0, 0, 0] > x[0, -1, 0]
        _, l = pad(x, m, np.zeros(3, np.uint8), Augment(crop=64), rng)
        ys, xs = np.nonzero(l != 255)
        corner = bool(ys.min()), bool(xs.min())
        assert ys.min() * (63 - ys.max()) == 0 == xs.min() * (63 - xs.max())
        counts[flipped, *corner] = counts.get((flipped, *corner), 0) + 1
    assert len(counts) == 8 and evenly(list(counts.values()))


def test_padding_has_the_mean_colour():
    rng = np.random.default_rng(0)
    photo, mask = picture(rng)
    fill = photo.mean((0, 1)).round().astype(np.uint8)
    x, l = augment(photo, mask.astype(np.uint8), fill, 1, Augment(crop=100, **STILL), rng)
    assert (x[l == 255] == fill).all() and set(np.unique(l)) == {0, 1, 255}


def test_colour_probabilities():
    photo = np.dstack([np.full((9, 9), v, np.uint8) for v in (200, 90, 30)])
    flat, n, rng = np.zeros((9, 9), np.uint8), 1000, np.random.default_rng(0)
    look = lambda **kw: [augment(photo, flat, photo[0, 0], 1, Augment(crop=9, scale=(1., 1.), **(STILL | kw)), rng)[0] for _ in range(n)]
    grey = sum(np.ptp(x[0, 0]) <= 1 for x in look(grey=.2))
    changed = sum((x != photo).any() for x in look(jitter_p=.8))
    assert abs(grey / n - .2) < .05 and abs(changed / n - .8) < .05
    photo = np.random.default_rng(1).integers(0, 256, (9, 9, 3), np.uint8)
    assert abs(sum((x != photo).any() for x in look(blur=.5)) / n - .5) < .09   # a sigma near 0.1 blurs nothing


def test_names_first_then_photographs(items):
    few = [it for it in items if it.label == 1][:1] + [it for it in items if it.label != 1]
    ds = CopyPaste(few, Augment(crop=32, by_name=True, **STILL), length=1)
    rng = np.random.default_rng(0)
    seen = [ds.draw(ds.pools, rng)[2] for _ in range(1500)]
    assert evenly(np.bincount(seen)[1:])
    ds = CopyPaste(few, Augment(crop=32, **STILL), length=1)                 # the paper: any item, so that a name counts as often as it has photographs
    seen = np.bincount([ds.draw(ds.pools, rng)[2] for _ in range(2000)], minlength=4)[1:] / 2000
    assert np.abs(seen - np.bincount([it.label for it in few])[1:] / len(few)).max() < .04


def test_an_empty_mask_is_a_sample_of_background(items):
    it = items[0]
    write_mask(it.mask, np.zeros((60, 80), bool))
    (_, labels), = CopyPaste([it], Augment(crop=32, max_n_masks=1, **STILL))
    assert set(labels.unique().tolist()) <= {0, 255}
    with pytest.raises(UserError, match="is empty"): list(CopyPaste([it], Augment(crop=32, empty=False, **STILL)))


def test_one_to_max_things(items):
    ds, calls = CopyPaste(items, Augment(crop=32, max_n_masks=3, **STILL), length=900), []
    ds.sample = lambda m, rng: calls.append(m)
    for i in range(900): ds[i]
    assert set(calls) == {1, 2, 3} and evenly(np.bincount(calls)[1:])


def test_paste_is_uniform_and_whole():
    rng, places = np.random.default_rng(0), np.zeros((7, 5), int)
    thing = np.zeros((9, 9), bool); thing[3:6, 4:9] = True; thing[4, 5] = False       # 3×5 with a hole, touching the border
    other = rng.integers(1, 256, (9, 9, 3), np.uint8)
    for _ in range(3500):
        image, labels = np.zeros((9, 9, 3), np.uint8), np.full((9, 9), 255, np.uint8)
        assert paste(image, labels, other, thing, 7, rng)
        y, x = (a.min() for a in np.nonzero(labels == 7))
        assert ((labels == 7)[y:y + 3, x:x + 5] == thing[3:6, 4:9]).all() and (labels == 7).sum() == 14
        assert (image[labels == 7] == other[thing]).all() and not image[labels != 7].any()
        places[y, x] += 1
    assert evenly(places.ravel())


def test_paste_fills_the_sample():
    image, labels, rng = np.zeros((5, 5, 3), np.uint8), np.zeros((5, 5), np.uint8), np.random.default_rng(0)
    assert paste(image, labels, np.full((5, 5, 3), 3, np.uint8), np.ones((5, 5), bool), 1, rng) and labels.all() and (image == 3).all()


# ---- colours

@pytest.mark.parametrize("seed", range(8))
def test_jitter_is_torchvisions(seed):
    rng = np.random.default_rng(seed)
    photo, mask = picture(rng, 90, 70)
    fill = photo.mean((0, 1)).round().astype(np.uint8)
    aug, order = Augment(crop=128), rng.permutation(4)
    factors = [*rng.uniform(.2, 1.8, 3), rng.uniform(-.2, .2)]
    padded = lambda p, f: pad(p, mask.astype(np.uint8), f, aug, np.random.default_rng(5))[0]
    theirs = torch.from_numpy(padded(photo, fill)).permute(2, 0, 1)
    for k in order: theirs = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[k](theirs, float(factors[k]))
    ours = padded(*colour_jitter(photo, fill, mask.size / 128**2, factors, order))
    differ = abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy())
    assert differ.mean() < 2 and np.quantile(differ, .99) <= 16   # hue in bytes is coarse where a colour is strong


@pytest.mark.parametrize("sigma", [.1, .5, 1., 2.])
def test_blur_is_torchvisions(sigma):
    photo, _ = picture(np.random.default_rng(0))
    theirs = TF.gaussian_blur(torch.from_numpy(photo).permute(2, 0, 1), [39, 39], [sigma, sigma]).permute(1, 2, 0).numpy()
    assert abs(blur(photo, sigma).astype(int) - theirs).max() <= 2


@pytest.mark.parametrize("size", [(31, 40), (7, 5), (60, 80), (1, 1)])
def test_resize_is_pillows(size):
    photo, mask = picture(np.random.default_rng(0))
    x, m = resize(photo, mask.astype(np.uint8), size)
    assert x.shape == (*size, 3) and m.shape == size
    assert abs(x.astype(int) - np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR))).max() <= 2
    assert (m != np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))).mean() < .02


# ---- the set

def test_a_sample_is_a_function_of_seed_and_number(items):
    kw = dict(augment=Augment(crop=48), seed=3, length=24)
    ds = CopyPaste(items, **kw)
    for cache_bytes in 0, 2**20:
        loader = DataLoader(CopyPaste(items, cache_bytes=cache_bytes, **kw), batch_size=5, num_workers=2)
        xb, yb = (torch.cat(t) for t in zip(*loader))
        assert xb.shape == (24, 3, 48, 48) and xb.dtype == yb.dtype == torch.uint8 and yb.shape == (24, 48, 48)
        for i in (17, 0, 23): assert torch.equal(ds[i][0], xb[i]) and torch.equal(ds[i][1], yb[i])
    assert len({xb[i].numpy().tobytes() for i in range(24)}) == 24
    assert normalise(xb, (.5,) * 3, (.5,) * 3).abs().max() <= 1 + 1e-5
    with pytest.raises(IndexError): ds[24]


def test_two_names_of_one_photograph(items, tmp_path):
    both, _ = make_items({"x": ["a0.png"], "y": ["a0.png"]}, tmp_path, tmp_path / "masks")
    assert [it.label for it in both] == [1, 2]
    ds = CopyPaste(both, Augment(crop=40, max_n_masks=1, scale=(.5, .5), **STILL), length=60)
    assert {int(l[l < 255].max()) for _, l in ds} == {1, 2}
    assert len(ds.cache.kept) == 1                                       # decoded once for both


def test_many_names_and_another_ignore(items):
    far = [Item(items[0].photo, items[0].mask, 919), items[1]]
    ds = CopyPaste(far, Augment(crop=90, ignore=1000, scale=(.3, .9)), length=30)
    ids = set(np.unique(np.stack([l.numpy() for _, l in ds])))
    assert ids == {0, 1, 919, 1000} and ds[0][1].dtype == torch.int16 and label_type(254, 255) is np.uint8


@pytest.mark.parametrize("size", [(1, 1), (3, 300), (9, 9), (700, 2)])
def test_tiny_photographs(size, tmp_path):
    Image.fromarray(np.full((*size, 3), 77, np.uint8)).save(tmp_path / "a.png")
    write_mask(tmp_path / "m.json", np.ones(size, bool))
    for im, l in CopyPaste([Item(tmp_path / "a.png", tmp_path / "m.json", 1)], Augment(crop=32), length=30):
        assert im.shape == (3, 32, 32) and l.shape == (32, 32)


def test_large_photographs_are_reduced(tmp_path):
    mask = np.zeros((1001, 1503), bool); mask[:500] = True
    x = np.zeros((1001, 1503, 3), np.uint8); x[:500] = 200
    Image.fromarray(x).save(tmp_path / "a.jpg", quality=95)
    write_mask(tmp_path / "m.json", mask)
    for side, size in (640, (426, 640)), (300, (200, 300)), (5000, (1001, 1503)):
        photo, m, _ = read_item(tmp_path / "a.jpg", tmp_path / "m.json", side)
        assert photo.shape == (*size, 3) and m.shape == size and ((photo[..., 0] > 100) == (m > 0)).mean() > .99


def test_a_photograph_turned_by_exif(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6                                 # stored lying, shown upright
    x = np.zeros((300, 400, 3), np.uint8); x[:, :200] = 200
    Image.fromarray(x).save(tmp_path / "a.jpg", exif=exif)
    mask = np.zeros((400, 300), bool); mask[:200] = True
    write_mask(tmp_path / "m.json", mask)
    photo, m, _ = read_item(tmp_path / "a.jpg", tmp_path / "m.json", 200)
    assert m.shape == (200, 150) and ((photo[..., 0] > 100) == (m > 0)).mean() > .98


def test_negatives_lie_at_the_bottom(items, tmp_path):
    Image.new("RGB", (90, 90), (0, 255, 0)).save(tmp_path / "green.png")
    aug = Augment(crop=48, max_n_masks=1, scale=(1., 1.), negatives=.4, **STILL)
    ds = CopyPaste(items, aug, negatives=[tmp_path / "green.png"], length=500)
    green = [not l.any() for _, l in ds]
    assert abs(np.mean(green) - .4) < .08
    assert all((im[1] == 255).all() for (im, l), g in zip(ds, green) if g)


def test_things_that_break_midway(items, tmp_path, caplog):
    good = [it for it in items if it.label != 2]
    bad = [it for it in items if it.label == 2]
    bad[0].photo.unlink()
    bad[1].photo.write_bytes(b"")
    bad[2].mask.unlink()
    write_mask(bad[3].mask, np.ones((5, 5), bool))
    write_mask(bad[4].mask, np.zeros((60, 80), bool))
    ds = CopyPaste(items, Augment(crop=32, empty=False), length=80)
    with caplog.at_level(logging.WARNING): samples = list(ds)
    assert {int(v) for _, l in samples for v in l.unique()} <= {0, 1, 3, 255}
    assert set(ds.bad) == set(bad) and len(caplog.records) == 5           # each once
    again = CopyPaste(items, Augment(crop=32, empty=False), length=80)
    assert all(torch.equal(a[0], again[i][0]) for i, a in reversed(list(enumerate(samples))))
    for it in good: it.photo.unlink()
    with pytest.raises(UserError, match="None of the 8 photographs"): list(CopyPaste(items, Augment(crop=32, empty=False)))


def test_nothing_to_train_on(tmp_path):
    items, skipped = make_items({"a": ["x.jpg"], "b": []}, tmp_path, tmp_path)
    assert items == [] and skipped[0]["photo"] == "x.jpg" and skipped[0]["name"] == "a"
    with pytest.raises(UserError, match="nothing to train on"): CopyPaste(items)


def test_the_cache_keeps_its_budget():
    cache = ByteCache(1000)
    for k in range(50): cache.get(k % 13, lambda key: (np.zeros(90 + key, np.uint8), np.zeros(3, np.uint8)))
    assert cache.used <= 1000 and cache.used == sum(a.nbytes for v in cache.kept.values() for a in v)


def test_speed(tmp_path):
    "At least 100 samples a second of one core's time, with two things each, at 384 px, from photographs of 400 px."
    rng = np.random.default_rng(0)
    for k in range(8):
        x, mask = picture(rng, 300, 400)
        Image.fromarray(x).save(tmp_path / f"{k}.jpg")
        write_mask(mask_file(tmp_path, f"{k}.jpg"), mask)
    items, _ = make_items({"a": [f"{k}.jpg" for k in range(8)]}, tmp_path, tmp_path)
    ds, threads = CopyPaste(items), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(20): ds.sample(2, rng)
        start = time.thread_time()
        for _ in range(60): ds.sample(2, rng)
        assert 60 / (time.thread_time() - start) > 100
    finally: torch.set_num_threads(threads)


def test_ignore_is_no_label(items):
    with pytest.raises(ValueError, match="ignore"): CopyPaste([*items, Item(items[0].photo, items[0].mask, 255)])
