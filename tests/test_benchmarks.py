"""Benchmarks: every label of small datasets in the published layouts, COCO's masks against pycocotools' own, incomplete data, names."""
import contextlib, io, json, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namedmask.benchmarks import (MERGED, Benchmark, coco_labels, draw_object, load_benchmark, match_names, read_lines, restrict, wnid_ids,
                                  wnid_names)
from namedmask.core import UserError
from namedmask.viz import palette

SHARED = Path(os.environ.get("NAMEDMASK_SHARED", Path(__file__).parents[2] / "shared"))
COCO_DEV = SHARED / "data/coco_dev"
needs_coco = pytest.mark.skipif(not COCO_DEV.is_dir(), reason=f"needs {COCO_DEV} (set NAMEDMASK_SHARED)")
VOC_IN_COCO = ["airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog", "horse",
               "motorcycle", "person", "potted plant", "sheep", "couch", "train", "tv"]
VOC = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog", "horse", "motorbike",
       "person", "potted plant", "sheep", "sofa", "train", "tv/monitor"]


@pytest.fixture
def coco(tmp_path):
    "A COCO of two photographs: one with a crowd (RLE) under a polygon, one without annotation."
    root = tmp_path / "coco2017"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for name in ("a.jpg", "b.jpg"): Image.new("RGB", (20, 10)).save(root / "val2017" / name)
    annotations = [dict(id=1, image_id=1, category_id=7, iscrowd=0, area=16, segmentation=[[2, 2, 6, 2, 6, 6, 2, 6]]),
                   dict(id=2, image_id=1, category_id=3, iscrowd=1, area=100, segmentation=dict(size=[10, 20], counts=[0, 100, 100]))]
    data = dict(images=[dict(id=i, file_name=f, width=20, height=10) for i, f in ((1, "a.jpg"), (2, "b.jpg"))],
                annotations=annotations, categories=[dict(id=7, name="cat"), dict(id=3, name="couch")])
    (root / "annotations/instances_val2017.json").write_text(json.dumps(data))
    return root


def test_coco_order_crowd_and_empty(coco):
    b = load_benchmark("coco2017", coco.parent)
    assert b.names == ["couch", "cat"] and len(b) == 2             # in the order of the category ids
    crowd, empty = (labels() for _, labels in b)
    assert crowd.shape == (10, 20) and (crowd[:, :10] > 0).all() and not crowd[:, 10:].any()
    assert (crowd == 2).sum() == 16 and crowd[3, 3] == 2            # the smaller one in front, though listed first
    assert empty.shape == (10, 20) and not empty.any()


def test_root_or_own_folder(coco):
    for root in (coco, coco.parent, str(coco)):
        assert len(load_benchmark("coco2017", root)) == 2


@pytest.mark.parametrize("spoil, says", [
    (lambda r: shutil.rmtree(r), "does not exist"),
    (lambda r: shutil.rmtree(r / "annotations"), "instances_val2017.json"),
    (lambda r: (r / "annotations/instances_val2017.json").write_text('{"images": ['), "cannot be read"),
    (lambda r: (r / "annotations/instances_val2017.json").write_text('[]'), "categories in it"),
    (lambda r: (r / "val2017/b.jpg").unlink(), "b.jpg"),
    (lambda r: shutil.rmtree(r / "val2017"), "missing are 2"),
], ids=["nothing", "no annotations", "half a json", "another json", "a photo gone", "no photos"])
def test_incomplete_says_what_and_where(coco, spoil, says):
    spoil(coco)
    with pytest.raises(UserError) as e: load_benchmark("coco2017", coco)
    for part in (says, "Looked for", "Found", "https://cocodataset.org"): assert part in str(e.value)


def test_wrong_calls(coco):
    for args, says in [(("pascal", coco), "There are:"), (("coco2017", None), "root"), (("coco2017", coco, "test"), "splits")]:
        with pytest.raises(UserError, match=says): load_benchmark(*args)


