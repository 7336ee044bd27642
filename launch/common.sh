#!/usr/bin/env bash
# What the launch scripts share: their options and help, commands that --dry_run only prints, and
# children that signals are passed on to. They work in the repository's root.

dry_run=false
rest=()
children=()

# The comment at the head of the script.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "launch/$(basename "$0")"; }

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# parse_options "a b" "$@": --a X or --a=X sets the variable `a`. What comes after `--`, or from the
# first argument on that is no option, goes to `rest`.
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
    [[ $known == *" $option "* ]] || fail "unknown option $1; --help shows all."
    if [[ $1 == *=* ]]; then
      printf -v "$option" %s "${1#*=}"
    else
      (($# > 1)) || fail "$1 lacks its value."
      printf -v "$option" %s "$2" && shift
    fi
    shift
  done
  rest=("$@")
}

# required a b: these options must have been given.
required() {
  local option
  for option in "$@"; do
    [[ -n ${!option} ]] || fail "--$option is missing; --help shows all."
  done
}

# A command as a line that a shell reads back.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

execute() {
  if $dry_run; then quoted "$@"; else "$@"; fi
}

# From now on, SIGTERM and Ctrl-C go to the processes `children`.
forward_signals() {
  local signal
  for signal in TERM INT; do
    # shellcheck disable=SC2064  # the name is this turn's
    trap "interrupted=true; kill -$signal \"\${children[@]}\" 2>/dev/null || true" "$signal"
  done
}

# wait_for PID: returns that child's exit code, when it has really ended.
wait_for() {
  local code interrupted=true
  while $interrupted; do # a signal ends `wait`, not the child
    interrupted=false code=0
    wait "$1" || code=$?
  done
  return "$code"
}
