"""The report: hostile names, unfinished runs, vanished photographs, many names, and a page that is whole, small and self-contained."""
import html, re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from namedmask.core import RunFolder, UserError, append_jsonl, mask_file, slug, write_archive, write_json, write_mask
from namedmask.deeplab import make_segmenter, save_segmenter
from namedmask.report import read_facts, colour, curve_svg, mask_path, stage_list, ticks, write_report

torch.set_num_threads(1)
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b", "{{ 7*7 }}", "it's", "größe 猫"]
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Checker(HTMLParser):
    "Follows the nesting of tags, and collects ids, references, handlers and tag names."
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.refs, self.tags, self.attrs, self.words = [], [], [], set(), set(), []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def note(self, tag, attrs):
        self.tags.add(tag)
        assert len({k for k, _ in attrs}) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        self.attrs |= {k for k, _ in attrs}
        self.ids += [v for k, v in attrs if k == "id"]
        self.refs += [v for k, v in attrs if k in ("href", "src")]

    def handle_starttag(self, tag, attrs):
        self.note(tag, attrs)
        if tag not in VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.note(tag, attrs)
    def handle_endtag(self, tag): assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing; open: {self.open}"
    def handle_data(self, data):
        if self.open[-1:] != ["style"]: self.words.append(data)


def check(path):
    "A report that is well-formed, self-contained and consistent; returns its text and its checker."
    text = path.read_text(encoding="utf-8")
    page = Checker(text)
    assert len(page.ids) == len(set(page.ids))
    for ref in page.refs: assert ref.startswith("data:image/jpeg;base64,") or (ref[0] == "#" and ref[1:] in page.ids), ref
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "img"}
    assert not [a for a in page.attrs if a.startswith("on")]
    assert "@import" not in text and "url(" not in text
    return text, page


def words(page): return " ".join(" ".join(page.words).split())


def settings(images, names, **more):
    return dict(images=str(images), names={n: [n] for n in names}, stack="offline", n_images=100, steps=50, experts=True, seed=0,
                device="cpu", version="0.1.0") | more


def make_photos(folder, files, size=(160, 120)):
    folder.mkdir(parents=True, exist_ok=True)
    for k, f in enumerate(files):
        (folder / f).parent.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(k).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f, quality=92)


def blob(size=(160, 120)):
    y, x = np.mgrid[:size[1], :size[0]]
    return (x - 80)**2 + (y - 60)**2 < 35**2


def finish(run, images, names, files, segmenter=True, skipped=()):
    "Everything that a run of `names` would leave behind; every name has all `files`."
    write_archive(run.archive, {n: [str(images / f) for f in files] for n in names})
    sims = dict(zip(files, np.linspace(.8, .4, len(files)).tolist()))
    told = dict(kept=len(files), best=.8, worst=.4, similarity=sims, sure=True, warning=None)
    write_json(run.retrieval, dict(names={n: told for n in names}, photos=len(files)))
    for f in files:
        write_mask(mask_file(run.saliency, f), blob())
        for n in names: write_mask(mask_file(run.expert_masks / slug(n), f), blob())
    for k in range(1, 51): append_jsonl(run.metrics, dict(step=k, loss=1 / k, lr=1e-3, samples_per_second=9.))
    append_jsonl(run.metrics, dict(step=50, miou=.5, pixel_accuracy=.9))
    torch.manual_seed(0)
    if segmenter: save_segmenter(run.segmenter, make_segmenter(n_classes=len(names) + 1, pretrained=False), list(names))
    scores = dict(miou=.5, miou_present=.6, pixel_accuracy=.9, mean_accuracy=None, frequency_weighted_iou=.8,
                  iou={"background": .9} | {n: .4 for n in names})
    write_json(run.state, dict(stages={s: dict(seconds=3., done=True) for s in ("retrieval", "saliency", "experts", "distill", "report")},
                               skipped=list(skipped), scores={"demo": scores}))


