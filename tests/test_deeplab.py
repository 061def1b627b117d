"The segmenter: parity with the published network, any size, bad files."
import importlib.util, json, os
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import save_file

from namedmask.core import UserError
from namedmask.deeplab import (convert, load_published, load_segmenter, load_state, make_segmenter, normalise, param_groups, pixel_stats,
                               read_weights, save_segmenter)
from namedmask.weights import published_path

SHARED = Path(os.environ.get("NAMEDMASK_SHARED", Path(__file__).parents[1].parent / "shared"))
needs_golden = pytest.mark.skipif(not (SHARED / "golden" / "fill.py").exists(),
                                  reason="the golden files are not here (set NAMEDMASK_SHARED)")


def golden(name):
    spec = importlib.util.spec_from_file_location("fill", SHARED / "golden" / "fill.py")
    fill = importlib.util.module_from_spec(spec); spec.loader.exec_module(fill)
    return fill.state_dict(name), np.load(SHARED / "golden" / f"{name}.npz")


@needs_golden
@pytest.mark.parametrize("arch, n", [("resnet50", 21), ("resnet50", 2), ("resnet101", 21)])
def test_published_network(arch, n):
    state, z = golden(f"deeplabv3plus_{arch}_{n}")
    model = make_segmenter(arch, n_classes=n, pretrained=False)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == \
        json.loads((SHARED / "golden" / "shapes" / f"deeplabv3plus_{arch}_{n}.json").read_text())
    load_state(model, state, "golden")
    with torch.no_grad(): y = model.eval()(torch.from_numpy(z["inputs"])).numpy()
    assert abs(y - z["outputs"]).max() <= 2e-4 * abs(z["outputs"]).max()
    with torch.no_grad(): model.train()(torch.from_numpy(z["inputs"]))
    for key in z.files:
        if key.startswith("after_train_step/"):
            np.testing.assert_allclose(model.state_dict()[key.split("/")[1]].numpy(), z[key], rtol=2e-4, atol=1e-6)


def close(model, z):
    with torch.no_grad(): y = model(torch.from_numpy(z["inputs"])).numpy()
    assert abs(y - z["outputs"]).max() <= 2e-4 * abs(z["outputs"]).max()


@needs_golden
@pytest.mark.parametrize("arch, n, wrap", [("resnet50", 21, dict), ("resnet101", 21, lambda s: {"model": s}),
                                           ("resnet50", 2, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}})])
def test_published_file(tmp_path, arch, n, wrap):
    "The way of a downloaded file: read, recognised, checked, run; trained; converted."
    state, z = golden(f"deeplabv3plus_{arch}_{n}")
    torch.save(wrap(state), tmp_path / "p.pt")
    model = load_published(tmp_path / "p.pt")
    assert (model.arch, model.n_classes, model.names, model.mean) == (arch, n, [f"class {i}" for i in range(1, n)], (.485, .456, .406))
    assert not model.training
    close(model, z)
    with torch.no_grad(): model.train()(torch.from_numpy(z["inputs"]))
    for key in z.files:
        if key.startswith("after_train_step/"):
            np.testing.assert_allclose(model.state_dict()[key.split("/")[1]].numpy(), z[key], rtol=2e-4, atol=1e-6)
    names = [f"name {i}" for i in range(1, n)]
    convert(tmp_path / "p.pt", tmp_path / "s.safetensors", names)
    for again in load_segmenter(tmp_path / "s.safetensors"), load_published(tmp_path / "s.safetensors"):
        assert (again.arch, again.names, again.meta["source"], len(again.meta["sha256"])) == (arch, names, "p.pt", 64)
        assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    close(again, z)


def test_published_files_that_do_not_fit(tmp_path):
    state, path = make_segmenter("resnet50", 3, pretrained=False).state_dict(), tmp_path / "p.pt"
    def fails(state, *words, **kw):
        torch.save(state, path)
        with pytest.raises(UserError) as error: load_published(path, **kw)
        for word in (path.name, *words): assert word in str(error.value)
    last = "classifier.classifier.3.weight"
    fails({k: v for k, v in state.items() if k != "backbone.layer3.5.conv1.weight"}, "1 missing: backbone.layer3.5.conv1.weight")
    fails({k: v for k, v in state.items() if k != last}, f"1 missing: {last}")
    fails(state | {"backbone.fc.weight": torch.zeros(2), "epoch": torch.tensor(1)}, "2 unknown: backbone.fc.weight, epoch")
    fails(state | {"backbone.conv1.weight": torch.zeros(64, 1, 7, 7)}, "backbone.conv1.weight (64, 1, 7, 7), not (64, 3, 7, 7)")
    for bad in torch.zeros(()), torch.zeros(0, 256, 1, 1), torch.zeros(3, 99, 1, 1):
        fails(state | {last: bad}, f"{last} {tuple(bad.shape)}, not")
    fails({"encoder.pos_embed": torch.zeros(1)}, "missing: backbone.conv1.weight", "unknown: encoder.pos_embed")
    fails(state, "missing: backbone.layer3.6", arch="resnet101")
    fails(state, "2 names", "1 names are given", names=["one"])
    torch.save(state, path)
    assert load_published(path, ["a", "b"]).names == ["a", "b"]
    with pytest.raises(UserError, match="must end in .safetensors"): convert(path, tmp_path / "s.pt")
    with pytest.raises(UserError, match="There is no file"): load_published(tmp_path / "none.pt")
    with pytest.raises(UserError, match="namedmask_voc2012"): load_published("namedmask_voc")
    save_segmenter(tmp_path / "s.safetensors", make_segmenter("resnet50", 3, pretrained=False), ["a", "b"])
    with pytest.raises(UserError, match="1 names are given"): load_published(tmp_path / "s.safetensors", ["one"])


