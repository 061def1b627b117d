"The paper's stack from end to end, in miniature: a row's configuration, files in the published formats, and weights filled from a seed."
import json, os, shutil

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


def masks_of(tmp_path, *paths, size=(40, 60)):
    for p in paths: write_mask(tmp_path / "masks" / p, np.ones(size, bool))


def photos_at(tmp_path, *paths):
    for p in paths:
        (tmp_path / "photos" / p).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "photos" / p)


def test_a_mask_of_another_folder_is_not_taken(tmp_path):
    "Two photographs of one name in two folders, and one mask: it is not given to both."
    photos_at(tmp_path, "a/1.jpg", "b/1.jpg"); masks_of(tmp_path, "a/1.json")
    with pytest.raises(UserError, match=r"lacks the masks of 1 of 2 photographs, the first: b/1.jpg"):
        import_masks(tmp_path / "masks", tmp_path / "photos", ["a/1.jpg", "b/1.jpg"], tmp_path / "out")
    photos_at(tmp_path, "1.png", "1.jpg"); masks_of(tmp_path, "1.json")
    with pytest.raises(UserError, match="lacks the masks"):                     # and neither to a.jpg and a.png
        import_masks(tmp_path / "masks", tmp_path / "photos", ["1.png", "1.jpg"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["", "masks/", "some/folders/train_pseudo_masks/"])
@pytest.mark.parametrize("below", ["", "train/"])
def test_masks_in_a_zip_file(tmp_path, monkeypatch, inside, below):
    "A local zip file does as well as a folder; folders around all, and a run on ImageNet's own folder, do not matter."
    import zipfile
    monkeypatch.setenv("NAMEDMASK_HOME", str(tmp_path / "cache"))
    photos = [f"{below}{w}/{w}_{i}.JPEG" for w in ("n01", "n02") for i in range(2)]
    photos_at(tmp_path, *photos); masks_of(tmp_path, *(f"{w}/{w}_{i}.json" for w in ("n01", "n02") for i in range(2)))
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as z:
        for f in (tmp_path / "masks").rglob("*.json"): z.write(f, f"{inside}{f.relative_to(tmp_path / 'masks')}")
    import_masks(tmp_path / "m.zip", tmp_path / "photos", photos, tmp_path / "out")
    assert all(read_mask(mask_file(tmp_path / "out", p)).all() for p in photos)
    with pytest.raises(UserError, match="neither a folder nor a zip file"): import_masks(tmp_path / "photos" / photos[0], tmp_path / "photos", photos, tmp_path / "new")


def test_masks_of_another_size(tmp_path):
    photos_at(tmp_path, "n/1.jpg", "n/2.jpg"); masks_of(tmp_path, "n/1.json"); masks_of(tmp_path, "n/2.json", size=(60, 40))
    with pytest.raises(UserError, match=r"1 of the 2 masks .* the first: n/2.jpg \(60×40, its mask 40×60\)"):
        import_masks(tmp_path / "masks", tmp_path / "photos", ["n/1.jpg", "n/2.jpg"], tmp_path / "out")


def imported(data, tmp_path, archive, names="bird, car", **kw):
    from namedmask.config import Settings
    from namedmask.core import read_names
    from namedmask.pipeline import run_retrieval
    (tmp_path / "a.json").write_text(json.dumps(archive) if isinstance(archive, dict) else archive)
    run = Run(tmp_path / "r", Settings(images=str(data / "ImageNet2012/train"), names=read_names(names), archive=str(tmp_path / "a.json"), **kw))
    return run_retrieval(run)


def test_archives_from_elsewhere(data, tmp_path, caplog):
    there = json.loads((data / "archive.json").read_text())
    gone = [f"{FOREIGN}/n07/n07_{i}.JPEG" for i in range(5)]
    got = imported(data, tmp_path, there | dict(dog=gone))                                  # what is not asked for need not be there
    assert list(got) == ["bird", "car"] and len(got["bird"]) == 3
    got = imported(data, tmp_path / "n", dict(bird=there["bird"][:1] * 3 + there["bird"][1:2] + gone, car=there["car"]), n_images=2) if (tmp_path / "n").mkdir() is None else 0
    assert got["bird"] == ["n00000000/n00000000_0.JPEG", "n00000000/n00000000_1.JPEG"]      # one photograph counts once
    for k, (archive, words) in enumerate([(dict(bird=there["bird"] + gone, car=there["car"]), "5 of the archive's 11 photographs .* 5 of n07"),
                                          ({"bird": [], "car": []}, "No photograph fits"), ({"bird": there["bird"]}, "no photographs for: car"),
                                          ({"Bird": there["bird"], "bird": there["bird"], "car": there["car"]}, 'two names that are "bird"'),
                                          ('{"bird": ["a"], "bird": ["b"], "car": []}', 'has the name "bird" twice')]):
        (tmp_path / str(k)).mkdir()
        with pytest.raises(UserError, match=words): imported(data, tmp_path / str(k), archive)
    (tmp_path / "w").mkdir()
    assert imported(data, tmp_path / "w", {"bird": there["bird"], "car": []})["car"] == [] and "lists no photograph for car" in caplog.text
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/a.json").write_bytes(b'{"caf\xe9": ["a.jpg"]}')
    from namedmask.core import read_archive, slug
    assert all(slug(n).isascii() for n in read_archive(tmp_path / "odd/a.json"))


def test_judging_is_refused_before_anything_is_trained(data, done, tmp_path):
    def says(words, *args):
        result = CliRunner().invoke(app, ["experts", "--run", str(done), "--judge", *args, "--device", "cpu"])
        assert result.exit_code in (1, 2) and words in " ".join(result.output.split()), result.output
    says("no benchmark", "nope", "--root", str(data))
    says("Where is voc2012", "voc2012")
    says("has the splits", "voc2012", "--root", str(data), "--split", "test")
    says("is a folder", "voc2012", "--root", str(data), "--json", str(tmp_path))
    given = tmp_path / "given"
    call("run", *quick(data, "--set", f"expert_masks={data/'masks'}"), "--out", given)
    result = CliRunner().invoke(app, ["experts", "--run", str(given), "--judge", "voc2012", "--root", str(data)])
    assert result.exit_code == 1 and "no experts of its own" in " ".join(result.output.split())


def test_names_need_no_data(tmp_path):
    torch.manual_seed(2)
    torch.save(make_segmenter("resnet50", 21, False).state_dict(), tmp_path / "w.pt")
    call("convert", tmp_path / "w.pt", tmp_path / "voc.safetensors", "--benchmark", "voc2012")
    assert load_segmenter(tmp_path / "voc.safetensors").names[19] == "tv/monitor"


def test_masks_of_the_benchmark_that_is_meant(tmp_path):
    "Refined masks of several benchmarks lie side by side, for the same photographs."
    photos_at(tmp_path, "n/1.jpg")
    for k, name in enumerate(("coca", "voc2012")): write_mask(tmp_path / "masks" / name / "n/1.json", np.full((40, 60), bool(k)))
    with pytest.raises(UserError, match="in coca, voc2012. Give the one"): import_masks(tmp_path / "masks", tmp_path / "photos", ["n/1.jpg"], tmp_path / "a")
    import_masks(tmp_path / "masks", tmp_path / "photos", ["n/1.jpg"], tmp_path / "b", ("cat", "voc2012", "voc2012_object"))
    assert read_mask(mask_file(tmp_path / "b", "n/1.jpg")).all()
    import_masks(tmp_path / "masks/coca", tmp_path / "photos", ["n/1.jpg"], tmp_path / "c")
    assert not read_mask(mask_file(tmp_path / "c", "n/1.jpg")).any()
    import_masks(tmp_path / "b", tmp_path / "photos", ["n/1.jpg"], tmp_path / "d")          # those of a run, under its own names
    assert read_mask(mask_file(tmp_path / "d", "n/1.jpg")).all()


def test_a_thousand_folders_are_not_searched(tmp_path, monkeypatch):
    "As published, a folder for each class: the masks are where they should be, and no class is looked into by itself."
    from namedmask import pipeline
    photos = [f"n{k:03d}/{k}_{i}.JPEG" for k in range(30) for i in range(4)]
    masks_of(tmp_path, *(f"{p[:-5]}.json" for p in photos))
    looked, real = [], pipeline.masks_in
    monkeypatch.setattr(pipeline, "masks_in", lambda base, photos: looked.append(base) or real(base, photos))
    assert len(pipeline.find_masks(tmp_path / "masks", photos)) == 120 and looked == [tmp_path / "masks"]


def test_new_dates_cost_no_training(data, tmp_path):
    "A copy of ImageNet with other dates is the same ImageNet; another photograph in place of one is not."
    root = tmp_path / "data"
    shutil.copytree(data, root)
    command = ["run", *quick(root), "--out", tmp_path / "r"]
    call(*command)
    kept = {p: p.stat().st_mtime_ns for p in (*(tmp_path / "r/experts").iterdir(), tmp_path / "r/segmenter.safetensors")}
    photo = root / "ImageNet2012/train/n00000000/n00000000_0.JPEG"
    os.utime(photo, (1, 1))
    call(*command)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    Image.new("RGB", (160, 120)).save(photo)
    call(*command)
    assert all(p.stat().st_mtime_ns != t for p, t in kept.items())


def test_what_nothing_depends_on_may_be_corrected(data, tmp_path):
    "A file that is not where it was thought to be is told before the first stage, and can be given without losing what is done."
    from namedmask.pipeline import run_all
    archive, out = data / "archive.json", tmp_path / "r"
    small = [a for a in quick(data) if "saliency_masks" not in str(a)]
    small = [a for k, a in enumerate(small) if not (a == "--set" and k + 1 < len(small) and small[k + 1] == "--set")]
    def fails(words, *more):
        result = CliRunner().invoke(app, [str(a) for a in ("run", *small, "--out", out, *more)])
        assert result.exit_code == 1 and words in " ".join(result.output.split()), result.output
    fails("no file", "--set", "selfmask=/no/such.pt")
    assert not (out / "archive.json").exists()
    fails("does not fit", "--set", f"selfmask={data/'selfmask.pt'}", "--set", f"backbone={data/'selfmask.pt'}")
    fails("no folder of expert weights", "--set", f"selfmask={data/'selfmask.pt'}", "--set", "expert_weights=/no/such")
    fails("made with other settings (seed", "--set", f"selfmask={data/'selfmask.pt'}", "--seed", "5")
    call("run", *quick(data), "--out", out)                                                # corrected: masks from elsewhere
    assert (out / "segmenter.safetensors").exists()
    fails("made with other settings (", "--set", f"saliency_masks={tmp_path}")             # now something depends on it


def test_experts_that_are_none(data, tmp_path):
    "A folder in which nothing fits does not start days of training; a run's own experts fit another run."
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["run", *map(str, quick(data, "--set", f"expert_weights={tmp_path/'empty'}")), "--out", str(tmp_path / "r")])
    assert result.exit_code == 1 and "has no expert of bird, sheep, car" in " ".join(result.output.split())
    from namedmask.deeplab import save_segmenter
    from namedmask.pipeline import import_experts
    save_segmenter(tmp_path / "mine/bird.safetensors", make_segmenter("resnet50", 2, False), ["bird"])
    assert import_experts(tmp_path / "mine", ["bird", "car"], tmp_path / "out") == ["car"] and (tmp_path / "out/bird.safetensors").exists()


