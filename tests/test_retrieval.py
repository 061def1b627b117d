"Retrieval on real photographs whose class is known, and the cache under bad luck."
import json, shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namedmask import retrieval
from namedmask.core import UserError, list_photos, read_archive, read_json, write_archive, write_json
from namedmask.encoders import ClipEncoder, make_encoder
from namedmask.retrieval import Index, blocks, embed_index, index_from_embeddings, keep_index, locate, r_precision, reroot, retrieve, top_n


@pytest.fixture(scope="module")
def encoder(): return make_encoder("offline")


@pytest.fixture(scope="module")
def sample(shared, encoder, tmp_path_factory):
    root = shared / "data" / "imagenet_sample" / "train"
    photos, _ = list_photos(root)
    return embed_index(encoder, root, photos, tmp_path_factory.mktemp("embeddings"))


def test_the_mapping_of_the_weights_gives_the_known_accuracy(sample):
    from timm.data import ImageNetInfo
    info = ImageNetInfo()
    top = [info.index_to_label_name(int(i)) for i in sample.vectors.argmax(1)]
    assert len(top) == 1000
    assert np.mean([t == p.split("/")[0] for t, p in zip(top, sample.photos)]) >= 0.865


def test_r_precision_of_the_voc_names(shared, sample, encoder):
    wnids = read_json(shared / "data" / "voc_wnids.json")
    sims = encoder.similarity(sample.vectors, encoder.encode_names([[n] for n in wnids]))
    truth = np.array([[p.split("/")[0] in wnids[n] for p in sample.photos] for n in wnids])
    assert np.mean([r_precision(s, t) for s, t in zip(sims, truth)]) >= 0.75


def test_strangers_show_none_of_the_names(shared, sample, encoder):
    wnids = read_json(shared / "data" / "voc_wnids.json")
    _, _, none = retrieve(encoder, sample, {n: [n] for n in wnids})
    known = {w for ws in wnids.values() for w in ws}
    assert len(none) > 200 and np.mean([p.split("/")[0] in known for p in none]) < 0.08


def test_what_the_rule_keeps_is_mostly_right(shared, sample, encoder):
    wnids = read_json(shared / "data" / "voc_wnids.json")
    archive, _, _ = retrieve(encoder, sample, {n: [n] for n in wnids})
    right = [np.mean([p.split("/")[0] in wnids[n] for p in ps]) for n, ps in archive.items() if ps]
    assert np.mean(right) >= 0.55


class Grey:
    "An encoder of one number, the mean grey, that counts what it looks at."
    name, dim, rule, at_least, gap, margin, floor, sure, few, likely, stranger = "grey", 1, "fit", 256, 0.1, 0.1, 0.0, 0.5, 8, 0.5, 0.3
    def __init__(self): self.seen = 0
    def prepare(self, photo): return np.array([np.asarray(photo.convert("L")).mean() / 255], np.float32)
    def encode(self, batch): self.seen += len(batch); return batch.astype(np.float16)
    def encode_names(self, prompts): return np.ones((len(prompts), 1), np.float32)
    def similarity(self, photos, names): return names @ photos.astype(np.float32).T


@pytest.fixture
def folder(world, tmp_path):
    for p in world.photos[:7]:
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(world.index / p, tmp_path / "photos" / p)
    return tmp_path


def embed(folder, encoder, **kw):
    photos, _ = list_photos(folder / "photos")
    return embed_index(encoder, folder / "photos", photos, folder / "e", **kw)


def test_nothing_is_embedded_twice(folder):
    e = Grey()
    a, b = embed(folder, e, bs=2, shard=3), embed(folder, e, bs=2, shard=3)
    assert e.seen == 7 and (a.vectors == b.vectors).all() and a.photos == b.photos


@pytest.mark.parametrize("damage", ["no json", "short npy", "half json"])
def test_a_damaged_shard_is_made_again(folder, damage):
    e = Grey()
    a = embed(folder, e, bs=2, shard=3)
    meta = sorted((folder / "e" / "grey").glob("*.json"))[0]
    if damage == "no json": meta.unlink()
    if damage == "short npy": meta.with_suffix(".npy").write_bytes(meta.with_suffix(".npy").read_bytes()[:-3])
    if damage == "half json": meta.write_text(meta.read_text()[:20])
    b = embed(folder, e, bs=2, shard=3)
    assert e.seen == 7 + 4 and (a.vectors == b.vectors).all()


def test_a_photograph_that_vanishes_is_listed(folder):
    photos, _ = list_photos(folder / "photos")
    (folder / "photos" / photos[2]).unlink()
    index = embed_index(Grey(), folder / "photos", photos, folder / "e")
    assert len(index.photos) == 6 and index.skipped == [dict(photo=photos[2], reason="the file is gone")]


