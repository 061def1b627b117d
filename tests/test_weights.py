"Files of weights and embeddings: every form they come in, and none that runs code."
import builtins, collections, copyreg, os, pickle, subprocess, sys, tracemalloc, zipfile

import numpy as np, pytest, torch
from safetensors.torch import save_file
from torch import nn

from namedmask.core import UserError
from namedmask.weights import PUBLISHED, WEIGHTS, load_state, read_embedding_pickle, read_weights


def test_the_front_stays_light():
    code = "import sys, namedmask.weights; assert not {'torch', 'timm', 'rich', 'safetensors.torch'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table():
    assert len(PUBLISHED) == 41 and len({p.url for p in PUBLISHED.values()}) == 41 and not set(PUBLISHED) & set(WEIGHTS)
    groups = collections.Counter(p.group for p in PUBLISHED.values())
    assert groups == dict(archives=4, masks=5, embeddings=2, networks=3, segmenters=7, experts=20)
    assert all(p.licence and p.what for p in PUBLISHED.values()) and not set(groups) & set(PUBLISHED)
    shared = "https://www.robots.ox.ac.uk/~vgg/research/namedmask/shared_files/"
    for name, end in {"archive_cityscapes": "cityscapes/cityscapes_object_category_to_p_images_n500.json",
                      "archive_coco2017": "coco2017/coco2017_category_to_p_images_n500.json", "masks_selfmask": "imagenet2012/selfmask.zip",
                      "masks_experts_cityscapes": "cityscapes/cityscapes_object.zip", "masks_experts_voc2012": "voc2012/voc2012.zip",
                      "expert_dining_table": "voc2012/experts/expert_dining_table.pt", "namedmask_coca": "coca/namedmask_coca.pt",
                      "namedmask_cityscapes": "cityscapes/namedmask_cityscapes_object.pt",
                      "namedmask_imagenet_s919": "imagenet-s/namedmask_imagenet_s919.pt"}.items():
        assert PUBLISHED[name].url == shared + end


# ---- weights

STATE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)