def test_embeddings_of_another_network_or_of_another_run(data, tmp_path):
    from namedmask.config import Settings
    from namedmask.core import read_names
    from namedmask.pipeline import run_retrieval
    images = data / "ImageNet2012/train"
    torch.save({p.name: torch.rand(8) for p in images.rglob("*.JPEG")}, tmp_path / "e.pkl")
    made = lambda folder, **kw: Run(tmp_path / folder, Settings(images=str(images), names=read_names("rooster, sheep"), **kw), "cpu")
    with pytest.raises(UserError, match="have 8 numbers each"): run_retrieval(made("a", embeddings=str(tmp_path / "e.pkl")))
    first = run_retrieval(made("b"))
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "b/embeddings").rglob("*.npy")}
    assert run_retrieval(made("c", embeddings=str(tmp_path / "b/embeddings"))) == first and shards
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "b/embeddings").rglob("*.npy")} == shards and not (tmp_path / "c/embeddings").exists()


@pytest.mark.parametrize("bad, words", [(dict(expert_masks="a", expert_weights="b"), "do not go together"), (dict(archive="a", embeddings="b"), "do not go together"),
                                        (dict(experts=False, expert_masks="a"), "no use without experts"), (dict(blur=2), "at most 1"),
                                        (dict(crop=100_000), "at most 4096"), (dict(sigma=[2, 1]), "two numbers above 0")])