class Line(Grey):
    "An encoder whose photographs are numbers and whose rule is the paper's."
    name, rule = "line", "top"


def index_of(vectors): return Index([f"{i}.jpg" for i in range(len(vectors))], np.asarray(vectors, np.float16))


class Dot:
    "Exact for small integers, whatever the order of summation."
    rule = "top"
    def __init__(self, names): self.names = np.asarray(names, np.float32)
    def encode_names(self, prompts): return self.names
    def similarity(self, photos, names): return names @ photos.astype(np.float32).T


@pytest.mark.parametrize("n", [1, 7, 500, 3000, 9999])
def test_top_n_is_exact_with_ties_in_the_order_of_the_index(n):
    rng = np.random.default_rng(n)
    vectors, names = rng.integers(-3, 4, (3000, 8)).astype(np.float16), rng.integers(-3, 4, (5, 8)).astype(np.float32)
    wanted = np.argsort(-(names.astype(int) @ vectors.astype(int).T), axis=1, kind="stable")[:, :n]
    for size in 1, 100, 2999, 4000:
        if size == 1 and n > 7: continue
        rows, best = top_n(Dot(names), vectors, names, n, size)
        assert (rows == wanted).all() and (best == np.take_along_axis(names @ vectors.astype(np.float32).T, rows, 1)).all()


