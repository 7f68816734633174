#!/usr/bin/env bash
#SBATCH --job-name=collectivex
#SBATCH --output=%x-%j.log
#SBATCH --no-requeue
#SBATCH --signal=B:TERM@60
#SBATCH --nodes=1
#SBATCH --time=240
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
# 8 x AMD Instinct MI325X of one node over Infinity Fabric, Slurm

# Slurm runs a copy of this file in its spool folder, and knows where it came from.
set -euo pipefail
cx_here=${BASH_SOURCE[0]%/*}
if [[ ! -f $cx_here/common.sh && -n ${CX_ROOT:-} ]]; then
  cx_here=$CX_ROOT/launchers
elif [[ ! -f $cx_here/common.sh && -n ${SLURM_JOB_ID:-} ]]; then
  cx_here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/launch_[a-z0-9-]*\.sh.*|\1|p')
fi
if [[ ! -f $cx_here/common.sh ]]; then
  echo "error: cannot find the checkout that launch_mi325x-amds.sh belongs to" >&2
  echo "hint: CX_ROOT=/path/to/the/checkout" >&2
  exit 2
fi
# shellcheck source=launchers/common.sh
source "$cx_here/common.sh" mi325x-amds "$@"
