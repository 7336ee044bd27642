#!/usr/bin/env bash
# Runs a training command for a scheduler that takes exit code 0 as done:
#
#   launch/until_done.sh WORKDIR COMMAND ...
#
# SIGTERM is passed on to the command, which saves and ends with 0. Where WORKDIR has no report.md
# then, which the end of training writes, this ends with 75: to be run again.

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
parse_options "" "$@"
((${#rest[@]} > 1)) || fail "WORKDIR and a command are missing; --help shows all."
"${rest[@]:1}" &
children=($!)
forward_signals
wait_for "${children[0]}"
[[ -e ${rest[0]}/report.md ]] || exit 75
