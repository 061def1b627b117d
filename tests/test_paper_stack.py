"The paper's stack from end to end, in miniature: a row's configuration, files in the published formats, and weights filled from a seed."
import json, shutil

import numpy as np, pytest, torch
from PIL import Image
from typer.testing import CliRunner

from namedmask.benchmarks import load_benchmark
from namedmask.cli import app
from namedmask.core import UserError, mask_file, read_mask, read_photo, write_archive, write_mask
from namedmask.deeplab import load_published, load_segmenter, make_segmenter
from namedmask.demo import load_world
from namedmask.experts import expert_masks
from namedmask.pipeline import Run, import_masks
from namedmask.saliency import mask_files, published_file
from namedmask.selfmask import SelfMask

NAMES = dict(bird="chicken", sheep="sheep", car="car")              # VOC's names, and what stands for them in the demo world
FOREIGN = "/home/someone/datasets/ImageNet2012/train"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A data root: ImageNet2012/train with three classes of three photographs, VOC2012, and weights filled from a seed."
    root, world = tmp_path_factory.mktemp("data"), load_world()
    archive = {}
    for k, (name, kind) in enumerate(NAMES.items()):
        wnid = f"n0000000{k}"
        (root / "ImageNet2012/train" / wnid).mkdir(parents=True)
        archive[name] = []
        for i, p in enumerate([p for p in world.photos if world.kind(p) == kind][:3]):
            Image.open(world.index / p).resize((160, 120)).save(root / "ImageNet2012/train" / wnid / f"{wnid}_{i}.JPEG", "JPEG")
            archive[name].append(f"{FOREIGN}/{wnid}/{wnid}_{i}.JPEG")
            write_mask(root / "masks" / wnid / f"{wnid}_{i}.json", np.asarray(Image.fromarray(world.truth(p) > 0).resize((160, 120))))
    (root / "archive.json").write_text(json.dumps(archive))
    voc = root / "VOCdevkit/VOC2012"
    for d in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"): (voc / d).mkdir(parents=True)
    ids = {world.names.index(kind) + 1: ["bird", "sheep", "car"].index(n) for n, kind in NAMES.items()}
    stems = []
    for i, (photo, labels) in enumerate(world.test):
        truth = np.array(Image.open(labels))
        if not set(np.unique(truth)) & set(ids): continue
        out = np.zeros_like(truth)
        for theirs, which in ids.items(): out[truth == theirs] = [3, 17, 7][which]
        Image.open(photo).convert("RGB").save(voc / f"JPEGImages/{i:06d}.jpg")
        im = Image.fromarray(out, "P"); im.putpalette(list(range(256)) * 3); im.save(voc / f"SegmentationClass/{i:06d}.png")
        stems.append(f"{i:06d}")
        if len(stems) == 4: break
    for split in ("train", "val", "trainval"): (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(stems) + "\n")
    torch.manual_seed(0)
    torch.save(SelfMask().state_dict(), root / "selfmask.pt")
    torch.save(make_segmenter("resnet50", 2, False).backbone.state_dict(), root / "dino.pth")
    return root


def quick(data, *more):
    "The command of a row with everything small."
    settings = dict(archive=data / "archive.json", backbone=data / "dino.pth", saliency_masks=data / "masks", crop=64, bs=2, steps=2, expert_bs=2,
                    expert_steps=2, eval_every=2, eval_limit=2)
    return ["--config", "voc2012", "--root", str(data), "--names", ", ".join(NAMES), "--device", "cpu",
            *(x for k, v in settings.items() for x in ("--set", f"{k}={v}")), *more]


def call(*args):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "voc"
    call("run", *quick(data), "--out", out)
    return out


def test_the_archive_is_rerooted_and_keeps_its_order(data, done):
    archive = json.loads((done / "archive.json").read_text())
    assert list(archive) == list(NAMES)
    assert archive["bird"] == [str(data / f"ImageNet2012/train/n00000000/n00000000_{i}.JPEG") for i in range(3)]


def test_the_published_masks_are_taken_as_they_are(data, done):
    for k in range(3):
        p = f"n0000000{k}/n0000000{k}_1.JPEG"
        assert (read_mask(done / "masks/saliency" / f"{p}.json") == read_mask(published_file(data / "masks", p))).all()


def test_each_name_has_its_expert_and_its_masks(done):
    assert {p.stem for p in (done / "experts").glob("*.safetensors")} == set(NAMES)
    assert load_segmenter(done / "experts/sheep.safetensors").arch == "resnet50"
    assert len(list((done / "masks/experts/car").rglob("*.json"))) == 3


