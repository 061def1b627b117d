"The segmenter: parity with the published network, any size, bad files."
import importlib.util, json, os
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import save_file

from namedmask.core import UserError
from namedmask.deeplab import (load_segmenter, load_state, make_segmenter, normalise, param_groups, pixel_stats,
                               read_weights, save_segmenter)

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
    (dict(arch="resnet50", pretrained=True), "pretrained=PATH"), (dict(pretrained="nowhere.pth"), "nowhere.pth")])
def test_wrong_wishes(kw, words):
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