def test_names_reorder_merge_and_warn(coco, caplog):
    b = load_benchmark("coco2017", coco, names=["CAT", "dragon", "sofa"])
    assert "dragon" in caplog.text
    assert b.names == ["CAT", "sofa"]
    labels = b.pairs[0][1]()
    full = load_benchmark("coco2017", coco).pairs[0][1]()
    assert np.array_equal(labels == 1, full == 2) and np.array_equal(labels == 2, full == 1)
    only = load_benchmark("coco2017", coco, names=["couch"]).pairs[0][1]()
    assert np.array_equal(only, full == 1)
    with pytest.raises(UserError, match="none of the names"): load_benchmark("coco2017", coco, names=["dragon"])


def test_no_warning_when_all_match(coco, caplog):
    load_benchmark("coco2017", coco, names=["couch", "cat"])
    assert "no class" not in caplog.text


def test_a_part_of_a_benchmark_is_told(coco, caplog):
    "A set from which whole photographs are gone, labels and all, looks complete; only their number tells."
    load_benchmark("coco2017", coco)
    assert "has 2 photographs in val; as published there are 5000" in caplog.text


def test_degenerate_polygons():
    "Two corners enclose nothing, wherever they stand in the list; pycocotools alone refuses some and not others."
    triangle = [1, 1, 9, 1, 9, 9]
    alone = draw_object([triangle], 12, 12)
    assert alone.any()
    for more in [[5, 5, 8, 8]], [[5, 5]], [[]], [[5, 5, 8, 8], []]:
        assert not draw_object(more, 12, 12).any()
        assert (draw_object([*more, triangle], 12, 12) == alone).all() and (draw_object([triangle, *more], 12, 12) == alone).all()


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "1", "RGB"])
def test_coca_masks_in_any_mode(tmp_path, mode):
    "What is white counts, however the picture stores it: a palette may call it 1."
    photo(tmp_path / "coca/image/whisk/a.jpg")
    white = np.random.default_rng(0).random((12, 20)) > .5
    im = Image.fromarray(np.uint8(255 * white))
    if mode == "P":
        im = Image.fromarray(np.uint8(white), "P"); im.putpalette([0, 0, 0, 255, 255, 255])
    else: im = im.convert(mode)
    (tmp_path / "coca/binary/whisk").mkdir(parents=True)
    im.save(tmp_path / "coca/binary/whisk/a.png")
    (_, labels), = load_benchmark("coca", tmp_path)
    assert (labels() == 80 * white).all()


def test_a_folder_with_a_name_twice(tmp_path):
    (tmp_path / "images").mkdir(); (tmp_path / "names.txt").write_text("cat\ndog\nCat\n")
    with pytest.raises(UserError, match='has the name "cat" twice'): load_benchmark("folder", tmp_path)


def test_voc_and_coco_spellings():
    assert match_names(VOC, VOC_IN_COCO) == list(range(1, 21))
    assert match_names(VOC_IN_COCO, VOC) == list(range(1, 21))
    assert match_names(["car"], ["toy car", "cart"]) == [0]


def test_two_words_of_one_class():
    b = Benchmark("x", ["tv"], [(Path("p"), lambda: np.array([[0, 1, 255]], np.uint8))])
    cut = restrict(b, ["monitor", "tv"])
    assert cut.names == ["monitor"] and cut.pairs[0][1]().tolist() == [[0, 1, 255]]


def test_restrict_keeps_ignore_and_wide_ids():
    "919 classes with 1000 as the ignored id, as ImageNet-S has them."
    names = [f"c{i}" for i in range(1, 920)]
    b = Benchmark("wide", names, [(Path("p"), lambda: np.array([[0, 1, 300, 919, 1000]], np.uint16))], ignore=1000)
    assert restrict(b, names[::-1]).pairs[0][1]().tolist() == [[0, 919, 620, 1, 1000]]
    assert restrict(b, ["c300"]).pairs[0][1]().tolist() == [[0, 0, 1, 0, 1000]]


@needs_coco
def test_coco_dev_equals_pycocotools():
    from pycocotools.coco import COCO
    with contextlib.redirect_stdout(io.StringIO()): api = COCO(COCO_DEV / "annotations/instances_val2017.json")
    ids = {c: i for i, c in enumerate(sorted(api.cats), 1)}
    b = load_benchmark("coco2017", COCO_DEV)
    assert len(b) == 63 and b.names == [api.cats[c]["name"] for c in sorted(api.cats)] and len(b.names) == 80
    by_file = {im["file_name"]: i for i, im in api.imgs.items()}
    for photo, labels in b:
        image = by_file[photo.name]
        want = np.zeros((api.imgs[image]["height"], api.imgs[image]["width"]), np.uint8)
        for a in sorted(api.imgToAnns[image], key=lambda a: a["area"], reverse=True): want[api.annToMask(a) > 0] = ids[a["category_id"]]
        got = labels()
        assert got.shape == Image.open(photo).size[::-1] and np.array_equal(got, want), photo.name


