"CLIP through open_clip, on tiny networks with random weights that go the way of the real ones: from a file, by a tag, out of TorchScript."
import json, logging, os, pickle, sys, warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from namedmask.core import UserError
from namedmask.encoders import ENCODERS, SCENE_PROMPTS, ClipEncoder, clip_file, clip_prompts, load_clip, make_encoder, mean_direction, wants_quick_gelu
from namedmask.weights import PUBLISHED

open_clip = pytest.importorskip("open_clip", reason="the extra `paper` is not installed")

TINY = dict(embed_dim=32, vision_cfg=dict(image_size=64, layers=2, width=64, head_width=32, patch_size=16),
            text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Two architectures, with and without QuickGELU, and one set of weights with large enough activations to tell them apart."
    folder = tmp_path_factory.mktemp("clip")
    for name, quick in ("test-clip", {}), ("test-clip-quickgelu", dict(quick_gelu=True)):
        (folder / f"{name}.json").write_text(json.dumps(TINY | quick))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(1)
    net = open_clip.CLIP(**TINY)
    for k, p in net.named_parameters():
        if "mlp.c_fc" in k: p.data *= 8
        if "mlp.c_proj" in k: p.data *= 20
    torch.save(net.state_dict(), folder / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, folder / "wrapped.pt")
    return folder


@pytest.fixture
def tagged(tiny, monkeypatch):
    "The tags that open_clip would know of the tiny network."
    tags = dict(openai=dict(file=str(tiny / "plain.pt"), quick_gelu=True), other=dict(file=str(tiny / "plain.pt"), mean=(.1, .2, .3), std=(.4, .5, .6), interpolation="bilinear", resize_mode="squash"))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "test-clip", tags)
    return tiny


def activations(net): return {type(m).__name__ for m in net.modules() if "GELU" in type(m).__name__}


