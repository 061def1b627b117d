"The training loop against the same steps in plain PyTorch; the schedule; labels above 255; what a callback must leave alone."
import copy

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from PIL import Image
from torch import nn

from namedmask.copy_paste import Augment, CopyPaste, Item
from namedmask.core import UserError, read_jsonl, write_mask
from namedmask.deeplab import make_segmenter, normalise
from namedmask.training import Recipe, fit, make_learner, poly_lr, read_checkpoint

MEAN, STD = (.485, .456, .406), (.229, .224, .225)


class Tiny(nn.Module):
    "The least that the training takes for a segmenter."
    mean, std = MEAN, STD
    def __init__(self, n=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=.01), nn.ReLU())
        self.classifier = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.1), nn.Conv2d(8, n, 1))
    def forward(self, x): return self.classifier(self.backbone(x))


def tiny(n=3): torch.manual_seed(1); return Tiny(n)


class Batches:
    "Samples that were made before: image (3, H, W) uint8, labels (H, W)."
    def __init__(self, images, labels): self.images, self.labels = images, labels
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images[i], self.labels[i]


def batches(n, size=33, classes=3, ignore=255, dtype=torch.uint8, seed=0):
    "Random pictures and labels, a third of them ignored."
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (n, size, size))
    labels[rng.random(labels.shape) < .3] = ignore
    return Batches(torch.from_numpy(rng.integers(0, 256, (n, 3, size, size), np.uint8)), torch.from_numpy(labels).to(dtype))


class Watch(Callback):
    "Notes losses, gradients, weights and learning rates of each step, and stops after so many."
    order = 70
    def __init__(self, stop=None, grads=True): self.stop, self.grads, self.rows = stop, grads, []
    def after_backward(self):
        self.grad = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None} if self.grads else None
    def after_batch(self):
        self.rows.append(dict(loss=self.loss.item(), lr=[g["lr"] for g in self.opt.opt.param_groups], grad=self.grad,
                              state={k: v.clone() for k, v in self.model.state_dict().items()} if self.grads else None))
        if len(self.rows) == self.stop: raise CancelFitException()