def test_the_start_from_dino(tmp_path, monkeypatch):
    "By a file and by name: torchvision's names without a classifier, found in the cache without a network."
    from torchvision.models import resnet50
    state = {k: v + 1 for k, v in resnet50().state_dict().items() if not k.startswith("fc.")}
    monkeypatch.setenv("NAMEDMASK_HOME", str(tmp_path)); monkeypatch.setenv("NAMEDMASK_OFFLINE", "1")
    path = published_path("dino_resnet50")
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    for pretrained in path, True:
        model = make_segmenter("resnet50", 21, pretrained)
        assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())
    torch.save({k: v for k, v in state.items() if not k.startswith("layer4.2")}, path)
    with pytest.raises(UserError, match="missing: layer4.2.conv1.weight"): make_segmenter("resnet50", 21, path)
    with pytest.raises(UserError, match="recorded when it was first used.*pretrained=PATH"): make_segmenter("resnet50", 21, True)


@pytest.mark.parametrize("stride, size", [(8, (9, 13)), (16, (5, 7)), (32, (3, 4))])
def test_mobilenetv2(tmp_path, stride, size):
    model = make_segmenter("mobilenetv2_100", 21, pretrained=False, head_channels=256, output_stride=stride).eval()
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        low, high = model.backbone(x)
        assert low.shape == (2, 24, 17, 25) and high.shape == (2, 320, *size) and model(x).shape == (2, 21, 65, 97)
    assert sum(p.numel() for p in model.backbone.parameters()) == 1_811_712       # torchvision's mobilenet_v2 up to its 320 features
    assert sum(p.numel() for p in model.parameters()) == 2_648_421
    assert {m.momentum for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {.01}
    torch.save(model.state_dict(), tmp_path / "m.pt")
    again = load_published(tmp_path / "m.pt", arch="mobilenetv2_100", head_channels=256, output_stride=stride)
    with torch.no_grad(): assert torch.equal(again(x), model(x))
    save_segmenter(tmp_path / "m.safetensors", model, [str(i) for i in range(20)])
    with torch.no_grad(): assert torch.equal(load_segmenter(tmp_path / "m.safetensors")(x), model(x))


def tiny(n=3, arch="tf_efficientnet_lite0", **kw): return make_segmenter(arch, n_classes=n, pretrained=False, head_channels=16, **kw)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "mobilenetv2_100", "resnet18"])
def test_any_encoder_stride_and_size(arch, stride):
    model = tiny(arch=arch, output_stride=stride).eval()
    with torch.no_grad():
        for size in (64, 64), (33, 97), (1, 1), (7, 200): assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "resnet50"])
def test_every_weight_learns(arch):
    model = make_segmenter(arch, n_classes=3, pretrained=False, head_channels=16).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    groups = param_groups(model, 1., .1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert {m.momentum for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {.01}
    assert {m.momentum for m in model.classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {.1}


def test_one_graph():
    model, x = tiny().eval(), torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), atol=1e-5)
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5)


def test_onnx(tmp_path):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    model, x = tiny().eval(), torch.randn(1, 3, 64, 96)
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=False, opset_version=17, input_names=["x"])
    y = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    with torch.no_grad(): np.testing.assert_allclose(y, model(x).numpy(), atol=1e-3)


@pytest.mark.parametrize("kw, words", [
    (dict(arch="nosuchnet"), "nosuchnet"), (dict(arch="vit_small_patch16_224"), "vit_small"),
    (dict(output_stride=5), "output stride"), (dict(arch="resnet50", output_stride=16), "output stride 8"),
    (dict(arch="resnet50", pretrained=True), "pretrained=PATH"), (dict(arch="resnet101", pretrained=True), "pretrained=PATH"),
    (dict(arch="mobilenetv2_100", pretrained=True), "network is forbidden"), (dict(pretrained="nowhere.pth"), "nowhere.pth")])
def test_wrong_wishes(kw, words, monkeypatch, tmp_path):
    monkeypatch.setenv("NAMEDMASK_HOME", str(tmp_path)); monkeypatch.setenv("NAMEDMASK_OFFLINE", "1")
    with pytest.raises(UserError, match=words): make_segmenter(**{"arch": "tf_efficientnet_lite0", "pretrained": False} | kw)


