#!/usr/bin/env bash
# Runs a training command for a scheduler that treats exit code 0 as success:
#
#   launch/until_done.sh WORKDIR COMMAND ...
#
# SIGTERM is forwarded to the command, which saves a checkpoint and exits with 0. If WORKDIR then
# has no report.md, which only complete training writes, this script exits with 75: run it again.

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
parse_options "" "$@"
((${#rest[@]} > 1)) || fail "WORKDIR or the command is missing; see --help."
"${rest[@]:1}" &
children=($!)
forward_signals
wait_for "${children[0]}"
[[ -e ${rest[0]}/report.md ]] || exit 75
