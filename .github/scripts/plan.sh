#!/usr/bin/env bash
# What a sweep will start: one job for each backend that has a cell to run, from `cx plan`.
#   CX_SKU CX_SUITE CX_NODES   what was asked for
#   CX_BACKEND                 one backend, or "all": those that the suite chooses
#   GITHUB_OUTPUT              gets the line matrix={"include":[{"backend":...,"cells":...},...]}
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh
name CX_SKU
name CX_SUITE
name CX_BACKEND
number CX_NODES

plan=(plan --sku "$CX_SKU" --suite "$CX_SUITE" --nodes "$CX_NODES")
[[ $CX_BACKEND == all ]] || plan+=(--backend "$CX_BACKEND")
cells=$("${CX:-cx}" "${plan[@]}" --format json)
matrix=$(python3 .github/scripts/shards.py <<<"$cells")
echo "$matrix" >>"$GITHUB_OUTPUT"
