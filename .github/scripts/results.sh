#!/usr/bin/env bash
# Validates everything under results/. An empty folder claims nothing and is no error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -z $(find results -type f -print -quit 2>/dev/null) ]]; then
  echo "nothing is published under results/"
  exit 0
fi
exec "${CX:-cx}" validate --published results
