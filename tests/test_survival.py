"""Killed at any moment, given again, the same call ends as if nothing had happened; and what happens to photographs meanwhile is noticed.

The jobs run in processes that are forked from a server which has everything imported, so each starts at once.
"""
import json, multiprocessing, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from namedmask.core import UserError, mask_file, read_archive, read_json, read_jsonl, read_mask

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
STAGES = ["retrieval", "saliency", "experts", "distill", "report"]
SETTINGS = dict(names="guitar, mushroom", n_images=11, warm_steps=4, expert_steps=2, steps=6, crop=96, bs=4, eval_every=3, device="cpu")


def job(photos, out, said, kill=None, delete=(), save_seconds=None):
    """The job, with mishaps: SIGKILL in the middle of a write, `kill` = (stage, which of its writes); photographs that vanish when
    a stage begins, `delete` = {stage: path}. Writes to the file `said` what a person would be told, and where each training started."""
    import torch
    from namedmask import pipeline, training
    torch.set_num_threads(1)
    now, begin, rename, recipes, learner = dict(stage=None, writes=0), pipeline.State.begin, os.replace, pipeline.recipes, training.make_learner
    tell = lambda **row: open(said, "a").write(json.dumps(row) + "\n")

    def begin_and_note(state, stage, inputs):
        begin(state, stage, inputs)
        now.update(stage=stage, writes=0)
        if stage in delete: Path(delete[stage]).unlink()

    def replace_or_die(tmp, path):
        now["writes"] += 1
        if (now["stage"], now["writes"]) == kill:
            os.truncate(tmp, os.path.getsize(tmp) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        rename(tmp, path)

    def learner_and_note(model, ds, recipe, start=0, cbs=()):
        tell(training=recipe.steps, start=start)
        return learner(model, ds, recipe, start, cbs)

    pipeline.State.begin, os.replace, training.make_learner = begin_and_note, replace_or_die, learner_and_note
    if save_seconds is not None: pipeline.recipes = lambda s: tuple(replace(r, save_seconds=save_seconds) if isinstance(r, training.Recipe) else r for r in recipes(s))
    try: pipeline.run(photos, out=out, **SETTINGS)
    except UserError as error:
        tell(error=str(error))
        sys.exit(1)


@pytest.fixture(scope="module")
def start():
    "Starts a job: photos, out → its process."
    if "forkserver" not in multiprocessing.get_all_start_methods(): pytest.skip("needs fork")
    old, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["namedmask.cli", "namedmask.encoders", "namedmask.spectral", "namedmask.training", "namedmask.pipeline", "namedmask.report",
                                    "sentence_transformers"])
    def start(photos, out, **mishaps):
        process = context.Process(target=job, args=(photos, out, Path(f"{out}.said")), kwargs=mishaps, daemon=True)
        process.start()
        return process
    yield start
    if old is None: del os.environ["OMP_NUM_THREADS"]
    else: os.environ["OMP_NUM_THREADS"] = old


@pytest.fixture(scope="module")
def finish(start):
    "Runs a job to its end and returns its exit code."
    def finish(photos, out, **mishaps):
        process = start(photos, out, **mishaps)
        process.join(180)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode
    return finish


def said(out, key): return [row[key] for row in read_jsonl(Path(f"{out}.said")) if key in row]


def copy_photos(world, root):
    root.mkdir()
    for name, n in (("mushroom", 10), ("guitar", 4)):
        for p in [p for p in world.photos if world.kind(p) == name][:n]: shutil.copy2(world.index / p, root / f"{name} {p}")
    return root


@pytest.fixture(scope="module")
def photos(world, tmp_path_factory): return copy_photos(world, tmp_path_factory.mktemp("survival") / "photos")


@pytest.fixture(scope="module")
def unbroken(photos, finish):
    "The run that nothing happens to."
    assert finish(photos, photos.parent / "unbroken") == 0
    return photos.parent / "unbroken"


def files(run, *patterns): return {str(p.relative_to(run)): p.read_bytes() for pattern in patterns for p in sorted(run.glob(pattern)) if p.is_file()}


