"""What the lower floors load: torch and NumPy, and no library that takes seconds, until a function needs it."""

import subprocess
import sys
from pathlib import Path

import qsvd

HEAVY = {"bitsandbytes", "scipy", "transformers", "datasets", "triton"}
PACKAGE = Path(qsvd.__file__).parent


def test_the_lower_floors_load_no_heavy_library():
    """kernels.py is apart: it is Triton's."""
    files = [path for floor in ("numerics", "decompose", "plan") for path in (PACKAGE / floor).glob("*.py")]
    modules = [f"qsvd.{path.parent.name}.{path.stem}" for path in files if path.stem not in ("__init__", "kernels")]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert set(modules) <= loaded
    assert loaded & HEAVY == set()