def test_the_segmenter_is_the_papers_and_is_marked_on_the_benchmark(done):
    model = load_segmenter(done / "segmenter.safetensors")
    assert (model.arch, model.names, model.output_stride, model.rates) == ("resnet50", list(NAMES), 8, (12, 24, 36))
    notes = json.loads((done / "state.json").read_text())
    assert notes["stages"]["evaluate"]["done"] and set(notes["scores"]["voc2012"]["iou"]) == {"background", *NAMES}
    marks = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert any("miou" in m for m in marks)


def test_the_same_command_goes_on_and_another_is_refused(data, done):
    before = (done / "segmenter.safetensors").stat().st_mtime_ns
    call("run", *quick(data), "--out", done)
    assert (done / "segmenter.safetensors").stat().st_mtime_ns == before
    result = CliRunner().invoke(app, ["run", *quick(data, "--set", "lr=1e-3"), "--out", str(done)])
    assert result.exit_code == 1 and "lr: 0.0005, now 0.001" in " ".join(result.output.split())


def test_experts_are_judged_where_labels_are(data, done, tmp_path):
    text = call("experts", "--run", done, "--judge", "voc2012", "--root", data, "--limit", 2, "--json", tmp_path / "j.json", "--device", "cpu")
    judged = json.loads((tmp_path / "j.json").read_text())
    assert set(judged) == set(NAMES) and all(v is None or 0 <= v <= 1 for v in judged.values()) and "bird" in text


def test_missing_masks_and_photographs_are_counted(data, tmp_path):
    shutil.copytree(data / "masks", tmp_path / "masks")
    (tmp_path / "masks/n00000001/n00000001_2.json").unlink()
    result = CliRunner().invoke(app, ["run", *quick(data, "--set", f"saliency_masks={tmp_path/'masks'}"), "--out", str(tmp_path / "r")])
    assert result.exit_code == 1 and "1 of 9 photographs" in " ".join(result.output.split()) and "n00000001_2.JPEG" in "".join(result.output.split())
    archive = json.loads((data / "archive.json").read_text())
    archive["sheep"].append(f"{FOREIGN}/n00000001/n00000001_99.JPEG")
    (tmp_path / "archive.json").write_text(json.dumps(archive))
    result = CliRunner().invoke(app, ["run", *quick(data, "--set", f"archive={tmp_path/'archive.json'}"), "--out", str(tmp_path / "r2")])
    assert result.exit_code == 1 and "n00000001_99.JPEG" in "".join(result.output.split())


def test_a_photograph_of_two_names_is_an_item_of_each(data, tmp_path, monkeypatch):
    from namedmask import distill
    seen, real = [], distill.distill
    monkeypatch.setattr(distill, "distill", lambda items, *args, **kw: seen.extend(items) or real(items, *args, **kw))
    archive = json.loads((data / "archive.json").read_text())
    archive["car"][0] = archive["sheep"][0]
    (tmp_path / "archive.json").write_text(json.dumps(archive))
    out = tmp_path / "r"
    call("run", *quick(data, "--set", f"archive={tmp_path/'archive.json'}", "--no-experts"), "--out", out)
    shared = archive["sheep"][0].rpartition("/")[2]
    assert sorted(it.label for it in seen if it.photo.name == shared) == [2, 3] and len(seen) == 9


def test_published_experts_are_used_and_not_trained(data, tmp_path):
    torch.manual_seed(7)
    models = {n: make_segmenter("resnet50", 2, False) for n in ("bird", "sheep")}
    (tmp_path / "experts").mkdir()
    for n, m in models.items(): torch.save(dict(model=m.state_dict()), tmp_path / f"experts/expert_{n}.pt")
    out = tmp_path / "r"
    call("run", *quick(data, "--set", f"expert_weights={tmp_path/'experts'}"), "--out", out)
    for n, m in models.items():
        kept = load_segmenter(out / f"experts/{n}.safetensors")
        assert all(torch.equal(v, m.state_dict()[k]) for k, v in kept.state_dict().items())
    assert (out / "experts/car.safetensors").exists()


def test_saliency_without_a_run(data, tmp_path):
    photos = tmp_path / "photos/n00000000"
    photos.mkdir(parents=True)
    shutil.copy(data / "ImageNet2012/train/n00000000/n00000000_0.JPEG", photos)
    call("saliency", "--images", tmp_path / "photos", "--out", tmp_path / "out", "--selfmask", data / "selfmask.pt", "--published-names", "--device", "cpu")
    rle = json.loads((tmp_path / "out/n00000000/n00000000_0.json").read_text())
    assert rle["size"] == [120, 160] and isinstance(rle["counts"], str)
    assert CliRunner().invoke(app, ["saliency", "--images", str(photos)]).exit_code == 2


