"""Benchmarks: COCO's masks against pycocotools' own, incomplete data, names."""
import contextlib, io, json, os, shutil, warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namedmask.benchmarks import Benchmark, coco_labels, load_benchmark, match_names, restrict
from namedmask.core import UserError

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


def test_names_reorder_merge_and_warn(coco):
    with pytest.warns(UserWarning, match="dragon"): b = load_benchmark("coco2017", coco, names=["CAT", "dragon", "sofa"])
    assert b.names == ["CAT", "sofa"]
    labels = b.pairs[0][1]()
    full = load_benchmark("coco2017", coco).pairs[0][1]()
    assert np.array_equal(labels == 1, full == 2) and np.array_equal(labels == 2, full == 1)
    only = load_benchmark("coco2017", coco, names=["couch"]).pairs[0][1]()
    assert np.array_equal(only, full == 1)
    with pytest.raises(UserError, match="none of the names"): load_benchmark("coco2017", coco, names=["dragon"])


def test_no_warning_when_all_match(coco):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_benchmark("coco2017", coco, names=["couch", "cat"])


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
