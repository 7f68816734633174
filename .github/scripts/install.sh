#!/usr/bin/env bash
# CollectiveX in an environment of this job alone; its programs come first on PATH in the steps that follow.
#   install.sh [EXTRA]   EXTRA: an extra of the package, for example cpu (with torch)
#   RUNNER_TEMP GITHUB_PATH   from GitHub
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "error: Python 3.10 or newer is needed; this is $(python3 --version)" >&2; exit 2; }
python3 -m venv --clear "$RUNNER_TEMP/collectivex"
"$RUNNER_TEMP/collectivex/bin/python" -m pip install --quiet --disable-pip-version-check ".${1:+[$1]}"
echo "$RUNNER_TEMP/collectivex/bin" >>"$GITHUB_PATH"
