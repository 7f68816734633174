# shellcheck shell=bash
# Sourced by the scripts of this folder.
# Inputs of a workflow arrive as environment variables: they are data here, never part of a command line.

die() {
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

# name VARIABLE: its value must look like the name of a SKU, suite or backend.
name() {
  [[ ${!1:-} =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "$1 is not a name: '${!1:-}'" "choose one that is offered"
}

# number VARIABLE: its value must be a whole number from 1.
number() {
  [[ ${!1:-} =~ ^[1-9][0-9]{0,3}$ ]] || die "$1 is not a whole number from 1: '${!1:-}'" "for example 2"
}