def parallel(s): return {f"module.{k}": v for k, v in s.items()}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}, parallel,
                                  lambda s: {"model": parallel(s)}, lambda s: {"model": s, "epoch": 3, "args": None}, dict,
                                  lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()}])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_form_of_a_state_dict(tmp_path, wrap, zipped):
    torch.save(wrap(STATE), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert same(read_weights(tmp_path / "w.pt"), STATE) and same(read_weights(str(tmp_path / "w.pt")), STATE)


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors"), STATE)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln, self.sizes, self.scale = nn.LayerNorm(4), [3, 4], nn.Parameter(torch.tensor(2.))
        self.register_buffer("resolution", torch.tensor(336))
        self.names = {"a": 1}

    def forward(self, x): return self.ln(x) * self.scale + float(self.sizes[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_is_read_without_its_program(tmp_path, dtype, how):
    net = nn.Sequential(Block(), Block()).to(dtype)
    made = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.zeros(2, 4, dtype=dtype))
    made.save(str(tmp_path / "clip.pt"))
    assert same(read_weights(tmp_path / "clip.pt"), dict(net.state_dict()))


def test_a_view_in_torchscript(tmp_path):
    net = nn.Linear(3, 4)
    net.weight = nn.Parameter(torch.randn(3, 4).T)
    torch.jit.trace(net, torch.zeros(1, 3)).save(str(tmp_path / "s.pt"))
    assert same(read_weights(tmp_path / "s.pt"), dict(net.state_dict()))


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\3\4", b"\x80\x02.", b"\x80\x02}q\x00.", pickle.dumps([1]), pickle.dumps({})])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_files_that_are_no_weights(tmp_path, content, ending):
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad"): read_weights(path)


@pytest.mark.parametrize("thing", [torch.zeros(3), [torch.zeros(3)], {"model": 3}, {"model": {"a": [1]}}, {}, {1: torch.zeros(1)}])
def test_files_without_a_state_dict(tmp_path, thing):
    torch.save(thing, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt (holds no|is no plain) state dict"): read_weights(tmp_path / "bad.pt")


def test_missing_file_folder_and_a_file_cut_short(tmp_path):
    with pytest.raises(UserError, match="no file"): read_weights(tmp_path / "none.pt")
    with pytest.raises(UserError, match="cannot be read"): read_weights(tmp_path)
    torch.save(STATE, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:-100])
    with pytest.raises(UserError, match="w.pt cannot be read"): read_weights(tmp_path / "w.pt")


def test_what_does_not_fit_is_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bad = {k: v + 1 for k, v in STATE.items() if k != "1.running_var"} | {"0.bias": torch.zeros(5), "head.weight": torch.zeros(1)}
    with pytest.raises(UserError) as error: load_state(net, bad, "w.pt")
    for words in "w.pt", "1 missing: 1.running_var", "1 unknown: head.weight", "0.bias (5,), not (4,)": assert words in str(error.value)
    assert same(net.state_dict(), before)                  # nothing was loaded in part
    load_state(net, STATE | {"head.weight": torch.zeros(1)}, "w.pt", extra_ok=True)
    load_state(net, {k: v for k, v in STATE.items() if "num_batches" not in k}, "w.pt")
    assert same(net.state_dict(), STATE)


# ---- nothing runs

class Evil:
    "Pickles as a call of anything."
    def __init__(self, f, *args): self.call = f, args
    def __reduce__(self): return self.call


class EvilState:
    def __reduce__(self): return collections.OrderedDict, (), {"__class__": 1}


def attacks(path):
    touch = f"open({str(path)!r}, 'w').close()"
    return {"system": Evil(os.system, f"touch {path}"), "eval": Evil(eval, touch), "exec": Evil(exec, touch),
            "mkdir": Evil(os.mkdir, str(path)),
            "getattr": Evil(getattr, Evil(__import__, "os"), "system"), "popen": Evil(subprocess.Popen, ["touch", str(path)]),
            "loads": Evil(pickle.loads, pickle.dumps(Evil(os.mkdir, str(path)))),
            "copyreg": Evil(copyreg._reconstructor, Block, object, None),
            "state": EvilState(), "torch.load": Evil(torch.load, str(path)), "numpy": Evil(np.load, str(path), None, True),
            "apply": Evil(builtins.map, os.mkdir, [str(path)])}


ATTACKS = list(attacks("x"))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("place", ["value", "key_later", "nested", "top"])
def test_an_embedding_pickle_runs_nothing(tmp_path, attack, protocol, place):
    evil = attacks(tmp_path / "was_here")[attack]
    x = {"a": torch.zeros(8)}
    thing = {"value": {**x, "b": evil}, "key_later": {"b": evil, **x}, "nested": {**x, "b": [{"c": (evil,)}]}, "top": evil}[place]
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(thing, protocol))
    with pytest.raises(UserError, match="e.pkl"): read_embedding_pickle(tmp_path / "e.pkl")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_runs_inside_a_storage_or_a_checkpoint(tmp_path, attack):
    evil = attacks(tmp_path / "was_here")[attack]
    inner = pickle.dumps(evil)
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"a": Evil(torch.storage._load_from_bytes, inner)}))
    with pytest.raises(UserError, match="e.pkl"): read_embedding_pickle(tmp_path / "e.pkl")
    for zipped in True, False:
        torch.save({"a": torch.zeros(3), "b": evil}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="w.pt"): read_weights(tmp_path / "w.pt")
        with pytest.raises(UserError, match="e.pkl|w.pt"): read_embedding_pickle(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "s.pt", "w") as z:     # as a TorchScript file
        z.writestr("s/data.pkl", pickle.dumps(evil, 2)); z.writestr("s/constants.pkl", pickle.dumps(evil, 2)); z.writestr("s/code/x.py", "")
    with pytest.raises(UserError, match="s.pt"): read_weights(tmp_path / "s.pt")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("raw", [
    b"cos\nsystem\n(S'touch was_here'\ntR.", b"(S'touch was_here'\nios\nsystem\n.", b"(cos\nsystem\nS'touch was_here'\no.",
    b"\x80\x02cposix\nsystem\nX\x0e\x00\x00\x00touch was_here\x85R.", b"\x80\x04\x82\x01.", b"P1\n.", b"\x80\x04K\x01Q.",
    b"\x80\x04]\x94h\x00a.",
    b"\x80\x04B\xff\xff\xff\x7f.", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", b"\x80\x04h\x07.", b"\x80\x09.", b"0", b"t.",
    b"\x80\x04ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00aK\x01ub.", b"\x80\x04" + b"\x95" + b"\xff" * 8 + b"}."])
def test_pickles_by_hand(tmp_path, raw, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.pkl").write_bytes(raw)
    with pytest.raises(UserError, match="e.pkl"): read_embedding_pickle("e.pkl")
    assert [p.name for p in tmp_path.iterdir()] == ["e.pkl"]


# ---- embeddings

def vectors(n=50, d=16): return {f"n{i:08}_{i}.JPEG": torch.randn(d) for i in range(n)}


def as_dict(path, **kw):
    names, table = read_embedding_pickle(path, **kw)
    assert table.shape[0] == len(names)
    return dict(zip(names, table))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", [lambda v: v, lambda v: v.half(), lambda v: v.double(), lambda v: v.bfloat16(),
                                  lambda v: v[None], nn.Parameter, lambda v: torch.stack([v, v], 1)[:, 1],
                                  lambda v: v.numpy(), lambda v: v.numpy().astype(np.float16),
                                  lambda v: v.numpy()[None]])
