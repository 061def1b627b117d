"Notebooks are committed clean and with their outputs, and the package is what they export."
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project, cleaned and exported afresh."
    root = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT / name, root / name)
    for name in ("nbs", "namedmask"): shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    env = os.environ | dict(PYTHONPATH=str(root), PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for command in ("nbdev_clean", "nbdev_export"): subprocess.run([Path(sys.executable).parent / command], cwd=root, env=env, check=True, capture_output=True)
    return root


def test_there_are_notebooks(): assert len(NOTEBOOKS) > 15


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(copy, path): assert (copy / "nbs" / path.name).read_bytes() == path.read_bytes(), "run nbdev_clean"


def test_the_package_is_in_step_with_the_notebooks(copy):
    ours, fresh = ({p.relative_to(d): p.read_text() for p in (d / "namedmask").rglob("*.py")} for d in (ROOT, copy))
    assert set(ours) == set(fresh), "run nbdev_export"
    assert [str(p) for p in ours if ours[p] != fresh[p]] == [], "run nbdev_export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_its_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    shown = [c for c in cells if c["cell_type"] == "code" and c["outputs"]]
    assert shown, "run the notebook and save it with its outputs"
    assert not [o for c in shown for o in c["outputs"] if o["output_type"] == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_imports_only_from_lower_ones(path):
    number = {json_export(p): p.name for p in NOTEBOOKS if json_export(p)}
    mine = path.name if path.stem != "index" else "~"
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        for line in "".join(cell["source"]).splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "from" and words[1].startswith("namedmask."):
                assert number[words[1].split(".")[1]] < mine, line


def json_export(path):
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if source.startswith("#| default_exp"): return source.split()[2]
