"Retrieval on real photographs whose class is known, and the cache under bad luck."
import os, shutil
from pathlib import Path

import numpy as np
import pytest

from namedmask.core import list_photos, read_json
from namedmask.encoders import definitions, lite0_classifier, make_encoder
from namedmask.retrieval import embed_index, r_precision, retrieve


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
    assert np.mean(right) >= 0.45


class Grey:
    "An encoder of one number, the mean grey, that counts what it looks at."
    name, dim, gap, margin, floor, sure, few, stranger = "grey", 1, 0.1, 0.1, 0.0, 0.5, 8, 0.3
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