def test_settings_that_make_no_sense_together(bad, words):
    from namedmask.config import make_settings
    with pytest.raises(UserError, match=words): make_settings(bad)


def test_the_whole_recipe_can_be_set():
    from namedmask.config import PAPER, load_config, make_settings, resolve, settings_of
    from namedmask.copy_paste import Augment
    from namedmask.pipeline import recipes
    from namedmask.training import Recipe
    given = dict(weight_decay=1e-3, power=1.0, min_lr=0.0, flip=0.0, jitter_p=0.1, grey=0.0, blur=0.9, sigma=(1.0, 3.0), amp=False)
    augment, recipe, expert_augment, expert, warm = recipes(resolve(make_settings(load_config("voc2012") | given), "cpu"))
    for k, v in given.items():
        for x in (augment, expert_augment) if k in Augment.__dataclass_fields__ else (recipe, expert, warm): assert getattr(x, k) == v, k
    augment, recipe, *_ = recipes(resolve(make_settings(load_config("voc2012")), "cpu"))                       # paper.yaml says the same as the defaults
    for k in given.keys() & PAPER.keys(): assert getattr(augment if k in Augment.__dataclass_fields__ else recipe, k) == getattr(Augment() if k in Augment.__dataclass_fields__ else Recipe(), k)
    assert resolve(settings_of("voc2012", None, names={"cat": ["cat"]}, arch="mobilenetv2_100"), "cpu").backbone is None
    assert resolve(make_settings(load_config("voc2012")), "cpu").backbone == "dino_resnet50"


