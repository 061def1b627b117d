"""The training set, choice by choice, against the paper's distribution, with statistics over many samples.

Where it can be, a choice is read off the samples themselves: the pictures are made so that they show what was done to them. Every
test is seeded and can fail: a wrong range, a biased corner or a lost row each make one of them do so. The level is 1e-4 for each.
"""
import colorsys
from itertools import permutations

import cv2, numpy as np, pytest, torch
import torchvision.transforms.v2 as T
from PIL import Image
from scipy.stats import binomtest, chi2_contingency, chisquare, kstest, ks_2samp, uniform

import namedmask.copy_paste as cp
from namedmask.copy_paste import Augment, CopyPaste, Item, augment, blur, colour_jitter, make_items, pad, read_item
from namedmask.core import mask_file, write_mask

PAPER = dict(side=None)                                                                      # the other defaults are the paper's
STILL = dict(scale=(1., 1.), flip=0., jitter_p=0., grey=0., blur=0., side=None)              # nothing happens


def plausible(p): return p > 1e-4
def is_uniform(values, low, high): return plausible(kstest(values, uniform(low, high - low).cdf).pvalue)
def even(values, choices):
    "Whether all of `choices` occur, equally often, and nothing else does."
    counts = [sum(v == c for v in values) for c in choices]
    return sum(counts) == len(values) and (len(counts) == 1 or plausible(chisquare(counts).pvalue))
def happens(flags, p): return plausible(binomtest(int(sum(flags)), len(flags), p).pvalue)
def independent(a, b):
    "Whether two lists of small integers (or bools) know nothing of each other."
    table = np.zeros((int(max(a)) + 1, int(max(b)) + 1)); np.add.at(table, (np.asarray(a, int), np.asarray(b, int)), 1)
    return plausible(chi2_contingency(table).pvalue)


def flat(colour, h=8, w=8): return np.full((h, w, 3), colour, np.uint8)
def none(h=8, w=8): return np.zeros((h, w), np.uint8)
def mean_of(photo): return np.round(photo.mean((0, 1))).astype(np.uint8)


@pytest.fixture
def spy(monkeypatch):
    "Records the arguments of a function of the module that is called on the way."
    def spy(name):
        calls, real = [], getattr(cp, name)
        def note(*args, **kw): calls.append(args); return real(*args, **kw)
        monkeypatch.setattr(cp, name, note)
        return calls
    return spy


@pytest.fixture
def write(tmp_path):
    "Writes a photograph and its mask and returns the item."
    def write(photo, mask, label, name=None):
        name = name or f"{label}.png"
        Image.fromarray(photo).save(tmp_path / name)
        write_mask(mask_file(tmp_path / "masks", name), mask.astype(bool))
        return Item(tmp_path / name, mask_file(tmp_path / "masks", name), label)
    return write


def test_the_defaults_are_the_papers():
    a = Augment()
    assert (a.crop, a.scale, a.max_n_masks, a.flip, a.jitter, a.jitter_p) == (384, (.1, 1.), 2, .5, (.8, .8, .8, .2), .8)
    assert (a.grey, a.blur, a.sigma, a.ignore, a.negatives) == (.2, .5, (.1, 2.), 255, 0)


# ---- scale, window, corner, mirror

def test_the_scale_is_uniform():
    "Read off the size of what is not padding."
    rng, strip = np.random.default_rng(0), flat(0, 1, 384)
    widths = [(augment(strip, none(1, 384), strip[0, 0], 1, Augment(jitter_p=0, grey=0, blur=0), rng)[1] == 0).sum() for _ in range(1500)]
    assert min(widths) >= 38 and is_uniform(np.array(widths) / 384, .1, 1.)


def test_both_sides_have_one_scale():
    rng, aug = np.random.default_rng(0), Augment(crop=200)
    for _ in range(100):
        h, w = cp.scale_and_crop(flat(0, 150, 200), none(150, 200), aug, rng)[1].shape
        assert abs(h / 150 - w / 200) <= .5 / 150 + .5 / 200 + 1e-9


def coordinates(h, w):
    "A picture that says where each of its pixels was: y in the first channel, x in the second."
    yy, xx = np.mgrid[:h, :w]
    return np.dstack([yy, xx, 0 * yy]).astype(np.uint8)


