#!/bin/bash
# down.sh: ends what up.sh has started, by pid, and takes its namespaces, cgroups and
# state away. Where nothing is up it does nothing.
set -uo pipefail
. "$(dirname "$0")/scripts/env.sh"
[[ -d $STATE ]] || exit 0
for f in "$STATE"/pid/*; do
  [[ -f $f ]] || continue
  pid=$(<"$f")
  # The process is unshare, which ignores SIGTERM; with it dies the init of the
  # namespaces, and with that one all that is in them. A pid may be another's by now.
  if grep -qF "$SCRIPTS" "/proc/$pid/cmdline" 2>/dev/null; then
    kill -9 "$pid"
    for _ in {1..50}; do [[ -d /proc/$pid ]] || break; sleep 0.1; done
  fi
done
sleep 0.5
ip netns del $NET 2>/dev/null
for ((i = 1; i <= NODES; i++)); do
  ip netns del "$(node $i)" 2>/dev/null
  for c in /sys/fs/cgroup/"$(node $i)" /sys/fs/cgroup/*/"$(node $i)"; do
    [[ -d $c ]] && find "$c" -depth -type d -exec rmdir {} \;
  done
done
for _ in {1..50}; do rm -rf "$STATE" 2>/dev/null && break; sleep 0.1; done
[[ ! -e $STATE ]] || { echo "$STATE can't be removed" >&2; exit 1; }