def same(run, other):
    "Whether two runs made the same."
    exact = ["archive.json", "retrieval.json", "config.yaml", "masks/**/*.json"]
    a, b = files(run, *exact), files(other, *exact)
    assert a.keys() == b.keys() and [k for k in a if a[k] != b[k]] == []
    for weights in ("segmenter", "segmenter_best", "experts/_warm", "experts/guitar", "experts/mushroom"):
        x, y = (load_file(r / f"{weights}.safetensors") for r in (run, other))
        assert x.keys() == y.keys() and all(np.allclose(x[k], y[k], rtol=1e-5, atol=1e-5) for k in x), weights
    rows = [[{k: v for k, v in r.items() if k != "samples_per_second"} for r in read_jsonl(d / "metrics.jsonl")] for d in (run, other)]
    assert [sorted(r) for r in rows[0]] == [sorted(r) for r in rows[1]] and [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
    assert all(s["done"] for s in read_json(run / "state.json")["stages"].values())
    assert list(run.rglob(".writing-*")) == [] and list(run.rglob("*.ckpt")) == [] and not (run / "checkpoint.pt").exists()
    return True


def test_the_unbroken_run(unbroken):
    run = unbroken
    state = read_json(run / "state.json")
    assert list(state["stages"]) == STAGES and state["skipped"] == [] and same(run, run)
    assert {n: len(ps) for n, ps in read_archive(run / "archive.json").items()} == dict(guitar=4, mushroom=10)
    assert len(files(run, "masks/saliency/**/*.json")) == 14 and len(files(run, "masks/experts/**/*.json")) == 14
    assert [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "miou" in r] == [3, 6]


def test_killed_in_every_stage_in_the_middle_of_a_write(photos, finish, unbroken, tmp_path):
    run = tmp_path / "run"
    for stage, write in [("retrieval", 1), ("retrieval", 2), ("retrieval", 4), ("saliency", 1), ("saliency", 3), ("experts", 1), ("experts", 5), ("distill", 1),
                         ("distill", 2), ("report", 1), ("report", 2)]:
        assert finish(photos, run, kill=(stage, write)) == -signal.SIGKILL
        stages = read_json(run / "state.json")["stages"]
        assert not stages[stage]["done"] and all(stages[s]["done"] for s in STAGES[:STAGES.index(stage)])
        assert len(list(run.rglob(".writing-*"))) >= 1                                # the kill was in the middle of a write
    assert finish(photos, run) == 0 and same(run, unbroken)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(photos, start, finish, unbroken, tmp_path, seed):
    rng, run, kills = np.random.default_rng(seed), tmp_path / "run", 0
    seconds = sum(s["seconds"] for s in read_json(unbroken / "state.json")["stages"].values())
    for moment in rng.uniform(0.2, 0.8 * seconds, 4):
        process = start(photos, run)
        process.join(moment)
        if process.exitcode is not None: break
        process.kill()
        process.join()
        kills += 1
    assert kills and finish(photos, run) == 0 and same(run, unbroken)
    assert not said(run, "error")


def test_training_goes_on_from_its_checkpoint(photos, finish, unbroken, tmp_path):
    "With a checkpoint at every step, and killed while one is written, it goes on from the one before, to the same weights."
    run = tmp_path / "run"
    assert finish(photos, run, save_seconds=0, kill=("experts", 3)) == -signal.SIGKILL
    assert (run / "experts" / "_warm.ckpt").exists()
    assert finish(photos, run, save_seconds=0, kill=("distill", 6)) == -signal.SIGKILL
    assert (run / "checkpoint.pt").exists()
    assert finish(photos, run, save_seconds=0) == 0
    starts = said(run, "start")
    assert starts[:2] == [0, 2] and starts[2:4] == [0, 0] and starts[4] == 0 and starts[5] >= 3 and len(starts) == 6    # warm, warm, experts, distill, distill
    assert same(run, unbroken)


def test_a_damaged_checkpoint_is_not_trusted(photos, finish, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    state = read_json(run / "state.json")
    state["stages"]["distill"]["done"] = False
    (run / "state.json").write_text(json.dumps(state))
    (run / "checkpoint.pt").write_bytes(b"PK\x03\x04" + bytes(500))
    assert finish(photos, run) == 0 and said(run, "start") == [0] and same(run, unbroken)


def test_a_finished_run_is_left_alone(photos, finish, unbroken):
    run = unbroken
    before, trainings = files(run, "**/*.json", "*.safetensors"), len(said(run, "start"))
    assert finish(photos, run) == 0 and len(said(run, "start")) == trainings
    after = files(run, "**/*.json", "*.safetensors")
    assert {k for k in after if before.get(k) != after[k]} <= {"state.json"}          # the report is made again, its seconds noted


@pytest.mark.parametrize("damage", ["archive", "retrieval", "experts", "masks", "checkpoint", "embeddings"])
def test_what_is_damaged_in_a_run_is_made_again(photos, finish, unbroken, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    (run / "segmenter.safetensors").write_bytes(b"cut short")
    if damage == "archive": (run / "archive.json").write_text('{"guitar": [')
    if damage == "retrieval": (run / "retrieval.json").write_text("[]")
    if damage == "experts": (run / "experts" / "_warm.safetensors").write_bytes(b""); shutil.rmtree(run / "masks" / "experts")
    if damage == "masks": shutil.rmtree(run / "masks")
    if damage == "checkpoint": (run / "checkpoint.pt").write_bytes(b"")
    if damage == "embeddings":
        (run / "archive.json").unlink()
        for shard in run.rglob("embeddings/*/*.npy"): shard.write_bytes(b"")
    assert finish(photos, run) == 0 and same(run, unbroken), said(run, "error")


# Photographs that come, go and change

def test_photographs_that_vanish_midway(world, finish, tmp_path):
    root, run = copy_photos(world, tmp_path / "photos"), tmp_path / "run"
    gone = dict(zip(STAGES[:4], sorted(p.name for p in root.glob("mushroom*"))[2:]))
    assert finish(root, run, delete={stage: root / p for stage, p in gone.items()}) == 0, said(run, "error")
    state = read_json(run / "state.json")
    listed = {(s["stage"], s["photo"]): s["reason"] for s in state["skipped"]}
    for stage, photo in gone.items(): assert any(p.endswith(photo) and s == stage for s, p in listed), f"{photo}, which vanished before {stage}, is not listed"
    assert all(s["done"] for s in state["stages"].values()) and (run / "segmenter.safetensors").exists()


def test_changed_and_added_photographs_are_noticed(world, finish, unbroken, tmp_path):
    photos, run = copy_photos(world, tmp_path / "photos"), tmp_path / "run"
    assert finish(photos, run, kill=("saliency", 15)) == -signal.SIGKILL              # all masks are there: the first half of the job will do
    first = json.loads((run / "archive.json").read_text())
    changed = photos / Path(first["guitar"][0]).name
    size = Image.open(changed).size
    im = Image.open(changed).resize((size[0] * 2, size[1] * 2))
    im.save(changed, quality=92)
    assert finish(photos, run, kill=("report", 1)) == -signal.SIGKILL
    assert read_mask(mask_file(run / "masks" / "saliency", changed.name)).shape == im.size[::-1]
    trained = (run / "segmenter.safetensors").read_bytes()

    im.resize(size).save(changed, quality=80)                                         # after the end, and the archive stays as it is
    os.utime(changed, (time.time() - 1e6, time.time() - 1e6))                         # an old file, moved there
    assert finish(photos, run) == 0
    assert sorted(read_archive(run / "archive.json")["guitar"]) == sorted(first["guitar"])
    for masks in ("saliency", "experts/guitar"): assert read_mask(mask_file(run / "masks" / masks, changed.name)).shape == size[::-1], masks
    assert (run / "segmenter.safetensors").read_bytes() != trained
    trained, masks = (run / "segmenter.safetensors").read_bytes(), files(run, "masks/saliency/*.json")

    new = [p for p in world.photos if world.kind(p) == "mushroom"][10]
    shutil.copy(world.index / new, photos / "new.jpg")
    assert finish(photos, run) == 0
    assert any(p.endswith("new.jpg") for p in read_archive(run / "archive.json")["mushroom"]) and (run / "masks" / "saliency" / "new.jpg.json").exists()
    assert (run / "segmenter.safetensors").read_bytes() != trained
    assert masks.items() <= files(run, "masks/saliency/*.json").items()               # what had not changed is kept


# Disks

def test_a_disk_that_fills_up(photos, finish, unbroken, tmp_path):
    "No space: said in words, nothing is lost, and with space again the same call ends as the unbroken one."
    disk, run = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    run.symlink_to(disk)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode: pytest.skip("nothing can be mounted here")
    try:
        assert finish(photos, run) == 1
        assert "no space left" in said(run, "error")[-1] and "_warm.safetensors" in said(run, "error")[-1] and not list(disk.rglob(".writing-*"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert finish(photos, run) == 0 and same(disk, unbroken)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert finish(photos, run) == 1 and "read-only" in said(run, "error")[-1]
    finally: subprocess.run(["umount", "-l", disk], check=True)
