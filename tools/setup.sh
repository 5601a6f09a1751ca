# Sourced by tools/demo and tools/test. Makes .venv next to pyproject.toml if it is missing or out of date, and puts it
# first on PATH. Needs Python 3.11 or newer as `python3` or as $PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/installed-from
wanted=$(cat pyproject.toml tools/constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qsvd needs Python 3.11 or newer; set PYTHON to one")'
  echo "installing qsvd and its dependencies into .venv (once, some minutes)" >&2
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt --editable '.[dev]'
  echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
