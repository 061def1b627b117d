"SelfMask: the published function on the reference weights, files that do not fit, any size, and batches against one by one."
import json, sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

from namedmask.core import UserError
from namedmask.selfmask import SelfMask, SelfMaskDetector, best_masks, input_size, load_selfmask, padded_size, to_batch


@pytest.fixture(scope="module")
def state(shared):
    sys.path.insert(0, str(shared / "golden"))
    try: import fill
    finally: sys.path.pop(0)
    return fill.state_dict("selfmask")


@pytest.fixture(scope="module", params=["plain", "model"])
def golden_net(request, state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "selfmask.pt"
    torch.save(state if request.param == "plain" else dict(model=state, epoch=12), path)
    return load_selfmask(path)


@pytest.fixture(scope="module")
def filled(state):
    net = SelfMask().eval()
    net.load_state_dict(state)
    return net


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(4)
    net = SelfMask().eval()
    with torch.no_grad(): net.query_embed.mul_(5)
    return net


def close(a, b, tol=2e-4): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=1e-6)


def test_names_and_shapes(shared, net):
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == json.loads((shared / "golden/shapes/selfmask.json").read_text())


def test_golden(shared, golden_net):
    want = np.load(shared / "golden/selfmask.npz")
    with torch.inference_mode(): objectness, masks = golden_net(torch.as_tensor(want["inputs"]))
    close(objectness, want["objectness"][:, 0, :, 0])
    close(masks, want["mask_pred"][:, 0])
    h, w = want["masks"].shape[1:]
    assert (best_masks(objectness, masks)[:, :h, :w].numpy() == want["masks"]).all()


def plainly(state, x):
    "The same network, written out as products of matrices, one picture at a time, in double precision: objectness, masks, mask."
    s = {k: v.double() for k, v in state.items()}
    h, w = x.shape[1:]
    x = F.pad(x.double(), (0, -w % 8, 0, -h % 8))[None]
    linear = lambda x, name: x @ s[name + "weight"].T + s[name + "bias"]
    norm = lambda x, name, eps: F.layer_norm(x, x.shape[-1:], s[name + "weight"], s[name + "bias"], eps)
    def attend(q, k, v):
        q, k, v = (t.reshape(-1, 6, 64).transpose(0, 1) for t in (q, k, v))
        return ((q @ k.mT / 8).softmax(-1) @ v).transpose(0, 1).reshape(-1, 384)
    tokens = F.conv2d(x, s["encoder.patch_embed.proj.weight"], s["encoder.patch_embed.proj.bias"], stride=8)
    size = tokens.shape[-2:]
    grid = s["encoder.pos_embed"][0, 1:].reshape(28, 28, 384).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    t = torch.cat([s["encoder.cls_token"][0] + s["encoder.pos_embed"][0, :1], (tokens + grid)[0].flatten(1).T])
    for i in range(12):
        b = f"encoder.blocks.{i}."
        t = t + linear(attend(*linear(norm(t, b + "norm1.", 1e-6), b + "attn.qkv.").chunk(3, -1)), b + "attn.proj.")
        t = t + linear(F.gelu(linear(norm(t, b + "norm2.", 1e-6), b + "mlp.fc1.")), b + "mlp.fc2.")
    memory = norm(t, "encoder.norm.", 1e-6)[1:]
    pos, q = s["query_embed"], torch.zeros_like(s["query_embed"])
    for i in range(6):
        d = f"decoder.layers.{i}."
        for kind, normed, keys, values in (("self_attn", "norm1.", q + pos, q), ("multihead_attn", "norm2.", memory, memory)):
            weights, biases = s[d + kind + ".in_proj_weight"].chunk(3), s[d + kind + ".in_proj_bias"].chunk(3)
            parts = [y @ a.T + b for y, a, b in zip((q + pos, keys, values), weights, biases)]
            q = norm(q + linear(attend(*parts), d + kind + ".out_proj."), d + normed, 1e-5)
        q = norm(q + linear(linear(q, d + "linear1.").relu(), d + "linear2."), d + "norm3.", 1e-5)
    q = norm(q, "decoder.norm.", 1e-5)
    objectness = linear(linear(linear(q, "ffn.layers.0.").relu(), "ffn.layers.1.").relu(), "ffn.layers.2.").sigmoid()[:, 0]
    features = F.interpolate(memory.T.reshape(1, 384, *size), scale_factor=2, mode="bilinear", align_corners=False)[0]
    masks = torch.einsum("qc,chw->qhw", q, features).sigmoid()
    best = F.interpolate(masks[None, objectness.argmax()][None], scale_factor=4, mode="bilinear", align_corners=False)[0, 0, :h, :w]
    return objectness, masks, best


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (33, 200), (201, 57), (224, 224), (96, 250)])
def test_any_size_against_a_plain_version(filled, state, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)))
    with torch.inference_mode():
        objectness, masks = filled(x)
        cut = best_masks(objectness, masks)[:, :size[0], :size[1]]
    for i in range(2):
        want = plainly(state, x[i])
        close(objectness[i], want[0])
        close(masks[i], want[1])
        sure = (want[2] - 0.5).abs() > 1e-4
        assert (cut[i] == (want[2] > 0.5))[sure].all() and sure.float().mean() > 0.99