def photo(w=150, h=90, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (9, 15, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)


def plain_text(net, sentences):
    "The text tower and the averaging once more, in plain steps and one sentence at a time."
    tokenize, total = open_clip.get_tokenizer("test-clip"), np.zeros(32)
    with torch.no_grad():
        for s in sentences:
            tokens = tokenize([s])
            x = net.ln_final(net.transformer(net.token_embedding(tokens) + net.positional_embedding, attn_mask=net.attn_mask))
            v = (x[0, tokens[0].argmax()] @ net.text_projection).double().numpy()
            total += v / np.sqrt((v ** 2).sum())
    return total / len(sentences) / np.sqrt(((total / len(sentences)) ** 2).sum())


def test_the_85_prompts():
    templates = [t("x y") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    prompts = clip_prompts("x y")
    assert len(templates) == 80 and prompts[:80] == templates
    assert prompts[80:] == ["there is a x y in the scene.", "there is the x y in the scene.", "this is a x y in the scene.", "this is the x y in the scene.", "this is one x y in the scene."]
    assert len(SCENE_PROMPTS) == 5 and "{brace} %s" in clip_prompts("{brace} %s")[84]


def test_the_mean_is_of_unit_vectors():
    x = torch.randn(7, 5) * torch.arange(1, 8)[:, None]
    wanted = sum(v / v.norm() for v in x) / 7
    assert torch.allclose(mean_direction(x), wanted / wanted.norm(), atol=1e-6)


@pytest.mark.parametrize("words", [["teapot"], ["television", "computer monitor"]])
def test_names_against_a_plain_computation(tiny, words):
    encoder = ClipEncoder(model="test-clip", pretrained=tiny / "plain.pt")
    ours = encoder.encode_names([words, ["cat"]])
    assert ours.dtype == np.float32 and ours.shape == (2, 32)
    assert np.allclose(ours[0], plain_text(encoder.net, [s for w in words for s in clip_prompts(w)]), atol=1e-5)


@pytest.mark.parametrize("size", [(150, 90), (90, 150), (64, 64), (20, 30), (1, 400), (64, 65)])
def test_the_preprocessing_is_open_clips_own(tiny, size):
    encoder = ClipEncoder(model="test-clip", pretrained=tiny / "plain.pt")
    _, _, theirs = open_clip.create_model_and_transforms("test-clip", pretrained=str(tiny / "plain.pt"))
    im = photo(*size)
    assert (encoder.prepare(im) == theirs(im).numpy()).all() and encoder.prepare(im).shape == (3, 64, 64)


def test_photographs_are_those_of_open_clip(tiny):
    encoder = ClipEncoder(model="test-clip", pretrained=tiny / "plain.pt")
    net, _, transform = open_clip.create_model_and_transforms("test-clip", pretrained=str(tiny / "plain.pt"))
    photos = [photo(seed=s) for s in range(3)]
    with torch.no_grad(): wanted = net.eval().encode_image(torch.stack([transform(p) for p in photos]), normalize=True)
    ours = encoder.encode_photos(photos)
    assert ours.dtype == np.float16 and encoder.dim == 32 and np.allclose(ours, wanted, atol=1e-3)
    names = encoder.encode_names([["cat"], ["dog"]])
    assert np.allclose(encoder.similarity(ours, names), names @ ours.astype(np.float32).T, atol=1e-6)


def test_similarity_of_more_rows_than_a_block(tiny):
    rng = np.random.default_rng(0)
    photos, names = rng.standard_normal((5000, 32)).astype(np.float16), rng.standard_normal((3, 32)).astype(np.float32)
    assert np.allclose(ClipEncoder.similarity(None, photos, names), names @ photos.astype(np.float32).T, atol=1e-4)


def test_a_tag_decides_on_the_gelu_and_the_preprocessing(tagged):
    quick, true = ClipEncoder(model="test-clip", pretrained="openai"), ClipEncoder(model="test-clip", pretrained="other")
    assert activations(quick.net) == {"QuickGELU"} and activations(true.net) == {"GELU"}
    assert quick.name != true.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, theirs = open_clip.create_model_and_transforms("test-clip", pretrained="other")
        reference, _, _ = open_clip.create_model_and_transforms("test-clip-quickgelu", pretrained=str(tagged / "plain.pt"))
    assert (true.prepare(photo()) == theirs(photo()).numpy()).all() and np.allclose(true.net.visual.preprocess_cfg["mean"], (.1, .2, .3))
    x = torch.from_numpy(np.stack([quick.prepare(photo())]))
    with torch.no_grad(): wanted = reference.eval().encode_image(x, normalize=True)
    right, wrong = (np.abs(e.encode(x.numpy()) - wanted.numpy()).max() for e in (quick, true))
    assert right < 1e-3 and wrong > 5 * right, "the wrong one of the two, or the test's weights do not tell them apart"


def test_who_wants_quick_gelu(tagged, caplog):
    for model, tag, quick in [("ViT-L-14-336", "openai", True), ("ViT-L-14-336-quickgelu", "openai", True), ("ViT-B-32", "openai", True), ("RN50", "openai", True),
                              ("ViT-B-32", "laion2b_s34b_b79k", False), ("ViT-B-32", "laion2b-s34b-b79k", False), ("ViT-B-16-SigLIP", "webli", False),
                              ("ViT-L-14-336", tagged / "plain.pt", True), ("test-clip-quickgelu", tagged / "plain.pt", True)]:
        assert wants_quick_gelu(model, tag) is quick, (model, tag)
    assert not caplog.records
    assert not wants_quick_gelu("test-clip", tagged / "plain.pt") and "quick_gelu=True" in caplog.text
    assert activations(ClipEncoder(model="test-clip", pretrained=tagged / "plain.pt", quick_gelu=True).net) == {"QuickGELU"}


def test_the_default_is_the_paper():
    "336 px, 24 layers, QuickGELU, OpenAI's file; without its gigabyte of weights."
    assert ENCODERS["paper"] is ClipEncoder
    config = open_clip.get_model_config("ViT-L-14-336")
    assert (config["embed_dim"], config["vision_cfg"]["image_size"], config["vision_cfg"]["layers"]) == (768, 336, 24)
    assert open_clip.get_pretrained_cfg("ViT-L-14-336", "openai")["url"] == PUBLISHED["clip_vitl14_336"].url


def test_the_published_file_is_taken_from_our_cache(tiny, monkeypatch):
    import namedmask.encoders as encoders
    monkeypatch.setattr(encoders, "fetch", lambda name: tiny / f"{name}.pt")
    assert clip_file("ViT-L-14-336", "openai") == tiny / "clip_vitl14_336.pt"


@pytest.fixture
def script(tiny):
    "The tiny network as OpenAI would publish it: TorchScript, in half precision, with three numbers besides the weights."
    class Published(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.visual, self.transformer, self.token_embedding, self.ln_final = net.visual, net.transformer, net.token_embedding, net.ln_final
            self.positional_embedding, self.text_projection, self.logit_scale = net.positional_embedding, net.text_projection, net.logit_scale
            for k, v in dict(input_resolution=64, context_length=77, vocab_size=49408).items(): self.register_buffer(k, torch.tensor(v))
        def forward(self, x): return self.visual(x), self.token_embedding.weight[0], self.ln_final(self.positional_embedding), self.text_projection, self.logit_scale
    net = open_clip.CLIP(**TINY)
    net.load_state_dict(torch.load(tiny / "plain.pt", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Published(net.half()).eval(), torch.zeros(1, 3, 64, 64).half(), check_trace=False).save(str(tiny / "script.pt"))
    return tiny / "script.pt"


def test_openai_s_own_file(script, tiny):
    encoder = ClipEncoder(model="test-clip", pretrained=script)
    wanted = torch.load(tiny / "plain.pt", weights_only=True)
    state = encoder.net.state_dict()
    assert activations(encoder.net) == {"QuickGELU"} and state.keys() == wanted.keys()
    assert all(v.dtype == torch.float32 and torch.equal(v, wanted[k].half().float()) for k, v in state.items())


def test_weights_in_a_wrapper(tiny):
    a, b = (ClipEncoder(model="test-clip", pretrained=tiny / f) for f in ("plain.pt", "wrapped.pt"))
    assert all(torch.equal(x, y) for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values()))
    assert a.name != b.name and a.name.startswith("clip-test-clip-") and "/" not in a.name


def test_safetensors_and_a_folder_with_its_own_configuration(tiny, tmp_path):
    from safetensors.torch import save_file
    state = torch.load(tiny / "plain.pt", weights_only=True)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=TINY | dict(quick_gelu=True), preprocess_cfg=dict(mean=[.5] * 3, std=[.5] * 3))))
    a = ClipEncoder(model="test-clip", pretrained=tmp_path / "open_clip_model.safetensors")
    b = ClipEncoder(model=f"local-dir:{tmp_path}")
    assert all(torch.equal(x, y) for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values()))
    assert activations(b.net) == {"QuickGELU"} and b.dim == 32 and b.net.visual.preprocess_cfg["mean"] == [.5] * 3 and "/" not in b.name