@needs_coco
def test_coco_dev_with_the_voc_names():
    full, cut = load_benchmark("coco2017", COCO_DEV), load_benchmark("coco2017", COCO_DEV, names=VOC)
    assert cut.names == VOC
    to = dict(zip(match_names(VOC, full.names), range(1, 21)))
    for (_, a), (_, b) in zip(full, cut):
        a, b = a(), b()
        for i in np.unique(a): assert set(np.unique(b[a == i])) == {to.get(int(i), 0)}


def test_folder(tmp_path):
    for sub in ("images/a", "labels/a"): (tmp_path / sub).mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(tmp_path / "images/a/x.jpg")
    Image.fromarray(np.full((4, 5), 2, np.uint8)).save(tmp_path / "labels/a/x.png")
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    b = load_benchmark("folder", tmp_path, names=["cat"])
    assert len(b) == 1 and (b.pairs[0][1]() == 1).all()
    (tmp_path / "labels/a/x.png").unlink()
    with pytest.raises(UserError, match="x.png"): load_benchmark("folder", tmp_path)


def test_labels_do_not_depend_on_annotation_order():
    rng = np.random.default_rng(0)
    places = np.c_[rng.integers(1, 5, 12), rng.integers(0, 20, (12, 2)), rng.permutation(range(2, 26)).reshape(12, 2)].tolist()
    boxes = [dict(category_id=c, area=w * h, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]) for c, x, y, w, h in places]
    ids = {i: i for i in range(5)}
    assert np.array_equal(coco_labels(boxes, 40, 40, ids), coco_labels(boxes[::-1], 40, 40, ids))


# --- the published layouts, with the odd cases that real copies have