def test_top_n_against_float64(tmp_path):
    "Random unit vectors from a memory map: what is left out is nowhere better than what is taken."
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20_000, 96)).astype(np.float32)
    np.save(tmp_path / "v.npy", (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    vectors, names = np.load(tmp_path / "v.npy", mmap_mode="r"), rng.standard_normal((9, 96)).astype(np.float32)
    class Clip: similarity = ClipEncoder.similarity
    rows, best = top_n(Clip(), vectors, names, 500, 3000)
    exact = names.astype(float) @ vectors.astype(float).T
    for i, r in enumerate(rows):
        assert len(set(r)) == 500 and (np.diff(exact[i, r]) < 1e-5).all()
        assert np.delete(exact[i], r).max() <= exact[i, r].min() + 1e-5


def test_a_damaged_vector_is_never_chosen():
    vectors = np.arange(10, dtype=np.float16)[:, None].copy()
    vectors[3] = np.nan
    archive, report, _ = retrieve(Dot([[1], [-1]]), index_of(vectors), {"up": ["up"], "down": ["down"]}, 4)
    assert archive == {"up": ["9.jpg", "8.jpg", "7.jpg", "6.jpg"], "down": ["0.jpg", "1.jpg", "2.jpg", "4.jpg"]}
    archive, report, _ = retrieve(Dot([[1]]), index_of(vectors), {"up": ["up"]}, 50)
    assert len(archive["up"]) == report["up"]["kept"] == 9 and "3.jpg" not in archive["up"]


def test_the_paper_s_rule_takes_exactly_n_and_says_when_there_is_no_choice():
    archive, report, none = retrieve(Dot([[1], [-1]]), index_of(np.arange(100)[:, None]), {"up": ["up"], "down": ["down"]}, 40)
    assert archive["up"] == [f"{i}.jpg" for i in range(99, 59, -1)] and archive["down"] == [f"{i}.jpg" for i in range(40)] and none == []
    assert report["up"]["kept"] == 40 and (report["up"]["best"], report["up"]["worst"]) == (99, 60) and report["up"]["sure"] is True
    assert report["up"]["warning"] is None and list(report["up"]["similarity"]) == archive["up"]
    _, report, _ = retrieve(Dot([[1]]), index_of(np.arange(100)[:, None]), {"up": ["up"]}, 500)
    assert "100 of all 100 photographs" in report["up"]["warning"]
    json.dumps(report)


def test_the_other_rule_in_blocks_is_the_same(sample, encoder, monkeypatch):
    names = {n: [n] for n in ("dog", "teapot", "submarine")}
    whole = retrieve(encoder, sample, names)
    monkeypatch.setattr(retrieval, "blocks", lambda v, size=0: blocks(v, 300))
    assert retrieve(encoder, sample, names) == whole


def test_a_large_index_is_mapped_and_merged_once(folder, monkeypatch):
    e = Line()
    a = embed(folder, e, bs=2, shard=3)
    monkeypatch.setattr(retrieval, "LARGE", 1)
    b = embed(folder, e, bs=2, shard=3)
    assert isinstance(b.vectors, np.memmap) and (a.vectors == b.vectors).all() and a.photos == b.photos and e.seen == 7
    files = sorted(f.name for f in (folder / "e" / "line").iterdir())
    assert len(files) == 2
    c = embed(folder, e, bs=2, shard=3)
    assert isinstance(c.vectors, np.memmap) and (a.vectors == c.vectors).all() and sorted(f.name for f in (folder / "e" / "line").iterdir()) == files
    (folder / "photos" / b.photos[3]).write_bytes(b"")                     # one is broken, and one is new
    shutil.copy(folder / "photos" / b.photos[0], folder / "photos" / "zz.jpg")
    d = embed(folder, e, bs=2, shard=3)
    assert e.seen == 8 and d.photos == [*b.photos[:3], *b.photos[4:], "zz.jpg"] and [s["photo"] for s in d.skipped] == [b.photos[3]]
    assert (d.vectors[[0, 1, 2, 3, 4, 5]] == a.vectors[[0, 1, 2, 4, 5, 6]]).all() and d.vectors[6] == a.vectors[0]
    assert embed(folder, e).skipped == d.skipped and e.seen == 8
    retrieve(e, d, {"grey": ["grey"]}, 2)


@pytest.mark.parametrize("when", ["before the list", "before the old are gone", "with half of the old gone"])
def test_a_kill_while_merging_loses_nothing(folder, monkeypatch, when):
    e = Line()
    a = embed(folder, e, bs=2, shard=3)
    monkeypatch.setattr(retrieval, "LARGE", 1)
    with monkeypatch.context() as m:
        def killed(*args, **kw): raise KeyboardInterrupt
        if when == "before the list": m.setattr(retrieval, "write_json", killed)
        if when == "before the old are gone": m.setattr(Path, "unlink", killed)
        if when == "with half of the old gone":
            unlink, count = Path.unlink, []
            m.setattr(Path, "unlink", lambda self, **kw: count.append(unlink(self, **kw)) if not count or ".writing" in self.name else killed())
        with pytest.raises(KeyboardInterrupt): embed(folder, e, bs=2, shard=3)
    b = embed(folder, e, bs=2, shard=3)
    assert e.seen == 7 and (a.vectors == b.vectors).all() and len(list((folder / "e" / "line").iterdir())) == 2


def test_shards_of_another_width_do_not_count(folder):
    e = Line()
    embed(folder, e)
    e.dim = 2
    e.encode = lambda batch: np.repeat(Line.encode(e, batch), 2, 1)
    assert embed(folder, e).vectors.shape == (7, 2) and e.seen == 14


def test_many_shards_do_not_run_out_of_open_files(folder):
    import resource
    e, cache, photos = Line(), folder / "e" / "line", list_photos(folder / "photos")[0]
    cache.mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for n in range(300):
        np.save(cache / f"{n:06d}.npy", np.full((1, 1), n, np.float16))
        write_json(cache / f"{n:06d}.json", dict(signatures=[f"{n}"], skipped={}))
    keys = {str(n): n for n in range(300)}
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        where, shards, _ = retrieval.read_shards(cache, keys, 1)
        assert retrieval.gather(shards, where, np.empty((300, 1)))[:, 0].tolist() == list(range(300))
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def imagenet(tmp_path):
    "A part of ImageNet, as a user has it."
    for p in ("train/n01/n01_1.JPEG", "train/n01/n01_2.JPEG", "train/n02/n02_1.JPEG", "val/n01/ILSVRC2012_val_1.JPEG"):
        (tmp_path / "net" / p).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "net" / p).touch()
    return tmp_path / "net"


FOREIGN = "/home/cs-shin1/datasets/ImageNet2012/train"


def test_an_archive_is_rerooted_and_written_in_the_paper_s_format(imagenet, tmp_path):
    archive = {"tv/monitor": [f"{FOREIGN}/n02/n02_1.JPEG", f"{FOREIGN}/n01/n01_1.JPEG"], "dog": [f"{FOREIGN}/n01/n01_1.JPEG"]}
    write_archive(tmp_path / "a.json", archive)
    assert reroot(read_archive(tmp_path / "a.json"), imagenet) == {"tv/monitor": ["train/n02/n02_1.JPEG", "train/n01/n01_1.JPEG"], "dog": ["train/n01/n01_1.JPEG"]}
    assert reroot(archive, imagenet / "train")["dog"] == ["n01/n01_1.JPEG"]
    ours = {n: [f"{imagenet}/{p}" for p in ps] for n, ps in reroot(archive, imagenet).items()}
    write_archive(tmp_path / "b.json", ours)
    assert json.loads((tmp_path / "b.json").read_text()) == ours and list(json.loads((tmp_path / "b.json").read_text())) == ["tv/monitor", "dog"]
    assert reroot(ours, imagenet) == reroot(archive, imagenet)


def test_the_longest_tail_wins(tmp_path):
    for p in ("a.JPEG", "n01/a.JPEG", "train/n01/a.JPEG", "n02/b.JPEG"): (tmp_path / p).parent.mkdir(parents=True, exist_ok=True); (tmp_path / p).touch()
    (tmp_path / "train/n02").mkdir()                                        # there, but without the photograph
    assert locate(["/x/train/n01/a.JPEG", "/x/val/n01/a.JPEG", "/x/n03/a.JPEG", "/x/train/n02/b.JPEG", "/x/b.JPEG"], tmp_path) == ["train/n01/a.JPEG", "n01/a.JPEG", "a.JPEG", "n02/b.JPEG", None]


def test_no_path_leads_out_of_the_root(imagenet, tmp_path):
    (tmp_path / "secret.txt").touch()
    assert locate(["../secret.txt", "/x/../secret.txt", str(tmp_path / "secret.txt"), "train/../../secret.txt", "..", "", "/", "train/n01/", "train/n01"], imagenet) == [None] * 9
    assert locate(["x\0y/a.JPEG", "y" * 5000 + "/a.JPEG"], imagenet) == [None] * 2


def test_what_is_missing_is_listed_and_counted(imagenet):
    gone = [f"{FOREIGN}/n09/n09_{i}.JPEG" for i in range(40)]
    with pytest.raises(UserError) as told: reroot({"cat": gone, "dog": gone[:5] + [f"{FOREIGN}/n01/n01_1.JPEG"]}, imagenet)
    assert "40 of the archive's 41 photographs" in str(told.value) and gone[0] in str(told.value) and gone[3] not in str(told.value) and "unpack" in str(told.value)
    with pytest.raises(UserError, match="40 of the archive's 40"): reroot({"cat": gone}, imagenet)
    with pytest.raises(UserError, match="is not a folder"): reroot({"cat": gone}, imagenet / "none")


def test_one_photograph_under_two_names_is_two_items(imagenet, tmp_path):
    from namedmask.copy_paste import make_items
    from namedmask.core import mask_file, write_mask
    archive = reroot({n: [f"{FOREIGN}/n01/n01_1.JPEG"] for n in ("cat", "dog")}, imagenet)
    write_mask(mask_file(tmp_path / "masks", "train/n01/n01_1.JPEG"), np.ones((4, 4), bool))
    items, without = make_items(archive, imagenet, tmp_path / "masks")
    assert [i.label for i in items] == [1, 2] and len({i.photo for i in items}) == 1 and without == []


def test_an_index_from_published_embeddings(imagenet):
    files = [f"{FOREIGN}/n01/n01_2.JPEG", "n02_1.JPEG", "ILSVRC2012_val_1.JPEG", f"{FOREIGN}/n05/n05_1.JPEG"]
    index = index_from_embeddings(files, np.array([[3, 4], [0, 2], [1, 0], [1, 1]], np.float16), imagenet)
    assert index.photos == ["train/n01/n01_2.JPEG", "train/n02/n02_1.JPEG", "val/n01/ILSVRC2012_val_1.JPEG"] and index.vectors.dtype == np.float16
    assert np.allclose(index.vectors, [[.6, .8], [0, 1], [1, 0]], atol=1e-3) and [s["photo"] for s in index.skipped] == files[3:]
    archive, _, _ = retrieve(Dot([[0, 1], [1, 0]]), index, {"north": [], "east": []}, 2)
    assert archive == {"north": ["train/n02/n02_1.JPEG", "train/n01/n01_2.JPEG"], "east": ["val/n01/ILSVRC2012_val_1.JPEG", "train/n01/n01_2.JPEG"]}
    with pytest.raises(UserError, match="None of the 1 photographs"): index_from_embeddings(files[3:], np.ones((1, 2)), imagenet)
    with pytest.raises(UserError, match="as many"): index_from_embeddings(files, np.ones((1, 2)), imagenet)


def test_from_a_pickle_to_the_archive(imagenet, tmp_path):
    import pickle, torch
    from namedmask.weights import read_embedding_pickle
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({f"{FOREIGN}/n01/n01_{i}.JPEG": torch.eye(2)[i - 1] for i in (1, 2)}))
    index = index_from_embeddings(*read_embedding_pickle(tmp_path / "e.pkl"), imagenet)
    e = Dot([[0, 1]])
    e.name, e.dim, e.at_least = "dot", 2, None
    keep_index(e, index, imagenet, tmp_path / "cache")
    kept = embed_index(e, imagenet, index.photos, tmp_path / "cache")      # nothing is left to embed, so `prepare` is not asked for
    assert retrieve(e, kept, {"second": []}, 1)[0] == {"second": ["train/n01/n01_2.JPEG"]}


def test_a_strip_is_no_burden():
    "60 000 pixels wide and one high: only its middle is enlarged."
    from namedmask.encoders import lite0_input
    assert lite0_input(Image.new("RGB", (60_000, 1), (255, 0, 0))).shape == (3, 224, 224)
    wide = Image.new("RGB", (900, 100)); wide.paste((255, 255, 255), (400, 0, 500, 100))
    assert (lite0_input(wide)[:, :, 20:-20] > .9).all()
