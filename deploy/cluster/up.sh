#!/bin/bash
# up.sh: a real Kubernetes cluster on this machine, in network namespaces without a
# way out, as root. Settings: NODES=2 CNI=ptp|bridge PROXY=iptables|nftables
# IPTABLES=nft|legacy (what the nodes' iptables command is) DUAL=1|0
set -euo pipefail
. "$(dirname "$0")/scripts/env.sh"
[[ $NODES =~ ^[0-9]{1,2}$ ]] || { echo "NODES=$NODES: want a number below 100" >&2; exit 1; }
[[ $DUAL = 0 || $DUAL = 1 ]] || { echo "DUAL=$DUAL: want 0 or 1" >&2; exit 1; }
[[ $CNI = ptp || $CNI = bridge ]] || { echo "CNI=$CNI: want ptp or bridge" >&2; exit 1; }
[[ $PROXY = iptables || $PROXY = nftables ]] || { echo "PROXY=$PROXY: want iptables or nftables" >&2; exit 1; }
[[ $IPTABLES = nft || $IPTABLES = legacy ]] || { echo "IPTABLES=$IPTABLES: want nft or legacy" >&2; exit 1; }
[[ ! -d $STATE ]] || { echo "a cluster is up: make cluster-down first" >&2; exit 1; }
mkdir -p "$STATE/pid" "$LOG" "$STATE/etcd"
declare -p NODES CNI PROXY IPTABLES DUAL >"$STATE/settings"
trap 'echo "the cluster did not come up; see $LOG, then make cluster-down" >&2' ERR
say() { printf '%3ss  %s\n' "$SECONDS" "$*"; }

network() {
  ip netns add $NET
  ip -n $NET link set lo up
  ip -n $NET link add br0 type bridge
  ip -n $NET addr add $NODE_NET.1/24 dev br0
  ip -n $NET link set br0 up
  [[ $DUAL = 0 ]] || ip -n $NET addr add $NODE_NET6:1/64 dev br0 nodad
  local i j n
  for ((i = 1; i <= NODES; i++)); do
    n=$(node $i)
    ip netns add "$n"
    ip -n "$n" link set lo up
    ip -n "$n" link add eth0 type veth peer name "v$i" netns $NET
    ip -n $NET link set "v$i" master br0 up
    ip -n "$n" addr add $NODE_NET.$((10 + i))/24 dev eth0
    [[ $DUAL = 0 ]] || ip -n "$n" addr add $NODE_NET6:$((10 + i))/64 dev eth0 nodad
    ip -n "$n" link set eth0 up
    inside "$n" sysctl -qw net.ipv4.ip_forward=1
    [[ $DUAL = 0 ]] || inside "$n" sysctl -qw net.ipv6.conf.all.forwarding=1
  done
  for ((i = 1; i <= NODES; i++)); do
    n=$(node $i)
    # Without a route a Service's address isn't even looked at; .1 forwards nothing.
    ip -n "$n" route add 10.96.0.0/16 via $NODE_NET.1
    [[ $DUAL = 0 ]] || ip -n "$n" route add fd00:96::/112 via $NODE_NET6:1
    ip -n $NET route add "10.244.$i.0/24" via $NODE_NET.$((10 + i))
    [[ $DUAL = 0 ]] || ip -n $NET route add "fd00:244:$i::/64" via $NODE_NET6:$((10 + i))
    for ((j = 1; j <= NODES; j++)); do
      ((j != i)) || continue
      ip -n "$n" route add "10.244.$j.0/24" via $NODE_NET.$((10 + j))
      [[ $DUAL = 0 ]] || ip -n "$n" route add "fd00:244:$j::/64" via $NODE_NET6:$((10 + j))
    done
  done
}

network
"$SCRIPTS/certs.sh"
own control-plane $NET "$SCRIPTS/control-plane.sh"
try 120 kubectl get --raw /readyz
say "the API server is ready"
for ((i = 1; i <= NODES; i++)); do own "$(node $i)" "$(node $i)" "$SCRIPTS/node.sh" $i; done
try 120 kubectl get serviceaccount default
for ((i = 1; i <= NODES; i++)); do try 120 kubectl get node "$(node $i)"; done
((NODES == 0)) || kubectl wait --for=condition=Ready node --all --timeout=180s >/dev/null
say "$NODES nodes are ready: CNI $CNI, kube-proxy $PROXY, iptables $IPTABLES, $([[ $DUAL = 1 ]] && echo dual stack || echo IPv4)"
echo "deploy/cluster/kubectl is kubectl for it, deploy/cluster/on I COMMAND runs something on node I, make cluster-down ends it."