def test_published_experts_are_judged_without_a_run(data, done, tmp_path):
    torch.manual_seed(3)
    model = make_segmenter("resnet50", 2, False)
    (tmp_path / "experts").mkdir(); torch.save(model.state_dict(), tmp_path / "experts/expert_bird.pt")
    text = call("experts", "--weights", tmp_path / "experts", "--judge", "voc2012", "--root", data, "--json", tmp_path / "j.json", "--device", "cpu")
    assert set(json.loads((tmp_path / "j.json").read_text())) == {"bird"} and "bird" in text
    own = call("experts", "--run", done, "--judge", "voc2012", "--root", data, "--json", tmp_path / "own.json", "--device", "cpu")
    theirs = call("experts", "--weights", done / "experts", "--judge", "voc2012", "--root", data, "--json", tmp_path / "theirs.json", "--device", "cpu")
    assert json.loads((tmp_path / "own.json").read_text()) == json.loads((tmp_path / "theirs.json").read_text()) and "photographs" in own and "photographs" in theirs
    for args in (["--weights", str(tmp_path)], ["--run", str(done), "--weights", str(tmp_path)], []):
        assert CliRunner().invoke(app, ["experts", *args]).exit_code == 2
    result = CliRunner().invoke(app, ["experts", "--weights", str(tmp_path), "--judge", "voc2012", "--root", str(data)])
    assert result.exit_code == 1 and "has no expert of aeroplane" in " ".join(result.output.split())
