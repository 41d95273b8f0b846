# What all scripts share; source it. up.sh's settings come from the environment,
# those of a running cluster from its state.
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
SCRIPTS=$REPO/deploy/cluster/scripts
BIN=$REPO/.bin
STATE=$REPO/.cluster # all state of a running cluster; down.sh removes it
PKI=$STATE/pki
LOG=$STATE/log
ARCH=$(dpkg --print-architecture)
: "${NODES:=2}" "${CNI:=ptp}" "${PROXY:=iptables}" "${IPTABLES:=nft}" "${DUAL:=1}"
[[ -f $STATE/settings ]] && . "$STATE/settings"

# Node i is the network namespace pc-n<i>, with address .(10+i) of NODE_NET and,
# if DUAL, ::(10+i) of NODE_NET6; its pods are 10.244.i.0/24 and fd00:244:i::/64.
# The control plane is pc-net, address .1; it is the switch between the nodes too.
NET=pc-net
node() { echo "pc-n$1"; }
NODE_NET=172.30.99 NODE_NET6=fd00:172:
PODS=10.244.0.0/16 SERVICES=10.96.0.0/16
if [[ $DUAL = 1 ]]; then PODS+=,fd00:244::/32 SERVICES+=,fd00:96::/112; fi
API=https://$NODE_NET.1:6443

inside() { local netns=$1; shift; nsenter --net="/run/netns/$netns" "$@"; }
kubectl() { inside $NET "$BIN/kubectl" --kubeconfig "$PKI/admin.kubeconfig" "$@"; }

# keep NAME COMMAND... runs a program in the background and again whenever it ends.
keep() {
  local name=$1; shift
  ( while :; do "$@" >>"$LOG/$name.log" 2>&1; echo "$name ended with $? at $(date +%T)" >>"$LOG/restarts.log"; sleep 1; done ) &
}

# own NAME NETNS COMMAND... runs a script as init of a pid, mount, uts and ipc
# namespace of its own. Its end is the end of all that it has started.
own() {
  local name=$1 netns=$2; shift 2
  setsid nsenter --net="/run/netns/$netns" unshare --mount --pid --uts --ipc --fork --kill-child --mount-proc "$@" \
    >"$LOG/$name-init.log" 2>&1 </dev/null &
  echo $! >"$STATE/pid/$name"
}

# try SECONDS COMMAND... tries a command until it succeeds.
try() {
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS > end)); then echo "gave up: $*; see $LOG" >&2; "$@"; return 1; fi
    sleep 0.2
  done
}