class Evil:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


def test_nothing_in_a_file_is_run(tmp_path, tiny):
    torch.save({"state_dict": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "evil2.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), 2))
    for f in "evil.pt", "evil2.pt":
        with pytest.raises(UserError, match=f): ClipEncoder(model="test-clip", pretrained=tmp_path / f)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["other shape", "missing", "extra", "half a file", "text", "empty"])
def test_weights_that_do_not_fit(tiny, tmp_path, damage):
    state = torch.load(tiny / "plain.pt", weights_only=True)
    if damage == "other shape": state["text_projection"] = torch.zeros(64, 33)
    if damage == "missing": del state["text_projection"]
    if damage == "extra": state["head.weight"] = torch.zeros(2)
    file = tmp_path / "w.pt"
    torch.save(state, file)
    if damage == "half a file": file.write_bytes(file.read_bytes()[:50_000])
    if damage == "text": file.write_text("<html>404</html>")
    if damage == "empty": file.write_bytes(b"")
    with pytest.raises(UserError, match="w.pt") as told: ClipEncoder(model="test-clip", pretrained=file)
    if damage in ("other shape", "missing"): assert "text_projection" in str(told.value)
    if damage == "extra": assert "head.weight" in str(told.value)
    assert len(str(told.value)) < 700


def test_a_script_that_does_not_fit(script):
    with pytest.raises(UserError, match="script.pt"): load_clip("ViT-S-32", script)


def test_clear_words(tiny, monkeypatch, tmp_path):
    with pytest.raises(UserError, match='no model "ViT-L-14-363".*ViT-L-14-336'): ClipEncoder(model="ViT-L-14-363")
    with pytest.raises(UserError, match="There is no file nowhere/w.pt"): ClipEncoder(model="test-clip", pretrained="nowhere/w.pt")
    with pytest.raises(UserError, match="There is no file w.pt"): ClipEncoder(model="test-clip", pretrained="w.pt")
    with pytest.raises(UserError, match='no weights "opneai".*openai'): ClipEncoder(model="ViT-B-32", pretrained="opneai")
    monkeypatch.setenv("NAMEDMASK_OFFLINE", "1")
    monkeypatch.setenv("NAMEDMASK_HOME", str(tmp_path))
    with pytest.raises(UserError, match="not in the cache"): make_encoder("paper")


def test_no_network(monkeypatch):
    def dead(*args, **kw): raise OSError("Name or service not known")
    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", dead)
    with pytest.raises(UserError, match="cannot be fetched.*give the file"): ClipEncoder(model="ViT-B-32", pretrained="laion2b_s34b_b79k")
    with pytest.raises(UserError, match="hf-hub:nobody/nothing"): ClipEncoder(model="hf-hub:nobody/nothing")


def test_the_hub_is_not_asked_when_the_network_is_forbidden(monkeypatch, tmp_path):
    import huggingface_hub, socket
    monkeypatch.setenv("NAMEDMASK_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    def connect(*args, **kw): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    for model, tag in ("ViT-B-32", "laion2b_s34b_b79k"), ("RN50", "yfcc15m"):
        with pytest.raises(UserError) as told: ClipEncoder(model=model, pretrained=tag)
        assert "the network was asked" not in str(told.value)
    with pytest.raises(UserError) as told: ClipEncoder(model="hf-hub:nobody/nothing")
    assert "the network was asked" not in str(told.value)


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r'pip install "namedmask\[paper\]"'): make_encoder("paper")


def test_logging_is_left_alone(tiny, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    ClipEncoder(model="test-clip", pretrained=tiny / "plain.pt")
    assert root.handlers == [] and logging.root.manager.disable == 0
    with pytest.raises(UserError): ClipEncoder(model="test-clip", pretrained="w.pt")
    assert root.handlers == [] and logging.root.manager.disable == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_precision_on_a_gpu(tiny):
    a, b = (ClipEncoder(device=d, model="test-clip", pretrained=tiny / "plain.pt") for d in ("cpu", "cuda"))
    assert next(p for n, p in b.net.named_parameters() if "c_fc.weight" in n).dtype == torch.float16
    photos = [photo(seed=s) for s in range(4)]
    assert np.allclose(a.encode_photos(photos), b.encode_photos(photos), atol=2e-2)
    assert np.allclose(a.encode_names([["cat"]]), b.encode_names([["cat"]]), atol=2e-2)