def test_weights_of_a_file(tmp_path):
    encoder = tiny().backbone.state_dict()
    torch.save({"model": encoder | {"fc.weight": torch.zeros(2)}}, tmp_path / "a.pth")
    save_file(encoder, tmp_path / "a.safetensors")
    for name in "a.pth", "a.safetensors":
        model = make_segmenter(n_classes=2, pretrained=tmp_path / name)
        assert torch.equal(model.backbone.conv_stem.weight, encoder["conv_stem.weight"])
    torch.save({k: v for k, v in encoder.items() if k != "conv_stem.weight"}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="1 missing: conv_stem.weight"): make_segmenter(pretrained=tmp_path / "b.pth")


class Evil:
    def __reduce__(self): return os.mkdir, (os.environ["EVIL"],)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "was_here"))
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth"): read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "was_here").exists()


def test_save_and_load(tmp_path):
    model, names = tiny(output_stride=32).to(memory_format=torch.channels_last).eval(), ["tv/monitor", "Käse"]
    model.mean = (.1, .2, .3)
    save_segmenter(tmp_path / "new" / "s.safetensors", model, names, meta={"steps": 3})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.safetensors"]
    again = load_segmenter(tmp_path / "new" / "s.safetensors", "cpu")
    assert (again.names, again.meta, again.mean) == (names, {"steps": 3}, (.1, .2, .3))
    assert (again.arch, again.output_stride) == ("tf_efficientnet_lite0", 32)
    assert not again.training and again.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(1, 3, 40, 50)
    with torch.no_grad(): assert torch.allclose(again(x), model(x), atol=1e-5)
    with pytest.raises(ValueError): save_segmenter(tmp_path / "t.safetensors", model, ["one"])


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "s.safetensors"
    save_segmenter(path, model, ["a", "b"])
    before = path.read_bytes()
    def full(state, tmp, metadata): Path(tmp).write_bytes(b"half"); raise OSError(28, "No space left on device")
    monkeypatch.setattr("namedmask.deeplab.save_file", full)
    with pytest.raises(UserError, match="no space left"): save_segmenter(path, model, ["a", "b"])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_files_that_do_not_fit(tmp_path):
    path, model = tmp_path / "s.safetensors", tiny()
    save_segmenter(path, model, ["a", "b"])
    whole = path.read_bytes()
    for bad in b"", b"junk", whole[:100], whole[:-5]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match="s.safetensors is no segmenter"): load_segmenter(path)
    with pytest.raises(UserError, match="There is no segmenter"): load_segmenter(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is no segmenter"): load_segmenter(tmp_path)
    save_file(model.state_dict(), path)
    with pytest.raises(UserError, match="not written as a segmenter"): load_segmenter(path)
    state = model.state_dict()
    del state["classifier.project.0.weight"]
    state |= {"strange": torch.zeros(1), "classifier.classifier.3.bias": torch.zeros(9)}
    with pytest.raises(UserError) as error: load_state(model, state, "s.pth")
    for words in ("s.pth", "1 missing: classifier.project.0.weight", "1 unknown: strange", "classifier.classifier.3.bias (9,), not (3,)"):
        assert words in str(error.value)


def test_normalise():
    xb = torch.randint(256, (2, 3, 5, 6), dtype=torch.uint8)
    mean, std = pixel_stats("resnet50")
    ref = (xb / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(normalise(xb, mean, std), ref, atol=1e-5) and normalise(xb, mean, std).dtype == torch.float32


@pytest.mark.parametrize("change", [dict(mean=None), dict(names=3), dict(names=[1, 2]), dict(arch=7), dict(meta="x"), dict(rates=None), dict(names=None)])
def test_a_header_that_lacks_something(tmp_path, change):
    "A file of ours whose header was tampered with: one message that names the file and the key."
    from safetensors import safe_open
    from safetensors.torch import save_file
    from namedmask.deeplab import load_segmenter, save_segmenter
    save_segmenter(tmp_path / "a.safetensors", make_segmenter("resnet50", 3, pretrained=False), ["cat", "dog"])
    with safe_open(tmp_path / "a.safetensors", "pt") as f: info, state = dict(f.metadata()), {k: f.get_tensor(k) for k in f.keys()}
    for k, v in change.items():
        if v is None: del info[k]
        else: info[k] = json.dumps(v)
    save_file(state, tmp_path / "b.safetensors", info)
    with pytest.raises(UserError, match=f"b.safetensors is damaged: its header lacks {next(iter(change))}"): load_segmenter(tmp_path / "b.safetensors")


@pytest.mark.parametrize("key, use", [("query_embed", "--selfmask"), ("conv1.weight", "the setting backbone")])
def test_other_networks_are_told(tmp_path, key, use):
    from namedmask.deeplab import load_published
    torch.save({key: torch.zeros(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=use): load_published(tmp_path / "x.pt")