def test_a_batch_and_one_by_one(filled):
    x = torch.randn(5, 3, 75, 110, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together, alone = filled(x), [filled(x[i:i + 1]) for i in range(5)]
    for k in range(2): close(together[k], torch.cat([a[k] for a in alone]), 1e-4)




def test_entries_that_do_not_fit_are_named(net, tmp_path):
    def check(*words, **changes):
        state = net.state_dict() | {k.replace("__", "."): v for k, v in changes.items()}
        torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "w.pt")
        with pytest.raises(UserError) as error: load_selfmask(tmp_path / "w.pt")
        for word in ("w.pt", *words): assert word in str(error.value), error.value
    check("missing", "query_embed", query_embed=None)
    check("unknown", "head.weight", head__weight=torch.zeros(3))
    check("another shape", "encoder.pos_embed", "197", encoder__pos_embed=torch.zeros(1, 197, 384))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x04cos\nsystem\n(S'true'\ntR."])
def test_files_that_are_no_weights(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match="w.pt"): load_selfmask(tmp_path / "w.pt")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="gone.pt"): load_selfmask(tmp_path / "gone.pt")


class Trap:
    def __reduce__(self): return (sys.exit, ("code of the file was run",))


def test_no_code_of_a_file_is_run(net, tmp_path):
    torch.save(dict(net.state_dict(), trap=Trap()), tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt"): load_selfmask(tmp_path / "w.pt")


def test_half_precision_weights_and_safetensors(net, tmp_path):
    from safetensors.torch import save_file
    torch.save({k: v.half() for k, v in net.state_dict().items()}, tmp_path / "w.pt")
    assert load_selfmask(tmp_path / "w.pt").query_embed.dtype == torch.float32
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load_selfmask(tmp_path / "w.safetensors").query_embed, net.query_embed)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (333, 500), (512, 512), (1, 1), (17, 3), (1024, 513), (9000, 300), (2, 700)])
def test_sizes_are_torchvisions(size):
    assert input_size(size) == TF.resize(Image.new("L", size), 512, max_size=4096).size
    assert all(a % 8 == 0 and 0 <= a - b < 8 for a, b in zip(padded_size(size), size))


def test_input_is_torchvisions():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8))
    detector = SelfMaskDetector(SelfMask(), "cpu", shorter=201)
    want = TF.normalize(TF.to_tensor(TF.resize(photo, 201)), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = to_batch([detector.prepare(photo)])
    assert x.shape == (1, 3, 208, 280)
    torch.testing.assert_close(x[0, :, :201, :275], want, rtol=0, atol=1e-6)
    assert not x[..., 201:, :].any() and not x[..., 275:].any()


def noise(w, h, seed):
    small = np.random.default_rng(seed).integers(0, 256, (h // 9 + 1, w // 9 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h))


def test_detector_batches_like_shapes(net):
    calls, forward = [], net.forward
    photos = [noise(w, h, i) for i, (w, h) in enumerate([(120, 90), (90, 120), (121, 90), (120, 90), (300, 30), (120, 90), (50, 50)])]
    detector = SelfMaskDetector(net, "cpu", shorter=72, bs=3)
    one = [detector([p])[0] for p in photos]
    net.forward = lambda x: (calls.append(len(x)), forward(x))[1]
    try: together = detector(photos)
    finally: del net.forward
    assert calls == [3, 1, 1, 1, 1]                                                 # 120×90, the first three; the fourth; and the others
    for p, a, b in zip(photos, one, together):
        assert a.shape == b.shape == detector.prepare(p).size[::-1] and a.dtype == np.float32 and set(np.unique(a)) <= {0, 1}
        assert (a == b).all()
    assert detector([]) == []


def test_detector_shape_is_what_prepare_gives(net):
    detector = SelfMaskDetector(net, "cpu", shorter=64)
    for size in ((99, 70), (70, 99), (64, 64), (500, 20)):
        assert detector.shape(size) == padded_size(detector.prepare(noise(*size, 0)).size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_half_precision_on_a_gpu(net):
    photos = [noise(200, 150, i) for i in range(4)]
    cpu = SelfMaskDetector(net, "cpu", shorter=120)(photos)
    gpu = SelfMaskDetector(net, "cuda", shorter=120)(photos)
    net.cpu()
    for a, b in zip(cpu, gpu): assert (a == b).mean() > 0.99
