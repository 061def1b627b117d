"What the tests share: the demo world, and the reference data where they are at hand."
import os
from pathlib import Path

import pytest

from namedmask.demo import load_world

SHARED = Path(os.environ.get("NAMEDMASK_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared():
    "The folder of reference data; a test that asks for it is skipped where there is none."
    if not SHARED.is_dir(): pytest.skip(f"no reference data: {SHARED} is not there (set NAMEDMASK_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def world(): return load_world()
