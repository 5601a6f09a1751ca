"""tools/ is no package: its modules are imported as its scripts import them, from their own folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