def test_the_window_lies_anywhere():
    rng, photo, aug = np.random.default_rng(0), coordinates(100, 120), Augment(crop=90, **STILL | dict(flip=.5))
    seen = []
    for _ in range(6000):
        x, l = augment(photo, none(100, 120), photo[0, 0], 1, aug, rng)
        flipped = x[0, 0, 1] > x[0, -1, 1]
        if flipped: x = x[:, ::-1]
        y0, x0 = (int(v) for v in x[0, 0, :2])
        assert (x == photo[y0:y0 + 90, x0:x0 + 90]).all() and not l.any()
        seen.append((y0, x0, flipped))
    ys, xs, flips = zip(*seen)
    assert even(ys, range(11)) and even(xs, range(31)) and happens(flips, .5)
    assert independent(ys, xs) and independent(xs, flips) and independent(ys, flips)


@pytest.mark.parametrize("side", [384, 385, 386])
def test_the_window_at_the_papers_size(side):
    rng, photo = np.random.default_rng(side), np.zeros((side, 400, 3), np.uint8)
    photo[:3] = [[[10]], [[20]], [[30]]]
    tops = [augment(photo, none(side, 400), photo[0, 0], 1, Augment(**STILL), rng)[0][0, 0, 0] for _ in range(150)]
    assert even(tops, {384: [10], 385: [10, 20], 386: [10, 20, 30]}[side])


def test_the_corner_and_the_mirror_are_fair():
    rng, seen, photo = np.random.default_rng(0), [], flat(0, 20, 30)
    photo[:, :15] = 255
    for _ in range(3000):
        x, l = augment(photo, none(20, 30), flat(9)[0, 0], 1, Augment(crop=64, **STILL | dict(flip=.5)), rng)
        ys, xs = np.nonzero(l == 0)
        assert (l != 255).sum() == 600 and ys[0] in (0, 44) and xs[0] in (0, 34)              # whole, and in a corner
        seen.append(4 * (ys[0] > 0) + 2 * (xs[0] > 0) + (x[ys[0], xs[0], 0] == 0))
    assert even(seen, range(8))                                                              # 4 corners × 2 sides


def test_photograph_and_mask_stay_together():
    "Whatever happens to the sides of one happens to the other."
    rng, photo, mask = np.random.default_rng(0), flat(0, 60, 80), none(60, 80)
    mask[:20, :30] = 1; photo[mask > 0] = 255
    for _ in range(200):
        x, l = augment(photo, mask, photo[0, 0], 1, Augment(crop=32, **STILL | dict(scale=(.2, 1.), flip=.5)), rng)
        assert (((x[..., 0] > 127) == (l == 1)) | (l == 255)).mean() > .95


def test_only_the_short_side_is_padded():
    rng, seen = np.random.default_rng(0), []
    photo = np.dstack([np.tile(np.arange(70, dtype=np.uint8), (20, 1))] * 3)
    for _ in range(1500):
        x, l = augment(photo, none(20, 70), flat(0)[0, 0], 1, Augment(crop=64, **STILL), rng)
        rows = np.flatnonzero((l == 0).any(1))
        assert (l[rows] == 0).all() and len(rows) == 20 and rows[0] in (0, 44)
        seen.append(7 * (rows[0] > 0) + int(x[rows[0], 0, 0]))
    assert even(seen, range(14))                                                             # top or bottom × 7 windows


@pytest.mark.parametrize("ignore", [255, 1000])
def test_padding_is_the_mean_colour_and_ignored(ignore, write):
    rng = np.random.default_rng(0)
    photo = np.vstack([flat((200, 0, 40), 30, 40), flat((0, 100, 60), 10, 40)])
    item = write(photo, none(40, 40) + 1, 1)
    ds = CopyPaste([item], Augment(crop=64, ignore=ignore, max_n_masks=1, **STILL), length=4)
    for x, l in ds:
        x = x.permute(1, 2, 0).numpy()
        assert (l == 1).sum() == 1600 and (l == ignore).sum() == 64**2 - 1600
        assert (x[l.numpy() == ignore] == (150, 25, 45)).all()
    gone = write(photo, none(40, 40) + 1, 2)
    ds = CopyPaste([gone], Augment(crop=16, ignore=ignore, **STILL | dict(scale=(.1, .3))), length=9)
    fills = {tuple(x.permute(1, 2, 0)[l == ignore][0].tolist()) for x, l in ds}
    assert fills == {(150, 25, 45)}                                                          # of the photograph, whatever of it is left


