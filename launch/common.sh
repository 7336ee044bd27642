#!/usr/bin/env bash
# Shared by the launch scripts: option parsing and help, commands that --dry_run only prints, and
# forwarding of signals to child processes. The scripts run in the repository's root.

dry_run=false
rest=()
children=()

# Prints the comment at the top of the script.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "launch/$(basename "$0")"; }

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# parse_options "a b" "$@": --a X or --a=X sets the variable `a`. Arguments after `--`, or from the
# first one that is not an option, go to `rest`.
parse_options() {
  local known=" $1 " option
  shift
  while (($#)) && [[ $1 == -* ]]; do
    case "$1" in
      --) shift && break ;;
      -h | --help) usage && exit 0 ;;
      --dry_run) dry_run=true && shift && continue ;;
    esac
    option=${1#--} && option=${option%%=*}
    [[ $known == *" $option "* ]] || fail "unknown option $1; see --help."
    if [[ $1 == *=* ]]; then
      printf -v "$option" %s "${1#*=}"
    else
      (($# > 1)) || fail "$1 needs a value."
      printf -v "$option" %s "$2" && shift
    fi
    shift
  done
  rest=("$@")
}

# required a b: fails unless these options were given.
required() {
  local option
  for option in "$@"; do
    [[ -n ${!option} ]] || fail "--$option is missing; see --help."
  done
}

# Prints a command, quoted for the shell.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

execute() {
  if $dry_run; then quoted "$@"; else "$@"; fi
}

# From now on, forwards SIGTERM and Ctrl-C to the processes in `children`.
forward_signals() {
  local signal
  for signal in TERM INT; do
    # shellcheck disable=SC2064  # expand $signal now, not when the trap runs
    trap "interrupted=true; kill -$signal \"\${children[@]}\" 2>/dev/null || true" "$signal"
  done
}

# wait_for PID: waits until that child has exited, and returns its exit code.
wait_for() {
  local code interrupted=true
  while $interrupted; do # a signal interrupts `wait` before the child has exited
    interrupted=false code=0
    wait "$1" || code=$?
  done
  return "$code"
}