def start(root, images, names, **more):
    run = RunFolder(root)
    run.root.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(settings(images, names, **more), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return run


def test_finished_run_with_hostile_words(tmp_path):
    images, files = tmp_path / "pile <i>", [f"sub & co/<b>{k}'.jpg" for k in range(8)]
    make_photos(images, files)
    run = start(tmp_path / "run <u>", images, HOSTILE, odd_setting="<script>alert(2)</script>")
    bad = dict(photo="<svg onload=alert(3)>.jpg", reason="bad <script>alert(4)</script>", stage="retrieval")
    finish(run, images, HOSTILE, files, skipped=[bad, bad])
    told = read_facts(run).retrieval
    told[HOSTILE[0]] |= dict(sure=False, warning="<script>alert(5)</script>")
    write_json(run.retrieval, dict(names=told, photos=8))
    text, page = check(write_report(run))
    assert "<script" not in text and "<svg onload" not in text and "<img" not in text
    said = words(page)
    for w in [*HOSTILE, "<script>alert(2)</script>", "<script>alert(5)</script>", *bad.values()][:-1]: assert w in said, w
    assert 6 <= text.count("data:image/jpeg") <= 8   # six names show the same photographs: each is stored once
    assert "One segmenter for 6 names" in said and "1 file could not be used" in said
    assert len(text) < 1_000_000


@pytest.mark.parametrize("upto", range(5))
def test_unfinished_runs(tmp_path, upto):
    images, files, names = tmp_path / "pile", [f"{k}.jpg" for k in range(8)], ["cat", "dog"]
    make_photos(images, files)
    run = start(tmp_path / "run", images, names)
    full = RunFolder(tmp_path / "full")
    full.root.mkdir()
    finish(full, images, names, files)
    steps = [[], [full.archive], [full.retrieval], [full.root / "masks"], [full.metrics]]
    for source in [p for group in steps[:upto + 1] for p in group]: source.rename(run.root / source.relative_to(full.root))
    _, page = check(write_report(run))
    said = words(page)
    assert "so far" in said and "This run is unfinished" in said and "There is no trained segmenter yet" in said
    assert ("Retrieval has not run yet" in said) == (upto == 0)
    assert ("The segmenter has not been trained yet" in said) == (upto < 4)
    assert "No benchmark has been evaluated" in said and "No stage has been timed yet" in said
    assert [s["status"] for s in stage_list(read_facts(run))][-1] == ("unfinished" if upto == 4 else "waiting")


def test_experts_left_out_is_finished(tmp_path):
    make_photos(tmp_path / "pile", ["a.jpg"])
    run = start(tmp_path / "run", tmp_path / "pile", ["cat"], experts=False)
    write_json(run.state, dict(stages={s: dict(seconds=1, done=True) for s in ("retrieval", "saliency", "distill")}))
    said = words(check(write_report(run))[1])
    assert "unfinished" not in said and "left out" in said and "One segmenter for 1 name" in said


@pytest.mark.parametrize("gone", ["one", "folder", "damaged"])
def test_vanished_photographs(tmp_path, gone):
    images, files = tmp_path / "pile", [f"{k}.jpg" for k in range(8)]
    make_photos(images, files)
    run = start(tmp_path / "run", images, ["cat"])
    finish(run, images, ["cat"], files)
    if gone == "one": (images / "0.jpg").unlink()
    elif gone == "folder": images.rename(tmp_path / "moved")
    else: (images / "0.jpg").write_bytes((images / "0.jpg").read_bytes()[:500])
    text, page = check(write_report(run))
    reason = "damaged or truncated" if gone == "damaged" else "the file is gone"
    assert reason in words(page)
    assert text.count("data:image/jpeg") == (0 if gone == "folder" else 7)
    if gone == "folder": assert "None of the photographs could be read" in words(page)


def test_damaged_files_of_a_run(tmp_path):
    images, files = tmp_path / "pile", ["0.jpg", "1.jpg", "2.jpg"]
    make_photos(images, files)
    run = start(tmp_path / "run", images, ["cat"])
    finish(run, images, ["cat"], files, segmenter=False)
    run.segmenter.write_bytes(b"no weights")
    mask_file(run.saliency, "0.jpg").write_text("{")
    run.state.write_text("[1, 2")
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    said = words(check(write_report(run))[1])
    assert "is no segmenter" in said and "no mask" in said
    run.archive.write_text('{"cat": 3}')
    check(write_report(run))


def test_no_run_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no run"): write_report(RunFolder(tmp_path))
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot be read"): write_report(RunFolder(tmp_path))
    (tmp_path / "config.yaml").write_text("just words")
    with pytest.raises(UserError, match="no configuration"): write_report(RunFolder(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_size_of_twenty_names(tmp_path, world):
    "Every name with photographs of its own, as in the worst case."
    names, photos = [f"name {i}" for i in range(20)], world.photos
    run = start(tmp_path / "run", world.index, names)
    archive = {n: photos[i * 12:i * 12 + 12] for i, n in enumerate(names)}
    write_archive(run.archive, {n: [str(world.index / p) for p in ps] for n, ps in archive.items()})
    for n, ps in archive.items():
        for p in ps:
            write_mask(mask_file(run.saliency, p), world.truth(p) > 0)
            write_mask(mask_file(run.expert_masks / slug(n), p), world.truth(p) > 0)
    text, _ = check(write_report(run))
    assert text.count("data:image/jpeg") == 120 and len(text) < 3_000_000
    print(f"{len(text) / 1e6:.2f} MB")


def test_hundreds_of_names(tmp_path):
    images, names = tmp_path / "pile", [f"name {i}" for i in range(300)]
    make_photos(images, [f"{i}.jpg" for i in range(300)], (64, 48))
    run = start(tmp_path / "run", images, names)
    write_archive(run.archive, {n: [f"{i}.jpg"] for i, n in enumerate(names)})
    told = lambda i: dict(kept=1, best=i / 300, worst=i / 300, similarity={f"{i}.jpg": i / 300}, sure=True, warning=None)
    write_json(run.retrieval, dict(names={n: told(i) for i, n in enumerate(names)}, photos=300))
    text, page = check(write_report(run))
    assert text.count("data:image/jpeg") == 60 and "name 299" in words(page) and "pictures are shown of those" in words(page)


def test_an_old_report_survives_a_failure(tmp_path, monkeypatch):
    make_photos(tmp_path / "pile", ["a.jpg"])
    run = start(tmp_path / "run", tmp_path / "pile", ["cat"])
    before = write_report(run).read_bytes()
    monkeypatch.setattr("namedmask.report.render", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_report(run)
    assert run.report.read_bytes() == before and sorted(p.name for p in run.root.iterdir()) == ["config.yaml", "report.html"]


def test_names_that_are_not_unicode(tmp_path):
    odd = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    run = start(tmp_path / "run", tmp_path / "pile", ["cat"])
    write_archive(run.archive, {"cat": [odd]})
    write_json(run.state, dict(skipped=[dict(photo=odd, reason="gone")]))
    assert "caf?.jpg" in words(check(write_report(run))[1])


@pytest.mark.parametrize("shape", [(240, 320), (1, 1), (3000, 40), (17, 5000)])
def test_outlines_fill_to_the_mask(shape):
    "Drawing the outline again gives the mask back, for any size."
    import cv2
    mask = np.zeros(shape, bool)
    mask[shape[0] // 4:, shape[1] // 3:] = True
    mask[shape[0] // 2: shape[0] // 2 + shape[0] // 8, shape[1] // 2: shape[1] // 2 + shape[1] // 8] = False
    path = mask_path(mask, 400, 300)
    lines = []
    for part in re.findall(r"M(\d+) (\d+)l([^z]*)z", path):
        steps = np.array(re.findall(r"-?\d+", part[2]), int).reshape(-1, 2)
        lines.append(np.cumsum(np.vstack([[int(part[0]), int(part[1])], steps]), axis=0).astype(np.int32))
    drawn = np.zeros((300, 400), np.uint8)
    for line in lines:
        one = np.zeros_like(drawn)
        cv2.fillPoly(one, [line], 1)
        drawn ^= one
    wanted = cv2.resize(mask.astype(np.uint8) * 255, (400, 300), interpolation=cv2.INTER_AREA) > 127
    assert (drawn.astype(bool) == wanted).mean() > .98


def test_curves_of_odd_values():
    odd = ([], []), ([1], [1.]), ([1, 2], [0., 0.]), ([1, 2, 3], [1., float("nan"), 2.]), (range(5000), np.zeros(5000)), ([5, 5], [1., 2.])
    for xy in odd:
        svg = str(curve_svg(*xy, label="x & y"))
        assert "nan" not in svg and "inf" not in svg and (not svg or svg.startswith("<svg") and html.escape("x & y") in svg)
    for lo, hi in (0, 1), (0, 7e-5), (3, 3), (-2, 5), (0, 1e9):
        assert all(lo <= t <= hi for t in ticks(lo, hi)) and 1 <= len(ticks(lo, hi)) <= 8
    assert len({colour(i) for i in range(200)}) > 150


def test_a_thousand_skipped_files(tmp_path):
    "Reasons that differ in numbers only are one entry; each file keeps its own."
    run = start(tmp_path / "run", tmp_path, ["cat"])
    skipped = [dict(photo=f"a{i}.tif", reason=f"{9000 + i}×7000 is above the size guard of 64 megapixels") for i in range(700)]
    skipped += [dict(photo=f"b{i}.heic", reason="Pillow cannot read .heic; convert it to JPEG") for i in range(300)]
    write_json(run.state, dict(skipped=skipped))
    text, page = check(write_report(run))
    said = words(page)
    assert "1 000 files could not be used" in said and text.count("<summary><b>") == 2 and "and 500 more" in said
    assert "a7.tif: 9007×7000 is above" in said and "convert it to JPEG" in said


def test_long_names_and_many(tmp_path):
    "Eighty names, some of a length that no line holds and some of other scripts: all in the page, and whole somewhere."
    names = [f"name {i}" for i in range(76)] + ["word " * 60 + "end", "x" * 300, "猫と犬", "قطة"]
    run = start(tmp_path / "run", tmp_path, names, odd_setting=7)
    write_json(run.retrieval, dict(names={n.strip(): dict(kept=0, best=.2, worst=None, sure=False, warning=f'"{n}" is not there.') for n in names}, photos=3))
    text, page = check(write_report(run))
    said = words(page)
    assert all(n in said for n in names) and "80 names" in said and "Worth a look: 80 names" in said
    assert "more settings" in said and "odd setting 7" in said and "-webkit-line-clamp" in text