def test_every_form_of_embeddings(tmp_path, protocol, form):
    entries = {k: form(v) for k, v in vectors().items()}
    with open(tmp_path / "e.pkl", "wb") as f: pickle.dump(entries, f, protocol)
    got = as_dict(tmp_path / "e.pkl", dtype=np.float32)
    assert list(got) == list(entries)
    for k, v in entries.items():
        want = v.detach().float().numpy().reshape(-1) if isinstance(v, torch.Tensor) else v.astype(np.float32).reshape(-1)
        np.testing.assert_array_equal(got[k], want)


def test_other_containers(tmp_path):
    entries = vectors()
    for thing in collections.OrderedDict(entries), entries:
        (tmp_path / "e.pkl").write_bytes(pickle.dumps(thing))
        assert list(as_dict(tmp_path / "e.pkl")) == list(entries)
        torch.save(thing, tmp_path / "e.pkl")
        assert list(as_dict(tmp_path / "e.pkl")) == list(entries)


def test_a_vector_with_two_names(tmp_path):
    v, w = torch.randn(16), torch.randn(16)
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"a": v, "b": w, "c": v}))
    got = as_dict(tmp_path / "e.pkl", dtype=np.float32)
    assert (got["c"] == v.numpy()).all() and (got["b"] == w.numpy()).all() and list(got) == ["a", "b", "c"]


@pytest.mark.parametrize("thing, words", [({"a": torch.zeros(3), "b": torch.zeros(4)}, "one length"),
                                          ({"a": torch.zeros(2, 3)}, "one length"),
                                          ({}, "no dict"), ([torch.zeros(3)], ""), ({"a": 3}, "no dict"), ({1: torch.zeros(3)}, "no dict"),
                                          ({"a": torch.zeros(0)}, "one length"), ({"a": torch.zeros(3, dtype=torch.long)}, "LongStorage"),
                                          ({"a": np.array(["x"], object)}, ""), ({"a": torch.tensor(1.).expand(3)}, "one length")])
def test_what_is_no_embeddings(tmp_path, thing, words):
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(thing))
    with pytest.raises(UserError, match=f"e.pkl.*{words}"): read_embedding_pickle(tmp_path / "e.pkl")


def test_embeddings_cut_short(tmp_path):
    whole = pickle.dumps(vectors())
    for n in 0, 1, 10, 500, len(whole) // 2, len(whole) - 1:
        (tmp_path / "e.pkl").write_bytes(whole[:n])
        with pytest.raises(UserError, match="e.pkl"): read_embedding_pickle(tmp_path / "e.pkl")
    with pytest.raises(UserError, match="no file"): read_embedding_pickle(tmp_path / "none.pkl")


def test_memory(tmp_path):
    "Reading takes little more than the table: 3000 vectors are 9 MB as tensors, 4.6 MB as rows."
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({f"n{i:08}.JPEG": torch.randn(768) for i in range(3000)}))
    read_embedding_pickle(tmp_path / "e.pkl")              # imports what it needs
    tracemalloc.start()
    names, table = read_embedding_pickle(tmp_path / "e.pkl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    reserved = table.base.nbytes                           # counted whole here, though what is never touched takes no memory
    assert len(names) == 3000 and reserved < 1.12 * table.nbytes and peak < reserved + 1.5e6


def test_a_checkpoint_with_a_flipped_byte_is_not_used(tmp_path):
    "torch does not look at the checksums."
    torch.save({"a.weight": torch.zeros(5000)}, tmp_path / "w.pt")
    raw = bytearray((tmp_path / "w.pt").read_bytes())
    at = raw.find(bytes(2000))
    raw[at + 1000] ^= 1
    (tmp_path / "w.pt").write_bytes(raw)
    with pytest.raises(UserError, match="damaged"): read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("content, says", [(b"<html>404</html>", "web page"), (b"", "is empty"), (b"101", "begins with")])
def test_what_is_no_checkpoint_is_told_in_our_words(tmp_path, content, says):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match=says) as e: read_weights(tmp_path / "w.pt")
    assert "weights_only" not in str(e.value)


def test_a_checkpoint_that_asks_for_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, ("touch " + str(tmp_path / "ran"),)
    torch.save({"a": Evil()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="system") as e: read_weights(tmp_path / "w.pt")
    assert "weights_only" not in str(e.value) and not (tmp_path / "ran").exists()


def test_an_entry_that_is_no_tensor_is_named(tmp_path):
    torch.save({"a": torch.zeros(2), "note": "x"}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="note"): read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("value, says", [(torch.full((3, 2), float("nan")), "finite"), (torch.zeros(3, 2, dtype=torch.complex64), "unusual kind"),
                                         (torch.zeros(3, 2).to_sparse(), "unusual kind"), (torch.empty(3, 2, device="meta"), "unusual kind")])
def test_values_that_no_network_has(value, says):
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=f"{says}.*weight"): load_state(layer, dict(weight=value, bias=torch.zeros(3)), "the file")
