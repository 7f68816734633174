#!/usr/bin/env bash
# Starts the launcher that this runner is named after: launchers/launch_${RUNNER_NAME%%_*}.sh.
#   CX_SKU CX_SUITE CX_BACKEND CX_NODES   what to run; the runner must be one of that SKU
#   CX_EXTRA   further options of the launcher, separated by blanks: no quotes, no shell
#   CX_OUT     folder for results and logs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh
for input in CX_SKU CX_SUITE CX_BACKEND CX_OUT; do name "$input"; done
number CX_NODES

runner=${CX_RUNNER:-$RUNNER_NAME}
serves=${runner%%_*}
launcher=launchers/launch_$serves.sh
[[ $serves == "$CX_SKU" ]] ||
  die "runner '$runner' serves '$serves', not '$CX_SKU'" "name runners <sku>_<anything> and give them the label <sku>"
[[ -f $launcher ]] || die "no launcher $launcher" "see launchers/ for the pools that have one"

extra=()
read -r -d '' -a extra <<<"${CX_EXTRA:-}" || true
for word in ${extra[@]+"${extra[@]}"}; do
  [[ $word =~ ^[A-Za-z0-9._,=:/+-]+$ ]] || die "extra option '$word' has characters that options do not need" \
    "letters, digits and . _ , = : / + - are taken"
  [[ ! $word =~ ^--(out|suite|sku|nodes|backend)(=|$) ]] || die "$word is an input of its own" "leave it out of extra"
done

arguments=(--suite "$CX_SUITE" --nodes "$CX_NODES" --out "$CX_OUT")
[[ $CX_BACKEND == all ]] || arguments+=(--backend "$CX_BACKEND")
exec bash "$launcher" "${arguments[@]}" ${extra[@]+"${extra[@]}"}