def standardise(xb): return (xb / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def plain(model, data, recipe, n, standardise=standardise):
    "The same `n` steps, written down without any library but PyTorch. Yields what `Watch` notes."
    model.train().to(memory_format=torch.channels_last)
    opt = torch.optim.Adam([dict(params=model.backbone.parameters()), dict(params=model.classifier.parameters())],
                           lr=0., betas=(.9, .999), eps=1e-8, weight_decay=2e-4)
    for t in range(n):
        xb, yb = (torch.stack([data[t * recipe.bs + k][j] for k in range(recipe.bs)]) for j in (0, 1))
        x = standardise(xb).contiguous(memory_format=torch.channels_last)
        for group, base in zip(opt.param_groups, (recipe.backbone_lr, recipe.lr)):
            group["lr"] = max(base * (1 - t / recipe.steps)**.9, 1e-6)
        logp, y = model(x).log_softmax(1), yb.to(torch.int64)
        counts = y != recipe.ignore
        loss = -logp.gather(1, torch.where(counts, y, 0)[:, None])[:, 0][counts].mean()
        opt.zero_grad(); loss.backward()
        grad = {name: p.grad.clone() for name, p in model.named_parameters()}
        opt.step()
        yield dict(loss=loss.item(), grad=grad, lr=[g["lr"] for g in opt.param_groups],
                   state={k: v.clone() for k, v in model.state_dict().items()})


def learned(model, data, recipe, stop=None, **kw):
    "What the learner does, step by step."
    watch = Watch(stop, **kw)
    torch.manual_seed(7)
    fit(model, data, recipe, cbs=[watch])
    return watch.rows


def assert_same(ours, theirs, grad=1e-4, step=.02):
    "Losses, learning rates, gradients (relative to the largest of a tensor) and weights (to a small part of one step)."
    for t, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["lr"] == pytest.approx(b["lr"], rel=1e-12)
        assert a["grad"].keys() == b["grad"].keys() and a["state"].keys() == b["state"].keys()
        for k in b["grad"]:
            scale = max(float(b["grad"][k].abs().max()), 1e-6)
            assert float((a["grad"][k] - b["grad"][k]).abs().max()) <= grad * scale, (t, k)
        for k, v in b["state"].items():
            differ = (a["state"][k].double() - v.double()).abs()
            if "running" in k: assert torch.allclose(a["state"][k], v, rtol=1e-4, atol=1e-6), (t, k)
            elif "num_batches" in k: assert differ == 0
            else:   # Adam moves a weight by its learning rate, whatever the gradient: one that is nearly zero may go either way
                lr = b["lr"][0 if k.startswith("backbone") else 1]
                assert (differ > step * lr).double().mean() < 1e-3 and differ.max() <= 2.1 * lr * (t + 1), (t, k)


@pytest.mark.parametrize("ignore, classes, dtype", [(255, 3, torch.uint8), (255, 21, torch.int64), (1000, 920, torch.int16),
                                                    (1000, 920, torch.int32), (1000, 920, torch.uint16)])
def test_steps_are_plain_pytorchs(ignore, classes, dtype):
    recipe, data = Recipe(steps=200, bs=4, ignore=ignore), batches(12, 17, classes, ignore, dtype)
    model = tiny(classes)
    theirs = copy.deepcopy(model)
    ours = learned(model, data, recipe, stop=3)
    torch.manual_seed(7)                                                                     # of the dropout
    assert_same(ours, list(plain(theirs, data, recipe, 3)))


def test_the_papers_network_steps_as_plain_pytorch():
    """DeepLabv3+ with ResNet-50, 21 classes, three steps. Its norms see few places of two small pictures, which would blow a last bit of
    the input up to per cents of a gradient; so this time both get the very same input, and that it is right is seen before."""
    torch.manual_seed(0)
    model = make_segmenter("resnet50", n_classes=21, pretrained=False)
    theirs, recipe, data = copy.deepcopy(model), Recipe(steps=20_000, bs=2), batches(6, 33, 21)
    ours = learned(model, data, recipe, stop=3)
    torch.testing.assert_close(normalise(data.images, model.mean, model.std), standardise(data.images), rtol=1e-5, atol=1e-6)
    torch.manual_seed(7)
    assert_same(ours, list(plain(theirs, data, recipe, 3, lambda xb: normalise(xb, MEAN, STD))))


def test_adam_by_hand():
    "L2 decay is part of the gradient, both moments are corrected for their start, eps stands outside the root."
    recipe, data = Recipe(steps=10, bs=2), batches(20)
    model = tiny()
    w = {k: v.detach().double().clone() for k, v in model.named_parameters()}
    m, v = ({k: torch.zeros_like(x) for k, x in w.items()} for _ in range(2))
    for t, row in enumerate(learned(model, data, recipe), start=1):
        for k in w:
            lr = max((5e-5 if k.startswith("backbone") else 5e-4) * (1 - (t - 1) / 10)**.9, 1e-6)
            g = row["grad"][k].double() + 2e-4 * w[k]
            m[k], v[k] = .9 * m[k] + .1 * g, .999 * v[k] + .001 * g**2
            w[k] = w[k] - lr * (m[k] / (1 - .9**t)) / ((v[k] / (1 - .999**t)).sqrt() + 1e-8)
            assert torch.allclose(row["state"][k].double(), w[k], rtol=1e-5, atol=1e-8), (t, k)
            w[k] = row["state"][k].double()
    assert t == 10


def test_the_schedule_is_the_papers(shared):
    "Every learning rate that the optimiser sees in a whole training."
    golden = np.load(shared / "golden" / "schedule.npz")
    n = int(golden["n_iters"])
    rows = learned(tiny(), batches(n, 3), Recipe(steps=n, bs=1, log_every=1000), grads=False)
    np.testing.assert_allclose([r["lr"] for r in rows], golden["lr"], rtol=1e-9)


def test_the_schedule_has_a_floor_and_goes_on():
    r = Recipe(steps=1000)
    assert poly_lr(5e-5, 999, r) == 1e-6 and poly_lr(5e-4, 1000, r) == 1e-6 and poly_lr(5e-4, 0, r) == 5e-4
    recipe, watch = Recipe(steps=10, bs=1), Watch(grads=False)
    make_learner(tiny(), batches(10, 5), recipe, start=7, cbs=[watch]).fit(1)
    assert [x["lr"] for x in watch.rows] == [[poly_lr(5e-5, t, recipe), poly_lr(5e-4, t, recipe)] for t in (7, 8, 9)]


@pytest.mark.parametrize("make", [tiny, lambda: make_segmenter("resnet50", n_classes=3, pretrained=False, head_channels=16)])
def test_norms_move_at_two_speeds(make):
    "By 0.01 in the backbone, by 0.1 in the head, towards the statistics of what they were fed."
    model, fed = make(), {}
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {n: (m.running_mean.double().clone(), m.running_var.double().clone()) for n, m in norms.items()}
    for name, m in norms.items(): m.register_forward_hook(lambda m, i, o, name=name: fed.update({name: (m, i[0].detach().double())}))
    learned(model, batches(2), Recipe(bs=2, steps=50), stop=1)
    assert len(fed) == len(before) and {n.split(".")[0] for n in fed} == {"backbone", "classifier"}
    for name, (m, x) in fed.items():
        mu, var = before[name]
        k = .01 if name.startswith("backbone") else .1
        torch.testing.assert_close(m.running_mean.double(), (1 - k) * mu + k * x.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(m.running_var.double(), (1 - k) * var + k * x.var((0, 2, 3)), rtol=1e-4, atol=1e-6)


# ---- labels above 255

def big_items(tmp_path):
    rng, items = np.random.default_rng(0), []
    for label in (1, 255, 256, 700, 919):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / f"{label}.png")
        write_mask(tmp_path / f"{label}.json", np.ones((40, 50), bool))
        items.append(Item(tmp_path / f"{label}.png", tmp_path / f"{label}.json", label))
    return items


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_s_goes_through_everything(tmp_path, workers):
    "919 names and the ignored label 1000, from the files to the new weights."
    items, recipe = big_items(tmp_path), Recipe(steps=6, bs=4, ignore=1000, workers=workers)
    data = CopyPaste(items, Augment(crop=32, ignore=1000), length=24)
    seen = {int(v) for k in range(24) for v in data[k][1].unique()}
    assert seen == {1, 255, 256, 700, 919, 1000}                                             # the masks are full: nothing is 0
    model = tiny(920)
    theirs = copy.deepcopy(model)
    ours = learned(model, data, recipe)
    torch.manual_seed(7)
    assert_same(ours, list(plain(theirs, data, recipe, 6)))
    for k in (1, 255, 256, 700, 919): assert ours[0]["grad"]["classifier.4.weight"][k].abs().sum() > 0


def test_the_ignored_label_is_one(tmp_path):
    "A training set that pads with another label than the loss ignores is refused before the first step."
    data = CopyPaste(big_items(tmp_path), Augment(crop=32, ignore=1000), length=24)
    with pytest.raises(ValueError, match="1000.*255"): fit(tiny(920), data, Recipe(steps=2, bs=4))


def test_ignored_pixels_do_not_count():
    "Whatever is seen there: other colours in ignored places of a 1×1 network leave the loss as it is."
    data, recipe = batches(2, 9), Recipe(steps=5, bs=2)
    def loss(data):
        torch.manual_seed(0)
        model = Tiny(); model.backbone = nn.Conv2d(3, 4, 1); model.classifier = nn.Conv2d(4, 3, 1)
        return learned(model, data, recipe, stop=1)[0]["loss"]
    other = data.images.clone()
    other[(data.labels == 255)[:, None].expand_as(other)] = 77
    assert loss(data) == pytest.approx(loss(Batches(other, data.labels)), rel=1e-6)
    assert loss(data) != pytest.approx(loss(Batches(255 - data.images, data.labels)), rel=1e-3)


# ---- the loop

def test_a_frozen_backbone_stays(tmp_path):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    fit(model, batches(12), Recipe(steps=3, bs=4, backbone_lr=0))
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("backbone"))
    assert not any(torch.equal(after[k], v) for k, v in before.items() if k.startswith("classifier"))
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_a_killed_training_goes_on_where_it_was(tmp_path):
    "Weights, moments, schedule, dropout: the end is the same to the last bit, whenever it is killed."
    data, recipe = batches(40), Recipe(steps=10, bs=4, log_every=1, save_seconds=0)
    class Kill(Callback):
        order = 80
        def __init__(self, step): self.step = step
        def after_batch(self):
            if self.iter + 1 == self.step: raise KeyboardInterrupt
    def go(name, **kw):
        torch.manual_seed(3)
        return fit(tiny(), data, recipe, tmp_path / f"{name}.pt", "f", tmp_path / f"{name}.jsonl", **kw).state_dict()
    whole = go("whole")
    for step in 1, 6, 9:
        with pytest.raises(KeyboardInterrupt): go(step, cbs=[Kill(step)])
        assert read_checkpoint(tmp_path / f"{step}.pt", "f")["step"] == step
        assert all(torch.equal(a, b) for a, b in zip(go(step).values(), whole.values()))
        log = [read_jsonl(tmp_path / f"{name}.jsonl") for name in ("whole", step)]
        assert [(r["step"], r["loss"], r["lr"]) for r in log[0]] == [(r["step"], r["loss"], r["lr"]) for r in log[1]]