def test_published_weights_are_marked_beside_the_papers_figures(data, tmp_path):
    torch.manual_seed(1)
    torch.save(make_segmenter("resnet50", 21, False).state_dict(), tmp_path / "w.pt")
    text = call("evaluate", "--weights", tmp_path / "w.pt", "--benchmark", "voc2012", "--root", data, "--limit", 2, "--json", tmp_path / "s.json", "--device", "cpu")
    assert "59.3" in text and "89.2" in text and 0 <= json.loads((tmp_path / "s.json").read_text())["miou"] <= 1
    torch.save(make_segmenter("resnet50", 5, False).state_dict(), tmp_path / "w5.pt")
    result = CliRunner().invoke(app, ["evaluate", "--weights", str(tmp_path / "w5.pt"), "--benchmark", "voc2012", "--root", str(data)])
    assert result.exit_code == 1 and "Error" in result.output
    assert CliRunner().invoke(app, ["evaluate", "--benchmark", "voc2012"]).exit_code == 2


def test_converting_published_weights(data, tmp_path):
    torch.manual_seed(2)
    state = make_segmenter("resnet50", 21, False).state_dict()
    torch.save(state, tmp_path / "namedmask_voc2012.pt")
    call("convert", tmp_path / "namedmask_voc2012.pt", tmp_path / "voc.safetensors", "--benchmark", "voc2012", "--root", data)
    model = load_segmenter(tmp_path / "voc.safetensors")
    assert model.names == load_benchmark("voc2012", data).names and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_list_of_published_files_and_the_ban_on_the_network(monkeypatch, tmp_path):
    monkeypatch.setenv("NAMEDMASK_HOME", str(tmp_path))
    assert "namedmask_voc2012" in call("download")
    result = CliRunner().invoke(app, ["download", "selfmask", "--offline"])
    assert result.exit_code == 1 and "network is forbidden" in " ".join(result.output.split())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_published_masks_are_turned_with_their_photographs(tmp_path, orientation):
    "They are of the pictures as stored; folders around them do not matter."
    pixels, exif = np.zeros((60, 40, 3), np.uint8), Image.Exif()
    pixels[5:20, 3:15] = 255
    exif[0x0112] = orientation
    (tmp_path / "photos/n01").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "photos/n01/x.JPEG", "jpeg", quality=95, exif=exif)
    write_mask(tmp_path / "masks/imagenet/train_pseudo_masks/n01/x.json", pixels[..., 0] > 0)
    import_masks(tmp_path / "masks", tmp_path / "photos", ["n01/x.JPEG"], tmp_path / "out")
    mask, photo = read_mask(mask_file(tmp_path / "out", "n01/x.JPEG")), np.asarray(read_photo(tmp_path / "photos/n01/x.JPEG"))
    assert mask.shape == photo.shape[:2] and (mask == (photo[..., 0] > 128)).all()


def test_an_expert_that_rejects_a_photograph(tmp_path):
    "In the paper its empty answer stands; with the offline stack's help the saliency mask is kept."
    class No(torch.nn.Module):
        mean, std = (0, 0, 0), (1, 1, 1)
        def forward(self, x): return torch.stack([x[:, 0] * 0 + 9, x[:, 0] * 0], 1)
    Image.new("RGB", (50, 40)).save(tmp_path / "a.jpg")
    write_mask(mask_file(tmp_path / "saliency", "a.jpg"), np.eye(40, 50, dtype=bool))
    for name, how in ("paper", dict(side=None, smooth=None)), ("offline", {}): expert_masks(No().eval(), ["a.jpg"], tmp_path, tmp_path / "saliency", tmp_path / name, **how)
    assert not read_mask(mask_file(tmp_path / "paper", "a.jpg")).any()
    assert (read_mask(mask_file(tmp_path / "offline", "a.jpg")) == np.eye(40, 50)).all()


def test_the_class_count_and_the_size_are_told_by_what_is_there(tmp_path):
    "One entry too many does not make a ResNet-50 a 101; one too few is the only fault told."
    state = make_segmenter("resnet50", 4, pretrained=False).state_dict()
    torch.save(state | {"backbone.layer3.6.conv1.weight": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save({k: v for k, v in state.items() if k != "classifier.classifier.3.weight"}, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r": 1 unknown: backbone.layer3.6.conv1.weight\.$"): load_published(tmp_path / "more.pt")
    with pytest.raises(UserError, match=r": 1 missing: classifier.classifier.3.weight\.$"): load_published(tmp_path / "less.pt")
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    torch.save(backbone | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "dino.pth")
    make_segmenter("resnet50", 2, tmp_path / "dino.pth")
    torch.save(backbone | {"layer5.0.conv.weight": torch.zeros(2, 2)}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="layer5"): make_segmenter("resnet50", 2, tmp_path / "dino.pth")
