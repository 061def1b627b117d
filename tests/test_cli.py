"The command line: what it says, with which exit code, and that it says it in a line."
import json, os, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path

import pytest
import yaml

from namedmask import cli
from namedmask.core import read_json

COMMANDS = [c.name or c.callback.__name__ for c in cli.app.registered_commands]
TERMINAL = [sys.executable, "-c", "from namedmask.cli import main; main()"]
ENV = dict(os.environ, OMP_NUM_THREADS="1")


def terminal(*args, cwd=None):
    "The command in a process of its own: exit code, stdout, stderr."
    run = subprocess.run([*TERMINAL, *map(str, args)], capture_output=True, text=True, env=ENV, cwd=cwd, timeout=300)
    return run.returncode, run.stdout, run.stderr


@pytest.fixture
def namedmask(capsys, monkeypatch):
    "The command in this process: exit code, stdout, stderr."
    monkeypatch.setattr(cli.logging, "captureWarnings", lambda on: None)
    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.main([str(a) for a in args])
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err
    return call


def one_line(err): return err.startswith("Error: ") and err.count("\n") == 1 and "Traceback" not in err and "Errno" not in err


@pytest.fixture(scope="module")
def photos(world, tmp_path_factory):
    "Four guitars, four mushrooms, and what is no photograph."
    root = tmp_path_factory.mktemp("world") / "my photos"
    for name in ("guitar", "mushroom"):
        (root / f"{name}s of ünïcode").mkdir(parents=True)
        for p in [p for p in world.photos if world.kind(p) == name][:4]: shutil.copy(world.index / p, root / f"{name}s of ünïcode" / p)
    (root / "empty.jpg").touch()
    (root / "notes.txt").write_text("not a photograph")
    return root


@pytest.fixture(scope="module")
def finished(photos):
    "A finished run, made in a terminal from the folder of the photographs' parent: its folder, and what the command said."
    said = terminal("run", "--images", photos.name, "--names", "guitar, mushroom, zeppelin", "--out", "runs/one", "--steps", 2, "--no-experts", "--n-images", 4, cwd=photos.parent)
    return photos.parent / "runs" / "one", said


# Before anything runs

def test_the_import_is_light():
    code = ("import sys, time; t = time.perf_counter(); import namedmask; a = time.perf_counter() - t; import namedmask.cli; b = time.perf_counter() - t\n"
            "import json; print(json.dumps([a, b, [m for m in ('torch', 'fastai', 'timm', 'matplotlib', 'cv2', 'scipy') if m in sys.modules]]))")
    alone, command, heavy = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert alone < 1 and command < 3 and heavy == []


