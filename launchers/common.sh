# shellcheck shell=bash
# What every launch_<sku>.sh hands over to: `source common.sh SKU ARGUMENTS...`. Finds a Python for the host half
# and becomes `cx launch`. Nothing is decided here: the facts are in skus/, the flow is in runtime/launch.py.
#
#   CX_PYTHON   the Python to use; default: .venv of the checkout, else python3
set -euo pipefail

cx_sku=$1
shift
cx_root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

cx_python=${CX_PYTHON:-}
if [[ -z $cx_python && -x $cx_root/.venv/bin/python ]]; then
  cx_python=$cx_root/.venv/bin/python
fi
cx_python=${cx_python:-python3}
if ! command -v -- "$cx_python" >/dev/null; then
  echo "error: there is no Python $cx_python here" >&2
  echo "hint: CX_PYTHON=/path/to/python, or \`make bench\` in $cx_root makes .venv" >&2
  exit 2
fi

cx_program='import sys; sys.path.insert(0, sys.argv.pop(1)); from collectivex.runtime.cli import main; sys.exit(main())'
exec "$cx_python" -c "$cx_program" "$cx_root" launch --sku "$cx_sku" "$@"