# ---- colour

@pytest.mark.parametrize("k", range(4))
def test_each_factor_is_uniform(k):
    "One part of the jitter alone, and its factor read off the colours."
    rng, strength = np.random.default_rng(k), [.8 * (i == k) for i in range(3)] + [.2 * (k == 3)]
    photo = [flat(100), np.hstack([flat(78, 8, 4), flat(178, 8, 4)]), flat((190, 100, 100)), flat((190, 100, 100))][k]
    read = [lambda x: (x[0, 0, 0] + .5) / 100, lambda x: (x[0, -1, 0] - x[0, 0, 0]) / 100, lambda x: (x[0, 0, 0] - x[0, 0, 1]) / 90,
            lambda x: (colorsys.rgb_to_hsv(*(x[0, 0] / 255))[0] + .5) % 1 - .5][k]
    aug = Augment(crop=8, **STILL | dict(jitter=tuple(strength), jitter_p=1.))
    factors = [read(augment(photo, none(), photo[0, 0], 1, aug, rng)[0].astype(float)) for _ in range(2000)]
    low, high = (-.2, .2) if k == 3 else (.2, 1.8)
    assert low - .01 < min(factors) < max(factors) < high + .01
    gap = 1 / 256 if k == 3 else 1 / 100                                                     # bytes are coarse: fill the gaps
    assert is_uniform(factors + rng.uniform(-.5, .5, 2000) * gap, low, high)


def test_jitter_is_drawn_as_torchvision_draws_it(spy):
    "All factors and orders of the paper's jitter, independent of one another."
    calls, rng, n = spy("colour_jitter"), np.random.default_rng(0), 4000
    for _ in range(n): augment(flat(90, 4, 4), none(4, 4), flat(90)[0, 0], 1, Augment(crop=4), rng)
    assert happens([1] * len(calls) + [0] * (n - len(calls)), .8)
    factors, orders = np.array([c[3] for c in calls]), [tuple(int(v) for v in c[4]) for c in calls]
    for k, (low, high) in enumerate([(.2, 1.8)] * 3 + [(-.2, .2)]): assert is_uniform(factors[:, k], low, high)
    assert even(orders, list(permutations(range(4))))
    corners = (factors > np.median(factors, 0)).astype(int)
    first = [o[0] for o in orders]
    for i in range(4):
        assert independent(first, corners[:, i])
        for j in range(i): assert independent(corners[:, i], corners[:, j])


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_jitter_does_what_torchvision_does(order):
    "In every order, on a padded sample: contrast turns about the mean grey of all of it."
    rng = np.random.default_rng(order)
    photo = cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), (30, 24), interpolation=cv2.INTER_CUBIC)
    factors = [*rng.uniform(.2, 1.8, 3), rng.uniform(-.2, .2)]
    padded = lambda p, f: pad(p, none(24, 30), f, Augment(crop=48), np.random.default_rng(5))[0]
    theirs = torch.from_numpy(padded(photo, mean_of(photo))).permute(2, 0, 1)
    steps = T.functional.adjust_brightness, T.functional.adjust_contrast, T.functional.adjust_saturation, T.functional.adjust_hue
    for k in order: theirs = steps[k](theirs, float(factors[k]))
    ours = padded(*colour_jitter(photo, mean_of(photo), 24 * 30 / 48**2, factors, order))
    differ = abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy())
    assert differ.mean() < 2.5 and np.median(differ) <= 2


