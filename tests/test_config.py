"Settings from files, from the command line and for the rows of the paper."
import shutil, subprocess, sys

import pytest, yaml
from dataclasses import replace

from namedmask.cli import app
from namedmask.config import (CONFIGS, Settings, config_names, load_config, make_settings, parse_overrides, read_config, resolve, settings_of,
                              write_config)
from namedmask.core import UserError
from typer.testing import CliRunner

ROWS = ["cityscapes", "coca", "coco2017", "imagenet_s50", "imagenet_s300", "imagenet_s919", "voc2012"]


def test_every_published_row_has_its_two_files():
    assert set(config_names()) == {*ROWS, *(f"{r}_no_experts" for r in ROWS)}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_the_papers_hyperparameters(row):
    for name, experts in (row, True), (f"{row}_no_experts", False):
        s = resolve(make_settings(load_config(name)), "cpu")
        assert (s.stack, s.n_images, s.experts, s.arch, s.backbone) == ("paper", 500, experts, "resnet50", "dino_resnet50")
        assert (s.steps, s.crop, s.bs, s.lr, s.backbone_lr, s.scale, s.max_n_masks, s.jitter, s.eval_every) == (20_000, 384, 16, 5e-4, 5e-5, (0.1, 1.0), 2, 1.0, 1000)
        assert (s.expert_steps, s.expert_bs, s.warm_steps, s.negatives, s.background, s.views, s.edges) == (5000, 8, 0, 0, 1, None, None)
        assert s.ignore == (1000 if row.startswith("imagenet") else 255) and s.benchmark == row


def test_a_run_of_the_paper_stack_without_a_configuration_has_the_same_recipe():
    theirs, ours = resolve(make_settings(load_config("voc2012")), "cpu"), resolve(Settings(stack="paper"), "cuda")
    assert all(getattr(theirs, k) == getattr(ours, k) for k in ("steps", "lr", "expert_steps", "scale", "arch", "encoder", "selfmask"))


def test_wrong_keys_and_types_are_refused_by_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: voc2012\nstepz: 3\ncrop: wide\nexperts: 1\nscale: [0.1]\nseed: true\n")
    with pytest.raises(UserError) as error: load_config(tmp_path / "mine.yaml")
    for word in ("mine.yaml", "'stepz'", '"steps"', "crop is 'wide'", "experts is 1", "scale is [0.1]", "seed is True"): assert word in str(error.value), word


@pytest.mark.parametrize("text, says", [("", "no settings"), ("- a\n- b\n", "no settings"), ("steps: [1", "cannot be read"), ("base: nowhere\nsteps: 3\n", "no configuration")])
def test_a_broken_file_is_named(tmp_path, text, says):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says): load_config(path)


def test_an_unknown_configuration_lists_the_known_ones():
    with pytest.raises(UserError, match="coca_no_experts"): load_config("vok2012")
    with pytest.raises(UserError, match="no configuration file"): load_config("elsewhere/x.yaml")


def test_a_file_of_ones_own_may_build_on_a_row(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: coca_no_experts\nsteps: 7\n")
    s = make_settings(load_config(tmp_path / "mine.yaml"))
    assert (s.benchmark, s.experts, s.steps, s.crop) == ("coca", False, 7, 384)


def test_overrides_win_and_names_come_from_the_benchmark(tmp_path):
    s = settings_of("coca", tmp_path, benchmark="demo", steps=9)
    assert s.steps == 9 and s.images == str(tmp_path / "ImageNet2012/train") and "penguin" in s.names
    assert list(settings_of("coca", tmp_path, names={"cat": ["cat"]}).names) == ["cat"]
    assert settings_of("coca", tmp_path, names={"cat": ["cat"]}, images="/elsewhere").images == "/elsewhere"


def test_overrides_are_read_as_yaml():
    assert parse_overrides(["lr=1e-3", "scale=[0.2, 1]", "archive=null", "arch=resnet101"]) == dict(lr="1e-3", scale=[0.2, 1], archive=None, arch="resnet101")
    assert make_settings(dict(lr="1e-3", scale=["1e-1", 1])).scale == (0.1, 1) and make_settings(dict(lr="1e-3")).lr == 1e-3
    for bad in ("steps", "=3", "steps=[1"):
        with pytest.raises(UserError, match="--set"): parse_overrides([bad])


def test_a_config_is_what_was_written(tmp_path):
    s = resolve(Settings(images="photos", names={"naïve": ["naïve"]}, scale=(0.3, 1.5)), "cpu")
    write_config(tmp_path / "config.yaml", s)
    assert read_config(tmp_path / "config.yaml") == s
    values = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | dict(crop="big")))
    with pytest.raises(UserError, match="crop is 'big'"): read_config(tmp_path / "config.yaml")


def test_the_files_are_part_of_the_package(tmp_path):
    root = CONFIGS.parents[1]
    for name in ("setup.py", "settings.ini", "README.md"): shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "namedmask", tmp_path / "namedmask", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"], cwd=tmp_path, check=True, capture_output=True)
    assert {p.name for p in (tmp_path / "built/namedmask/configs").iterdir()} == {p.name for p in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("args, code, says", [
    (["run", "--config", "nothing", "--root", ".", "--out", "r"], 2, "no configuration"),
    (["run", "--config", "voc2012", "--root", "nowhere", "--out", "r"], 1, "voc2012 is not complete"),
    (["run", "--config", "coca", "--root", "nowhere", "--names", "cat", "--set", "stepz=3", "--out", "r"], 2, "no setting stepz"),
    (["run", "--config", "coca", "--root", "nowhere", "--names", "cat", "--out", "r"], 1, "no folder of photographs"),
    (["run", "--out", "r"], 2, "--config"),
    (["run", "--images", ".", "--names", "cat", "--stack", "papre", "--out", "r"], 2, "no stack")])
def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch, args, code, says):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, args)
    assert result.exit_code == code and says in " ".join(result.output.split()), result.output


def test_a_file_that_is_its_own_base(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b\n")
    (tmp_path / "b.yaml").write_text("base: a\n")
    with pytest.raises(UserError, match="own base"): load_config(tmp_path / "a.yaml")


def test_a_setting_that_an_older_run_does_not_know_makes_it_no_other(tmp_path):
    from namedmask.pipeline import digest, wishes
    s = resolve(Settings(images="photos", names={"a": ["a"], "b": ["b"]}), "cpu")
    assert s.encoder is None and wishes(s).keys() == {k for k, v in vars(s).items() if v is not None}        # as if there were no such setting
    assert digest(wishes(s)) != digest(wishes(replace(s, encoder="ViT-B-32"))) and digest(wishes(s)) == digest(wishes(replace(s, version="9")))
    assert digest(wishes(s)) != digest(wishes(replace(s, names={"b": ["b"], "a": ["a"]})))