def test_help_is_quick():
    start = time.monotonic()
    code, out, err = terminal("--help")
    assert code == 0 and not err and time.monotonic() - start < 5
    assert all(c in out for c in ["run", "retrieve", "saliency", "experts", "distill", "report", "predict", "evaluate", "demo"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(namedmask, command):
    code, out, err = namedmask(command, "--help")
    assert code == 0 and not err and "Usage:" in out and "torch" not in out
    options = next(c for c in cli.typer.main.get_command(cli.app).commands.values() if c.name == command).params
    assert all(getattr(o, "help", None) for o in options if o.name not in ("help", "install_completion"))


def test_version(namedmask):
    from namedmask import __version__
    assert namedmask("--version") == (0, f"namedmask {__version__}\n", "")


@pytest.mark.parametrize("args", [
    "", "frobnicate", "--frobnicate", "run", "run --images .", "run --images . --names cat", "run --images . --names cat --out x --steps many",
    "run --images . --names cat --out x --steps 0", "run --images . --names cat --out x --n-images -3", "run --images . --names cat --out x --seed one",
    "run --images . --names cat --out x --colour red", "run --images . --names cat --out x surplus", "retrieve", "predict --run x --out y", "predict x --out y",
    "evaluate --run x", "evaluate --run x --benchmark demo --limit 0", "distill --run"])
def test_wrong_use_is_two(namedmask, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    code, out, err = namedmask(*args.split())
    assert code == 2 and "Traceback" not in err and not list(tmp_path.iterdir())


# Failures: 1, and one line that says what is wrong

@pytest.fixture
def folders(tmp_path, photos, monkeypatch):
    "Folders in which something is amiss; the working folder."
    for d in ("none", "words", "broken", "taken", "halfway"): (tmp_path / d).mkdir()
    (tmp_path / "words" / "a.txt").write_text("x")
    for k in range(3): (tmp_path / "broken" / f"{k}.jpg").write_bytes(b"broken" * k)
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    (tmp_path / "a.jpg").write_text("x")
    (tmp_path / "twice.txt").write_text("cat\ndog\ncat\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    from namedmask.pipeline import Run, Settings
    Run("begun", Settings(images=str(photos), names=dict(cat=["cat"])))
    (tmp_path / "garbled").mkdir()
    (tmp_path / "garbled" / "config.yaml").write_text("names: [")
    return tmp_path


@pytest.mark.parametrize("args, words", [
    ("run --images gone --names cat --out x", "gone"), ("run --images a.jpg --names cat --out x", "a.jpg"),
    ("run --images none --names cat --out x", "There is no photograph in"), ("run --images words --names cat --out x", "(1 other files)"),
    ("run --images broken --names cat --out x", "None of the 3 photographs"),
    ("run --images photos --names , --out x", "No names"), ("run --images photos --names cat,dog,cat --out x", '"cat" is given twice'),
    ("run --images photos --names twice.txt --out x", '"cat" is given twice'), ("run --images photos --names gone.txt --out x", "no names file gone.txt"),
    ("run --images photos --names latin.txt --out x", "UTF-8"), ("run --images photos --names background --out x", "background"),
    ("run --images photos --names cat --out taken", "thesis.tex"), ("run --images photos --names cat --out a.jpg", "a.jpg"),
    ("run --images photos --names cat --out a.jpg/x", "a.jpg"), ("run --images photos --names cat --out garbled", "garbled"),
    ("run --images photos --names cat --out x --device gpu", "gpu"), ("run --images photos --names cat --out x --device tpu", "tpu"),
    ("run --images photos --names dog --out begun", "--fresh"), ("run --images none --names cat --out begun", "images"), ("run --images photos --names cat --out begun --seed 3", "seed"),
    *[(f"{stage} --run {folder}", folder) for stage in ("retrieve", "saliency", "experts", "distill", "report") for folder in ("gone", "taken")],
    ("saliency --run begun", "namedmask retrieve"), ("experts --run begun", "namedmask retrieve"), ("distill --run begun", "namedmask retrieve"),
    ("predict --run gone photos --out y", "gone"), ("predict --run begun photos --out y", "no segmenter"), ("evaluate --run begun --benchmark demo", "no segmenter")])
def test_failures_are_one(namedmask, folders, args, words):
    before = (folders / "begun" / "config.yaml").read_bytes()
    code, out, err = namedmask(*args.split())
    wrong_use = words in ("No names", '"cat" is given twice', "background", "gpu", "tpu")
    assert code == 1 + wrong_use and not out and one_line(err) and words in err
    assert (folders / "begun" / "config.yaml").read_bytes() == before and (folders / "taken" / "thesis.tex").read_text() == "mine"


def test_a_mistake_does_not_claim_the_folder(namedmask, folders):
    "After a mistyped stack, the corrected command is not told that the folder belongs to another run."
    code, _, err = namedmask("run", "--images", "photos", "--names", "cat", "--out", "x", "--stack", "offlin")
    assert code == 2 and "offlin" in err and "Traceback" not in err
    assert not (folders / "x" / "config.yaml").exists()


def test_nothing_fits(namedmask, folders):
    for _ in range(2):                                                                # the second time retrieval is done already
        code, out, err = namedmask("run", "--images", "photos", "--names", "zeppelin", "--out", "x")
        assert code == 1 and not out and "zeppelin" in err + str(read_json(folders / "x" / "retrieval.json")) and one_line(err.splitlines(True)[-1])
        assert "fits any of the names" in err


@pytest.mark.parametrize("args, words", [
    ("crop=abc", "crop is 'abc'"), ("scale=3", "scale is 3"), ("bs=1", "at least 2"), ("steps=0", "at least 1"), ("scale=[1,0.5]", "not below"), ("lr=.nan", "finite"),
    ("max_n_masks=0", "at least 1"), ("seed=-1", "at least 0"), ("negatives=2", "at most 1"), ("views=[0]", "above 0"), ("ignore=1", "label of a name"),
    ("nosuch=1", "nosuch"), ("bare", "KEY=VALUE"), ("images=x", "--images"), ("device=cpu", "--device"), ("fresh=true", "--fresh"), ("stack=[1]", "stack")])
def test_settings_that_cannot_be(namedmask, folders, args, words):
    "Wrong use, said before the folder is claimed, so that the corrected command is not refused."
    code, out, err = namedmask("run", "--images", "photos", "--names", "cat", "--out", "x", "--set", args)
    assert code == 2 and not out and words in " ".join(err.replace("│", " ").split()) and "Traceback" not in err and not (folders / "x" / "config.yaml").exists()


def test_fresh_spares_what_is_not_a_run(namedmask, folders):
    "--fresh throws away a run, not a folder that happens to hold files of the same names."
    for p in ("masks/drawn by hand.png", "config.yaml", "experts/letter.txt", "report.html"):
        (folders / "taken" / p).parent.mkdir(exist_ok=True)
        (folders / "taken" / p).write_text("mine: all")
    code, _, err = namedmask("run", "--images", "photos", "--names", "cat", "--out", "taken", "--fresh")
    assert code == 1 and one_line(err)
    assert len([p for p in (folders / "taken").rglob("*") if p.is_file() and p.name != ".lock"]) == 5


def test_other_settings_and_fresh(namedmask, folders):
    command = ["run", "--images", "photos", "--names", "mushroom", "--out", "begun", "--steps", 1, "--no-experts", "--n-images", 2]
    code, _, err = namedmask(*command)
    assert code == 1 and one_line(err) and "--fresh" in err and "names" in err and "steps" in err
    code, out, err = namedmask(*command, "--fresh")
    assert code == 0 and "begun/report.html" in out and "Error" not in err
    stamp = (folders / "begun" / "segmenter.safetensors").stat().st_mtime_ns
    assert namedmask(*command)[0] == 0 and (folders / "begun" / "segmenter.safetensors").stat().st_mtime_ns == stamp


# A run that goes well

def test_a_run_is_quiet_and_tells_what_matters(finished):
    run, (code, out, err) = finished
    assert code == 0 and "segmenter.safetensors" in out and "report.html" in out
    stages = [line for line in err.splitlines() if line.startswith("INFO: ")]     # err is no terminal: in place of bars a line as a stage begins and ends
    assert len(stages) == 2 * len(read_json(run / "state.json")["stages"]) and stages[0] == "INFO: retrieval begins" and "report is done after" in stages[-1]
    warnings = [line for line in err.splitlines() if line not in stages]
    assert len(warnings) == 1 and warnings[0].startswith("WARNING") and "zeppelin" in warnings[0]    # no bars, no chatter of libraries
    archive, state = read_json(run / "archive.json"), read_json(run / "state.json")
    assert {n: len(ps) for n, ps in archive.items()} == dict(guitar=4, mushroom=4, zeppelin=0) and all(Path(p).is_file() for ps in archive.values() for p in ps)
    assert {s["photo"]: s["stage"] for s in state["skipped"]} == {"empty.jpg": "retrieval", "notes.txt": "retrieval"}
    assert all(s["done"] and s["seconds"] >= 0 for s in state["stages"].values())
    assert "zeppelin" in (run / "report.html").read_text() and not list(run.rglob(".writing-*"))
    assert len(list((run / "masks" / "saliency").rglob("*.json"))) == 8


def test_a_run_knows_its_photographs_from_anywhere(finished):
    "It was made with a relative --images; its stages may be called from another folder."
    assert Path(yaml.safe_load((finished[0] / "config.yaml").read_text())["images"]).is_absolute()


def test_the_stages_of_a_finished_run(namedmask, finished, photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    run, stamp = finished[0], (finished[0] / "segmenter.safetensors").stat().st_mtime_ns
    for stage in ("retrieve", "saliency", "distill", "report"):
        code, out, err = namedmask(stage, "--run", run)
        assert code == 0 and "guitar" in out and not err, (stage, err)
    assert (run / "segmenter.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("format, endings", [("png", {".png", ".json"}), ("overlay", {".jpg"}), ("coco", {".json"}), ("npz", {".npz"})])
def test_predictions(namedmask, finished, photos, tmp_path, format, endings):
    code, out, err = namedmask("predict", "--run", finished[0], photos, "--out", tmp_path / "p", "--format", format)
    assert code == 0 and "8 photographs segmented" in out and "2 skipped" in out
    assert sorted(line.split(":")[0] for line in err.splitlines()) == ["skipped empty.jpg", "skipped notes.txt"]
    assert {p.suffix for p in (tmp_path / "p").rglob("*") if p.is_file()} == endings


def test_predictions_that_fail(namedmask, finished, photos, tmp_path):
    (tmp_path / "file").touch()
    for args, words in (([tmp_path / "gone.jpg", "--out", tmp_path / "p"], "gone.jpg"), ([photos, "--out", tmp_path / "file"], "file"),
                        ([photos / "empty.jpg", "--out", tmp_path / "p"], "0 bytes")):
        code, out, err = namedmask("predict", "--run", finished[0], *args)
        assert code == 1 and words in err and "Traceback" not in err and err.count("\n") == 1
    code, out, err = namedmask("predict", "--run", finished[0], photos, "--out", tmp_path / "p", "--format", "bmp")
    assert code == 2 and "bmp" in err                                                 # wrong use, as any other value that an option does not know


def test_an_evaluation(namedmask, finished, tmp_path):
    code, out, err = namedmask("evaluate", "--run", finished[0], "--benchmark", "demo", "--json", tmp_path / "s.json")
    assert code == 0 and "guitar" in out and not err
    scores = read_json(tmp_path / "s.json")
    assert {"miou", "miou_present", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "iou"} <= set(scores)
    assert scores | read_json(finished[0] / "state.json")["scores"]["demo"] == scores and (scores["benchmark"], scores["split"]) == ("demo", "val")
    code, out, err = namedmask("evaluate", "--run", finished[0], "--benchmark", "demo", "--limit", 2, "--json", tmp_path / "part.json")
    assert code == 0 and read_json(tmp_path / "part.json")["photos"] == 2 < scores["photos"]
    assert scores | read_json(finished[0] / "state.json")["scores"]["demo"] == scores         # a part does not take the place of the whole


def test_scores_are_not_lost_where_the_run_is_busy(namedmask, finished, tmp_path, caplog):
    from namedmask.core import locked
    with locked(finished[0]):
        code, out, err = namedmask("evaluate", "--run", finished[0], "--benchmark", "demo", "--json", tmp_path / "s.json")
    assert code == 0 and "guitar" in out and "not kept" in caplog.text and "miou" in read_json(tmp_path / "s.json")


@pytest.mark.parametrize("args, words", [("coco2017 --root gone", "gone"), ("coco2017", ""), ("imaginary --root .", "imaginary"), ("folder --root .", "")])
def test_evaluations_that_fail(namedmask, finished, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = namedmask("evaluate", "--run", finished[0], "--benchmark", *args.split())
    assert code == (2 if args in ("coco2017", "imaginary --root .") else 1) and not out and err.startswith("Error: ") and words in err and "Traceback" not in err    # may go on to say where to get it


def test_a_damaged_segmenter(namedmask, finished, photos, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "segmenter.safetensors").write_bytes((run / "segmenter.safetensors").read_bytes()[:5000])
    code, out, err = namedmask("predict", "--run", run, photos, "--out", tmp_path / "p")
    assert code == 1 and one_line(err) and "segmenter.safetensors" in err


def test_a_run_of_which_something_is_missing(namedmask, finished, photos, tmp_path):
    "What somebody took away or cut short is made again; what cannot be made again costs nothing else."
    run, home = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "photos"
    shutil.copytree(photos, home)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | dict(images=str(home))))
    assert namedmask("retrieve", "--run", run)[0] == namedmask("saliency", "--run", run)[0] == namedmask("distill", "--run", run)[0] == 0
    masks = sorted((run / "masks" / "saliency").rglob("*.json"))
    masks[0].unlink()
    assert namedmask("saliency", "--run", run)[0] == 0 and masks[0].exists()
    (run / "segmenter.safetensors").write_bytes((run / "segmenter.safetensors").read_bytes()[:5000])
    assert namedmask("distill", "--run", run)[0] == 0 and namedmask("predict", "--run", run, home, "--out", tmp_path / "p")[0] == 0
    weights = (run / "segmenter.safetensors").read_bytes()
    home.rename(tmp_path / "elsewhere")                                               # a disk that is not mounted
    for stage in ("retrieve", "saliency", "experts", "distill"):
        code, _, err = namedmask(stage, "--run", run)
        assert code == 1 and str(home) in err and one_line(err), stage
    home.mkdir()
    for stage in ("saliency", "experts", "distill"):
        code, _, err = namedmask(stage, "--run", run)
        assert code == 1 and "any more" in err and one_line(err), stage
    assert (run / "segmenter.safetensors").read_bytes() == weights and (run / "metrics.jsonl").exists()


def test_the_order_of_the_names_counts(namedmask, finished, photos):
    "It gives the label ids."
    code, _, err = namedmask("run", "--images", photos, "--names", "mushroom, guitar, zeppelin", "--out", finished[0], "--steps", 2, "--no-experts", "--n-images", 4)
    assert code == 1 and "order" in err and one_line(err)


@pytest.mark.parametrize("file, text", [("state.json", "[]"), ("state.json", '{"stages": []}'), ("state.json", '{"skipped": [1]}'), ("state.json", "{")])
def test_damaged_notes(namedmask, finished, tmp_path, file, text):
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / file).write_text(text)
    for command in ("retrieve", "report"):
        code, _, err = namedmask(command, "--run", run)
        assert code == 1 and file in err and one_line(err)


def test_a_run_folder_among_the_photographs(namedmask, photos, tmp_path):
    home = shutil.copytree(photos, tmp_path / "photos")
    (home / ("x" * 240 + ".jpeg")).write_bytes(next(home.rglob("0*.jpg")).read_bytes())     # and a name as long as it may be
    for _ in range(2):
        code, _, err = namedmask("run", "--images", home, "--names", "guitar, mushroom", "--out", home / "run", "--steps", 2, "--no-experts", "--n-images", 5)
        assert code == 0 and "Traceback" not in err
        assert sorted(s["photo"] for s in read_json(home / "run" / "state.json")["skipped"]) == ["empty.jpg", "notes.txt"]
    for format in ("png", "coco"): assert namedmask("predict", "--run", home / "run", home, "--out", tmp_path / format, "--format", format)[0] == 0


def test_ctrl_c(finished, photos, tmp_path):
    "Stopped in the training: 130, one line, and nothing half written."
    run = subprocess.Popen([*TERMINAL, "run", "--images", photos, "--names", "guitar, mushroom", "--out", tmp_path / "run", "--steps", "4000", "--no-experts"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # tests that run in the background inherit a deaf ear
    deadline = time.monotonic() + 200
    while run.poll() is None and time.monotonic() < deadline:
        state = tmp_path / "run" / "state.json"
        if state.exists() and "distill" in json.loads(state.read_text())["stages"]: break
        time.sleep(0.1)
    time.sleep(1.5)
    run.send_signal(signal.SIGINT)
    try: out, err = run.communicate(timeout=60)
    finally: run.kill()
    *before, last = err.splitlines()
    assert run.returncode == 130 and last == "Stopped. The same command goes on from here." and all(line.startswith("INFO: ") for line in before) and not out
    stages = read_json(tmp_path / "run" / "state.json")["stages"]
    assert stages["saliency"]["done"] and not stages["distill"]["done"] and stages["distill"]["seconds"] > 0
    assert not list((tmp_path / "run").rglob(".writing-*"))
