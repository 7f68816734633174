#!/usr/bin/env bash
# Appends the table to the job summary. The exit code is the gate's: it decides the colour of the job.
#   CX_OUT                folder with the results
#   GITHUB_STEP_SUMMARY   gets the table; GitHub takes 1 MiB of it
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 3
source .github/scripts/lib.sh
name CX_OUT

limit=1000000
table=$(mktemp)
trap 'rm -f "$table"' EXIT
"${PYTHON:-python3}" summarize.py "$CX_OUT" --format markdown >"$table"
code=$?
if (($(wc -c <"$table") > limit)); then
  head -c "$limit" "$table" >>"$GITHUB_STEP_SUMMARY"
  printf '\n\nThe table is longer than GitHub shows; the uploaded results hold all of it.\n' >>"$GITHUB_STEP_SUMMARY"
else
  cat "$table" >>"$GITHUB_STEP_SUMMARY"
fi
[[ -s $table ]] || echo "No table: see the log of this job (exit code $code)." >>"$GITHUB_STEP_SUMMARY"
exit "$code"