def photo(path, w=20, h=12, mode="RGB", fmt="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(w * h).integers(0, 256, (h, w, 3)).astype(np.uint8)).convert(mode).save(path, fmt)


def png(path, labels, colours=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = Image.fromarray(labels)
    if colours is not None:
        im = im.convert("P") if im.mode != "L" else Image.fromarray(labels, "P")
        im.putpalette(colours)
    im.save(path)


def ids_of(b): return [labels() for _, labels in b]


def one_message(e, *parts):
    for part in (*parts, "Looked for", "Found"): assert part in str(e.value), (part, str(e.value))


@pytest.fixture
def voc(tmp_path):
    "Three photographs in VOC's layout: one grey, with 255 borders, palette PNGs, blank lines in a list."
    root, rng = tmp_path / "VOCdevkit/VOC2012", np.random.default_rng(0)
    maps = {}
    for k, name in enumerate(["2007_000033", "2007_000042", "2008_000001"]):
        photo(root / f"JPEGImages/{name}.jpg", mode="L" if k == 1 else "RGB")
        maps[name] = rng.integers(0, 21, (12, 20)).astype(np.uint8)
        maps[name][:2] = maps[name][:, -2:] = 255
        png(root / f"SegmentationClass/{name}.png", maps[name], palette().tobytes())
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000001\n")
    (lists / "val.txt").write_text("2007_000033\n2007_000042 \n\n")
    return root, maps


def test_voc_every_pixel(voc):
    root, maps = voc
    for split, names in dict(val=["2007_000033", "2007_000042"], train=["2008_000001"], trainval=list(maps)).items():
        b = load_benchmark("voc2012", root, split)
        assert [p.name for p, _ in b] == [f"{n}.jpg" for n in names] and b.names == VOC and b.ignore == 255
        for got, name in zip(ids_of(b), names): assert got.dtype == np.uint8 and np.array_equal(got, maps[name])
    for given in (root, root.parent, root.parent.parent, str(root)): assert len(load_benchmark("voc2012", given)) == 2
    assert b.palette[15].tolist() == [192, 128, 128] and b.palette.shape == (21, 3)


def test_voc_agrees_with_torchvision(voc):
    datasets = pytest.importorskip("torchvision.datasets")
    root, _ = voc
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n2007_000042\n")    # a blank line stops torchvision
    theirs = datasets.VOCSegmentation(root.parents[1], image_set="val")
    for (p, labels), (im, target) in zip(load_benchmark("voc2012", root.parents[1]), theirs, strict=True):
        assert np.array_equal(labels(), np.array(target)) and Image.open(p).size == im.size


@pytest.mark.parametrize("spoil, says", [
    (lambda r: shutil.rmtree(r), "does not exist"),
    (lambda r: shutil.rmtree(r / "ImageSets"), "val.txt"),
    (lambda r: shutil.rmtree(r / "JPEGImages"), "missing are 2"),
    (lambda r: shutil.rmtree(r / "SegmentationClass"), "2007_000033.png"),
    (lambda r: (r / "SegmentationClass/2007_000042.png").unlink(), "missing are 1"),
    (lambda r: (r / "ImageSets/Segmentation/val.txt").write_text(""), "names in val.txt"),
], ids=["nothing", "no lists", "no photos", "no labels", "a label gone", "an empty list"])
def test_voc_half_unpacked(voc, spoil, says):
    spoil(voc[0])
    with pytest.raises(UserError) as e: load_benchmark("voc2012", voc[0])
    one_message(e, says, "VOCtrainval_11-May-2012.tar", str(voc[0]))


def test_labels_are_read_late_and_damage_is_named(voc):
    root, _ = voc
    (root / "SegmentationClass/2007_000033.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    Image.new("RGB", (20, 12)).save(root / "SegmentationClass/2007_000042.png")
    b = load_benchmark("voc2012", root)                            # nothing is read yet
    with pytest.raises(UserError, match="2007_000033.png cannot be read"): b.pairs[0][1]()
    with pytest.raises(UserError, match="2007_000042.png has mode RGB"): b.pairs[1][1]()


@pytest.fixture
def coca_root(tmp_path):
    "Three names of CoCA, image endings in every case, one folder in another case, rubbish beside them."
    root, maps = tmp_path / "coca", {}
    for name, folder, file, ending, fmt in [("Accordion", "Accordion", "a", ".jpg", "JPEG"),
                                            ("Yellow duck", "yellow duck", "b", ".JPG", "JPEG"), ("whisk", "whisk", "C", ".jpeg", "JPEG"), ("whisk", "whisk", "d", ".png", "PNG")]:
        photo(root / f"image/{folder}/{file}{ending}", fmt=fmt)
        mask = np.random.default_rng(len(maps)).random((12, 20)) > .5
        png(root / f"binary/{name}/{file.lower()}.{'PNG' if file == 'a' else 'png'}", mask if file == "d" else np.uint8(255 * mask))
        maps[name, file.lower()] = mask
    (root / "image/whisk/Thumbs.db").touch(); (root / "image/whisk/._C.jpeg").touch(); (root / "readme.txt").touch()
    return root, maps


def test_coca_every_pixel(coca_root):
    root, maps = coca_root
    place = {"Accordion": 1, "Yellow duck": 3, "whisk": 80}
    for given in (root, root.parent):
        b = load_benchmark("coca", given)
        assert len(b) == 4 and len(b.names) == 80 and b.names == sorted(b.names) and b.names[2] == "Yellow duck"
        for p, labels in b:
            name = "Yellow duck" if p.parent.name == "yellow duck" else p.parent.name
            got = labels()
            assert got.dtype == np.uint8 and np.array_equal(got, place[name] * maps[name, p.stem.lower()]), p
    for split in ("all", "test"): assert len(load_benchmark("coca", root, split)) == 4
    with pytest.raises(UserError, match="splits"): load_benchmark("coca", root, "train")


def test_coca_of_some_names_warns(coca_root, caplog):
    load_benchmark("coca", coca_root[0])
    assert "none of UAV, alarm clock" in caplog.text


@pytest.mark.parametrize("spoil, says", [
    (lambda r: shutil.rmtree(r), "does not exist"),
    (lambda r: shutil.rmtree(r / "binary"), "4 photographs without labels"),
    (lambda r: shutil.rmtree(r / "image"), "4 label files without a photograph"),
    (lambda r: shutil.rmtree(r / "binary/whisk"), "2 photographs without labels"),
    (lambda r: (r / "image/whisk/d.png").unlink(), "d.png"),
], ids=["nothing", "no masks", "no photos", "a folder gone", "a photo gone"])
def test_coca_half_unpacked(coca_root, spoil, says):
    spoil(coca_root[0])
    with pytest.raises(UserError) as e: load_benchmark("coca", coca_root[0])
    one_message(e, says, "zhaozhang.net/coca", "coca")


CITY = {17: 1, 18: 2, 19: 3, 20: 4, 24: 5, 25: 6, 26: 7, 27: 8, 28: 9, 29: 10, 30: 11, 31: 12, 32: 13, 33: 14}


@pytest.fixture
def city(tmp_path):
    "Two cities; the stored ids are all of 0..33, 255 (the licence plate), and some that no table has."
    root, maps = tmp_path / "cityscapes", []
    for k, city in enumerate(["aachen", "ulm"]):
        stored = np.random.default_rng(k).permutation([*range(34), 255, 254, 99, *[26] * 203]).reshape(12, 20).astype(np.uint8)
        stem = f"{city}_{k:06d}_000019"
        photo(root / f"leftImg8bit/val/{city}/{stem}_leftImg8bit.png", fmt="PNG")
        png(root / f"gtFine/val/{city}/{stem}_gtFine_labelIds.png", stored)
        for other in ("color", "instanceIds"): png(root / f"gtFine/val/{city}/{stem}_gtFine_{other}.png", stored)
        (root / f"gtFine/val/{city}/{stem}_gtFine_polygons.json").write_text("{}")
        maps.append(stored)
    return root, maps


def test_cityscapes_every_pixel(city):
    root, maps = city
    for given in (root, root.parent):
        b = load_benchmark("cityscapes", given)
        assert len(b.names) == 14 and b.names[0] == "pole" and b.names[13] == "bicycle" and len(b) == 2
        for got, stored in zip(ids_of(b), maps, strict=True):
            assert np.array_equal(got, np.vectorize(lambda v: CITY.get(int(v), 0))(stored))
    assert b.palette[7].tolist() == [0, 0, 142]
    cut = restrict(b, ["car", "person"])
    assert cut.palette.tolist() == [[0, 0, 0], [0, 0, 142], [220, 20, 60]] and np.array_equal(ids_of(cut)[0] == 1, maps[0] == 26)


@pytest.mark.parametrize("spoil, says", [
    (lambda r: shutil.rmtree(r), "does not exist"),
    (lambda r: shutil.rmtree(r / "gtFine"), "2 photographs without labels"),
    (lambda r: shutil.rmtree(r / "leftImg8bit"), "2 label files without a photograph"),
    (lambda r: shutil.rmtree(r / "leftImg8bit/val/ulm"), "ulm_000001"),
    (lambda r: [shutil.rmtree(r / d / "val") for d in ("leftImg8bit", "gtFine")], "there are none"),
], ids=["nothing", "no labels", "no photos", "a city gone", "no split"])
def test_cityscapes_half_unpacked(city, spoil, says):
    spoil(city[0])
    with pytest.raises(UserError) as e: load_benchmark("cityscapes", city[0])
    one_message(e, says, "cityscapes-dataset.com")


def imagenet_s_copy(root, n, wnids, photos, split="validation"):
    "A copy of an edition with empty folders but for `photos`: (wnid, label map)."
    folder = root / f"ImageNet-S/ImageNetS{n}"
    for w in wnids:
        for part in (split, "validation-segmentation"): (folder / part / w).mkdir(parents=True, exist_ok=True)
    for k, (w, ids) in enumerate(photos):
        stem = f"{w}/ILSVRC2012_val_{k:08d}"
        photo(folder / split / f"{stem}.JPEG", mode="L" if k == 0 else "RGB")
        rgb = np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)
        png(folder / "validation-segmentation" / f"{stem}.png", rgb)
    return folder


def any_wnids(n, merge=False):
    "`n` classes of ImageNet in a mixed order; with `merge` none that is counted as another."
    from timm.data import ImageNetInfo
    return [w for w in ImageNetInfo().label_names() if not (merge and w in MERGED)][::-1][:n]


@pytest.mark.parametrize("n", [50, 300, 919])
def test_imagenet_s_every_pixel(tmp_path, n):
    wnids = any_wnids(n, merge=n == 919)
    rng = np.random.default_rng(n)
    maps = [rng.integers(0, n + 1, (12, 20)) for _ in range(3)]
    for m in maps: m[:2] = 1000
    folder = imagenet_s_copy(tmp_path, n, wnids, [(sorted(wnids)[k], m) for k, m in enumerate(maps)])
    for given in (tmp_path, folder.parent, folder):
        b = load_benchmark(f"imagenet_s{n}", given)
        assert len(b.names) == n == len(set(map(str.lower, b.names))) and b.ignore == 1000 and b.palette.shape == (n + 1, 3)
        for got, m in zip(ids_of(b), maps, strict=True): assert got.dtype == np.uint16 and np.array_equal(got, m)
    assert match_names(b.names, b.names) == list(range(1, n + 1))   # a segmenter with these names has these ids


def test_imagenet_s_merged_classes(tmp_path):
    "A copy whose photographs of a merged class still lie in that class's own folder."
    wnids = any_wnids(919, merge=True)
    assert set(MERGED.values()) <= set(wnids)
    ids = wnid_ids(wnids, merge=True)
    label = np.full((12, 20), ids["n03642806"])
    folder = imagenet_s_copy(tmp_path, 919, [*wnids, "n03642806"], [("n03642806", label)])
    b = load_benchmark("imagenet_s919", tmp_path)
    assert len(b.names) == 919 and b.names[ids["n03642806"] - 1] == "notebook" and np.array_equal(ids_of(b)[0], label)
    (folder / "validation-segmentation/n03832673").mkdir(exist_ok=True)
    moved = folder / "validation-segmentation/n03832673/ILSVRC2012_val_00000000.png"
    (folder / "validation-segmentation/n03642806/ILSVRC2012_val_00000000.png").rename(moved)
    assert np.array_equal(ids_of(load_benchmark("imagenet_s919", tmp_path))[0], label)     # and its labels in the other's


@pytest.mark.parametrize("n", [50, 300, 919])
def test_imagenet_s_ids_follow_the_category_list(tmp_path, shared, n, caplog):
    "With the edition's own list, some folders are enough; ids are places in the sorted list."
    listed = sorted((shared / f"data/imagenet_s/ImageNetS_categories_im{n}.txt").read_text().split())
    assert len(listed) == n and not set(listed) & set(MERGED if n == 919 else ())
    some = listed[::17]
    folder = imagenet_s_copy(tmp_path, n, some, [(w, np.full((12, 20), listed.index(w) + 1)) for w in some])
    with pytest.raises(UserError) as e: load_benchmark(f"imagenet_s{n}", tmp_path)
    one_message(e, f"{n} class folders", f"there are {len(some)}", "LUSSeg/ImageNet-S")
    shutil.copy(shared / f"data/imagenet_s/ImageNetS_categories_im{n}.txt", folder)
    b = load_benchmark(f"imagenet_s{n}", tmp_path)
    assert "none of" in caplog.text
    assert wnid_ids(listed) == {w: i for i, w in enumerate(listed, 1)} and b.names == wnid_names(listed)
    for p, labels in b: assert (labels() == listed.index(p.parent.name) + 1).all()


def test_imagenet_s_test_part_has_no_labels(tmp_path):
    imagenet_s_copy(tmp_path, 50, any_wnids(50), [(any_wnids(50)[0], np.zeros((12, 20), int))], split="test")
    b = load_benchmark("imagenet_s50", tmp_path, "test")
    assert len(b) == 1
    with pytest.raises(UserError, match="not public"): b.pairs[0][1]()


@pytest.mark.parametrize("spoil, says", [
    (lambda r: shutil.rmtree(r), "there are 0"),
    (lambda r: shutil.rmtree(r / "validation-segmentation"), "1 photographs without labels"),
    (lambda r: shutil.rmtree(r / "validation"), "1 label files without a photograph"),
    (lambda r: next(r.glob("validation/*/*.JPEG")).unlink(), "1 label files without a photograph"),
    (lambda r: [shutil.rmtree(next((r / part).iterdir())) for part in ("validation", "validation-segmentation")], "there are "),
    (lambda r: [(r / "validation/stranger").mkdir(), shutil.rmtree(r / "validation-segmentation")], "without labels"),
], ids=["nothing", "no labels", "no photos", "a photo gone", "a class gone", "a stranger"])
def test_imagenet_s_half_unpacked(tmp_path, spoil, says):
    wnids = any_wnids(50)
    spoil(imagenet_s_copy(tmp_path, 50, wnids, [(wnids[3], np.zeros((12, 20), int))]))
    for part in ("validation", "validation-segmentation"):
        if says == "there are ": shutil.rmtree(tmp_path / "ImageNet-S/ImageNetS50" / part / wnids[0], ignore_errors=True)
    with pytest.raises(UserError) as e: load_benchmark("imagenet_s50", tmp_path)
    one_message(e, says, "LUSSeg/ImageNet-S", "ImageNetS50")


def test_names_of_imagenet_classes_are_unique():
    from timm.data import ImageNetInfo
    names = wnid_names(ImageNetInfo().label_names())
    assert len({n.lower() for n in names}) == 1000
    assert wnid_names(["n02012849"]) == ["crane"] and wnid_names(["n02012849", "n03126707"])[1] == "crane (n03126707)"


def test_coco_odd_annotations(coco):
    "An empty polygon, two parts, a code as a string, a grey JPEG; what is no COCO is told at once."
    from pycocotools import mask
    file = coco / "annotations/instances_val2017.json"
    data = json.loads(file.read_text())
    Image.new("L", (20, 10)).save(coco / "val2017/b.jpg")
    stripe = np.zeros((10, 20), np.uint8); stripe[4] = 1
    code = mask.encode(np.asfortranarray(stripe))
    data["annotations"] += [dict(id=3, image_id=2, category_id=7, iscrowd=0, area=0, segmentation=[]),
                            dict(id=4, image_id=2, category_id=3, iscrowd=0, area=20,
                                 segmentation=dict(size=[10, 20], counts=code["counts"].decode())),
                            dict(id=5, image_id=2, category_id=7, iscrowd=0, area=8,
                                 segmentation=[[0, 0, 2, 0, 2, 2, 0, 2], [8, 8, 10, 8, 10, 10, 8, 10]])]
    file.write_text(json.dumps(data))
    got = ids_of(load_benchmark("coco2017", coco))[1]
    want = stripe.copy(); want[:2, :2] = want[8:10, 8:10] = 2
    assert np.array_equal(got, want)
    for spoil in (lambda d: d["annotations"][0].update(category_id=99), lambda d: d["images"][0].pop("height"),
                  lambda d: d.update(annotations=[1]), lambda d: d["annotations"][1].pop("area")):
        bad = json.loads(json.dumps(data))
        spoil(bad); file.write_text(json.dumps(bad))
        with pytest.raises(UserError, match="in COCO's format"): load_benchmark("coco2017", coco)


def test_unknown_values_in_a_label_file_do_not_count(tmp_path):
    b = Benchmark("x", ["a", "b"], [(Path("p"), lambda: np.array([[1, 2, 255, 300, 999]], np.uint16))])
    assert ids_of(restrict(b, ["b"]))[0].tolist() == [[0, 1, 255, 255, 255]]


@pytest.mark.parametrize("code", [dict(size=[60, 80], counts=[5, 5]), dict(size=[60, 80], counts="04"), dict(size=[80, 60], counts=[4800])])
def test_a_run_length_code_that_does_not_fit(code):
    with pytest.raises(ValueError): draw_object(code, 60, 80)


def test_a_half_unpacked_benchmark_is_told_on_the_command_line(coca_root):
    script = "import sys; from namedmask.benchmarks import load_benchmark; import namedmask.cli as c; c.app = lambda a: load_benchmark('coca', sys.argv[1]); c.main()"
    done = subprocess.run([sys.executable, "-c", script, str(coca_root[0])], capture_output=True, text=True)
    assert done.returncode == 0 and "none of UAV" in done.stderr and "not be those of the whole" in done.stderr


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "val.txt").write_bytes(b"2007_000033\n\xff\n")
    with pytest.raises(UserError, match="UTF-8"): read_lines(tmp_path / "val.txt")