def test_a_checkpoint_that_is_none(tmp_path, caplog):
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 half of a file")
    assert read_checkpoint(tmp_path / "half.pt", "f") is None and "starts again" in caplog.text
    assert read_checkpoint(tmp_path / "nowhere.pt", "f") is None
    torch.save(dict(fingerprint="g", step=3), tmp_path / "other.pt")
    assert read_checkpoint(tmp_path / "other.pt", "f") is None


def test_the_best_weights_are_kept():
    marks, seen, kept = iter([.2, .5, .4]), [], []
    def validate(model): seen.append(model.training); return dict(miou=next(marks))
    watch = Watch()
    keep = lambda m: kept.append(copy.deepcopy(m.state_dict()))
    model = fit(tiny(), batches(12), Recipe(steps=6, bs=2, eval_every=2), validate=validate, cbs=[watch], keep_best=keep)
    assert seen == [False] * 3 and not model.training and len(kept) == 2
    for best, step in zip(kept, (2, 4)): assert all(torch.equal(v, best[k]) for k, v in watch.rows[step - 1]["state"].items())


def test_a_loss_that_is_no_number():
    model = tiny()
    with torch.no_grad(): model.classifier[-1].weight.fill_(float("nan"))
    with pytest.raises(UserError, match="^The loss is not a number at step 10"): fit(model, batches(40, 9), Recipe(steps=20, bs=2))