def test_colours_as_torchvision_has_them(monkeypatch):
    "Jitter, grey and blur together: picture, border and padding are coloured as torchvision's transforms colour the padded sample."
    photo, n, rng, real = np.vstack([flat((180, 90, 60), 8, 12), flat((30, 60, 140), 4, 12)]), 1500, np.random.default_rng(0), cp.pad
    upper_left = type("", (), dict(integers=staticmethod(lambda n: 0)))()
    monkeypatch.setattr(cp, "pad", lambda photo, labels, fill, aug, rng: real(photo, labels, fill, aug, upper_left))
    aug = Augment(crop=24, **STILL | {k: getattr(Augment, k) for k in ("jitter_p", "grey", "blur")})
    ours = np.stack([augment(photo, none(12, 12), mean_of(photo), 1, aug, rng)[0] for _ in range(n)])
    start = torch.from_numpy(real(photo, none(12, 12), mean_of(photo), aug, upper_left)[0]).permute(2, 0, 1)
    torch.manual_seed(0)
    theirs = T.Compose([T.RandomApply([T.ColorJitter(.8, .8, .8, .2)], .8), T.RandomGrayscale(.2),
                        T.RandomApply([T.GaussianBlur(39, (.1, 2.))], .5)])
    theirs = np.stack([theirs(start).permute(1, 2, 0).numpy() for _ in range(n)])
    for y, x in (2, 2), (7, 5), (10, 5), (11, 3), (12, 3), (20, 20):
        for c in range(3): assert plausible(ks_2samp(ours[:, y, x, c], theirs[:, y, x, c]).pvalue), (y, x, c)
        assert plausible(ks_2samp(np.ptp(ours[:, y, x], axis=1), np.ptp(theirs[:, y, x], axis=1)).pvalue)


def test_grey_and_jitter_happen_on_their_own():
    rng, photo = np.random.default_rng(0), flat((190, 100, 100))
    def look(**kw): return np.stack([augment(photo, none(), photo[0, 0], 1, Augment(crop=12, **STILL | kw), rng)[0] for _ in range(3000)])
    grey = look(grey=.2)
    grey = np.ptp(grey, axis=3) <= 1
    assert (grey.all((1, 2)) == grey.any((1, 2))).all()                                      # picture and padding alike
    assert happens(grey[:, 0, 0], .2)
    both = look(grey=.2, jitter_p=.8, jitter=(.8, 0, 0, 0))
    is_grey, is_lit = np.ptp(both[:, 5, 5], axis=1) <= 1, abs(both[:, 5, 5].mean(1) - 127) > 6
    assert happens(is_grey, .2) and not happens(is_lit, .5)


def test_grey_comes_after_the_jitter():
    "Saturated or turned, a grey picture stays grey: with both certain, every sample is."
    rng, photo = np.random.default_rng(0), flat((190, 100, 40))
    for _ in range(50):
        x, _ = augment(photo, none(), photo[0, 0], 1, Augment(crop=12, **STILL | dict(grey=1., jitter_p=1.)), rng)
        assert np.ptp(x, axis=2).max() <= 1
    coloured = [augment(photo, none(), photo[0, 0], 1, Augment(crop=12, **STILL | dict(jitter_p=1.)), rng)[0] for _ in range(50)]
    assert sum(np.ptp(x[0, 0]) > 2 for x in coloured) > 40


def test_the_blur_is_drawn_as_it_should(spy):
    calls, rng, n = spy("blur"), np.random.default_rng(0), 3000
    for _ in range(n): augment(flat(9), none(), flat(9)[0, 0], 1, Augment(crop=9, **STILL | dict(blur=.5)), rng)
    assert happens([1] * len(calls) + [0] * (n - len(calls)), .5) and is_uniform([c[1] for c in calls], .1, 2.)


def test_the_blur_is_the_papers():
    "Of 39 px: what lies beyond three sigmas is lost in the rounding, even in noise. And its strength, read off the middle of a spot."
    x = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    for sigma in np.linspace(.1, 2, 20):
        theirs = T.functional.gaussian_blur(torch.from_numpy(x).permute(2, 0, 1), [39, 39], [sigma, sigma]).permute(1, 2, 0).numpy()
        differ = abs(blur(x, sigma).astype(int) - theirs)
        assert differ.max() <= 2 and differ.mean() < .4
    spot, rng = flat(0, 41, 41), np.random.default_rng(0)
    spot[20, 20] = 255
    torch.manual_seed(0)
    theirs = T.GaussianBlur(39, (.1, 2.))
    a = [augment(spot, none(41, 41), spot[0, 0], 1, Augment(crop=41, **STILL | dict(blur=1.)), rng)[0][20, 20, 0] for _ in range(800)]
    b = [int(theirs(torch.from_numpy(spot).permute(2, 0, 1))[0, 20, 20]) for _ in range(800)]
    assert plausible(ks_2samp(a, b).pvalue)


def test_the_blur_reaches_over_the_padding():
    photo, rng = flat(250, 20, 20), np.random.default_rng(0)
    x, l = augment(photo, none(20, 20), flat(0)[0, 0], 1, Augment(crop=40, **STILL | dict(blur=1., sigma=(2., 2.))), rng)
    assert 0 < x[..., 0][l == 255].max() < 250 and 0 < x[..., 0][l == 0].min() < 250


# ---- items and pastes

def test_how_many_items(write):
    item = write(flat(7), none() + 1, 1)
    for most in 1, 2, 5:
        ds, seen = CopyPaste([item], Augment(crop=8, max_n_masks=most, **STILL), length=1500), []
        draw, drawn = ds.draw, []
        ds.draw = lambda *a: drawn.append(1) or draw(*a)
        for i in range(1500): drawn.clear(); ds[i]; seen.append(len(drawn))
        assert even(seen, range(1, most + 1))


def test_every_item_as_often(write):
    "In the paper's archives, whose names have equally many photographs, each item is as likely as the next, at the bottom and on top."
    items = [write(flat(10 * k), none() + 1, 1 + k // 3, f"{k}.png") for k in range(9)]
    ds, rng, seen = CopyPaste(items, Augment(crop=8, **STILL)), np.random.default_rng(0), []
    draw = ds.draw
    def note(*a):
        x, l, label = draw(*a)
        assert label == 1 + x[0, 0, 0] // 10 // 3
        seen.append(x[0, 0, 0] // 10)
        return x, l, label
    ds.draw = note
    for _ in range(3000): ds.sample(2, rng)
    assert even(seen[::2], range(9)) and even(seen[1::2], range(9)) and independent(seen[::2], seen[1::2])


def two(ds, k):
    "Sample `k` of two items, and the draws that it was made of."
    rng = np.random.default_rng(k)
    bottom, top = ds.draw(ds.pools, rng), ds.draw(ds.pools, rng)
    image, labels = ds.sample(2, np.random.default_rng(k))
    return image.permute(1, 2, 0).numpy(), labels.numpy(), bottom, top


def test_a_thing_lands_anywhere_it_fits(write):
    "Through the whole set: the last row and column of the thing arrive, and so do the last row and column of the sample."
    mask, photo = none(12, 12), coordinates(12, 12) + 100
    mask[7:12, 9:12] = 1; mask[8, 10] = 0                                                    # 5×3 with a hole, in the last corner
    ds, places = CopyPaste([write(flat(50, 12, 12), np.eye(12), 1), write(photo, mask, 2)], Augment(crop=12, **STILL)), []
    for k in range(8000):
        x, l, (image, labels, below), (*_, label) = two(ds, k)
        if (below, label) != (1, 2): continue
        y0, x0 = (int(v.min()) for v in np.nonzero(l == 2))
        assert ((l == 2)[y0:y0 + 5, x0:x0 + 3] == mask[7:, 9:]).all() and (l == 2).sum() == 14
        assert (x[l == 2] == photo[mask > 0]).all()                                          # every pixel of it, in its place
        assert (x[l != 2] == image[l != 2]).all() and (l[l != 2] == labels[l != 2]).all()    # and nothing else
        places.append(12 * y0 + x0)
    assert even(places, [12 * y0 + x0 for y0 in range(8) for x0 in range(10)])


@pytest.mark.parametrize("shape", [(12, 12), (12, 5), (1, 12), (1, 1)])
def test_things_of_extreme_size_fit(shape, write):
    mask = none(12, 12)
    mask[12 - shape[0]:, 12 - shape[1]:] = 1
    ds, seen = CopyPaste([write(flat(50, 12, 12), np.eye(12), 1), write(flat(200, 12, 12), mask, 2)], Augment(crop=12, **STILL)), set()
    for k in range(4000 if mask.sum() == 1 else 200):
        _, l, (*_, below), (*_, label) = two(ds, k)
        if (below, label) != (1, 2): continue
        ys, xs = np.nonzero(l == 2)
        assert len(ys) == mask.sum()
        seen.add((int(ys[0]), int(xs[0])))
    assert seen == {(y, x) for y in range(13 - shape[0]) for x in range(13 - shape[1])}


def test_a_thing_that_left_its_window_is_skipped(write):
    "Neither pasted nor replaced by another draw: the sample is the bottom alone."
    mask, small = none(16, 400), none(16, 16)
    mask[:, 396:] = small[3:5, 9:12] = 1                                                     # in nearly no window; in each
    ds = CopyPaste([write(flat(50, 16, 16), small, 1), write(flat(200, 16, 400), mask, 2)], Augment(crop=16, **STILL))
    skipped = pasted = 0
    for k in range(400):
        x, l, (image, labels, below), (_, top, label) = two(ds, k)
        if (below, label) != (1, 2): continue
        if (top == 2).any(): pasted += 1; assert (l == 2).any()
        else: skipped += 1; assert (l == labels).all() and (x == image).all()
    assert skipped > 50 > pasted > 0


def test_later_things_lie_above(write):
    "A thing as large as the sample hides all that came before it."
    ds = CopyPaste([write(flat(50 * k, 8, 8), none() + 1, k) for k in (1, 2, 3)], Augment(crop=8, **STILL))
    for k in range(60):
        rng = np.random.default_rng(k)
        *_, (_, _, last) = [ds.draw(ds.pools, rng) for _ in range(3)]                        # (one place to go: nothing is drawn for it)
        x, l = ds.sample(3, np.random.default_rng(k))
        assert (l == last).all() and (x == 50 * last).all()


def test_tiny_photographs_do_not_end_a_run(write):
    "Under 10 px on a side, which a scale of 0.1 would make nothing."
    for k, size in enumerate([(1, 1), (9, 9), (4, 300), (300, 4)]):
        item = write(flat(80, *size), none(*size) + 1, 1, f"tiny{k}.png")
        for x, l in CopyPaste([item], Augment(**PAPER), length=6): assert x.shape == (3, 384, 384) and (l == 1).any()
    x, l = augment(flat(80, 1, 1), none(1, 1) + 1, flat(80)[0, 0], 1, Augment(crop=8, scale=(.1, .1)), np.random.default_rng(0))
    assert (l == 1).sum() == 1 and (l == 255).sum() == 63


def test_one_photograph_for_two_names(write, tmp_path):
    write(flat(80, 20, 20), none(20, 20) + 1, 1, "both.png"); write(flat(10, 20, 20), none(20, 20) + 1, 1, "cat.png")
    items, skipped = make_items({"dog": ["both.png"], "cat": ["both.png"]}, tmp_path, tmp_path / "masks")
    assert not skipped and [(it.photo.name, it.label) for it in items] == [("both.png", 1), ("both.png", 2)]
    ds = CopyPaste(items, Augment(crop=20, max_n_masks=1, **STILL), length=1000)
    assert even([int(l.max()) for _, l in ds], [1, 2])


def test_photographs_keep_their_size(tmp_path):
    "At the paper's settings, whatever it is; ours are reduced to 640 px unless they are told not to be."
    x = np.zeros((30, 1500, 3), np.uint8); x[:, :700] = 200
    Image.fromarray(x).save(tmp_path / "a.jpg")
    write_mask(tmp_path / "a.json", x[..., 0] > 0)
    assert read_item(tmp_path / "a.jpg", tmp_path / "a.json", None)[0].shape == (30, 1500, 3)
    assert read_item(tmp_path / "a.jpg", tmp_path / "a.json")[0].shape == (13, 640, 3)
    photo = CopyPaste([Item(tmp_path / "a.jpg", tmp_path / "a.json", 1)], Augment(crop=1500, max_n_masks=1, **STILL))[0]
    assert (photo[1] != 255).sum() == 30 * 1500
