#!/bin/bash
# node.sh I: init of node I's namespaces: containerd, kubelet and kube-proxy.
. "$(dirname "$0")/env.sh"
i=$1 name=$(node "$1") dir=$STATE/$(node "$1")
trap 'exit 0' TERM
hostname "$name"

# A /sys of this network namespace, with the cgroups that were in the old one. (ip
# netns exec would hide them.)
mkdir -p "$dir/cgroup"
mount --rbind /sys/fs/cgroup "$dir/cgroup"
umount -R -l /sys
mount -t sysfs sysfs /sys
mount --rbind "$dir/cgroup" /sys/fs/cgroup
umount -R "$dir/cgroup"
mount -t tmpfs tmpfs /run
for d in /var/lib/kubelet /var/lib/containerd /var/lib/cni /etc/cni /var/log/pods /var/log/containers /var/log/portcullis; do
  mkdir -p "$d" "$dir$d"
  mount --bind "$dir$d" "$d"
done
mount --make-rshared / # not earlier: then the umount above would reach the machine's /sys

# What the iptables command is on this node, for kubelet, kube-proxy and CNI plugins.
cp -a /etc/alternatives "$dir/alternatives"
for c in iptables ip6tables; do
  for suffix in "" -save -restore; do ln -sfn "/usr/sbin/$c-$IPTABLES$suffix" "$dir/alternatives/$c$suffix"; done
done
mount --bind "$dir/alternatives" /etc/alternatives

# The kubelet's root cgroup, one per node. In version 1 each hierarchy needs it, and
# a new cpuset is empty; in version 2 its controllers have to be passed down.
if [[ -f /sys/fs/cgroup/cgroup.controllers ]]; then
  for c in $(</sys/fs/cgroup/cgroup.controllers); do echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control; done
  mkdir -p "/sys/fs/cgroup/$name"
else
  for c in /sys/fs/cgroup/*/; do
    [[ -f $c/cgroup.controllers ]] && continue
    mkdir -p "$c/$name"
    for f in cpuset.cpus cpuset.mems; do [[ -f $c/$f ]] && cat "$c/$f" >"$c/$name/$f"; done
  done
fi

case $CNI in
  ptp) type='"type": "ptp", "ipMasq": false' ;;
  # isDefaultGateway would want a default route that there isn't.
  bridge) type='"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": false' ;;
esac
ranges="[{\"subnet\": \"10.244.$i.0/24\"}]" routes='{"dst": "0.0.0.0/0"}' addresses=$NODE_NET.$((10 + i))
if [[ $DUAL = 1 ]]; then
  ranges+=", [{\"subnet\": \"fd00:244:$i::/64\"}]" routes+=', {"dst": "::/0"}' addresses+=,$NODE_NET6:$((10 + i))
fi
mkdir -p /etc/cni/net.d
cat >/etc/cni/net.d/10-pc.conflist <<C
{"cniVersion": "0.4.0", "name": "pc", "plugins": [
  {$type, "ipam": {"type": "host-local", "ranges": [$ranges], "routes": [$routes]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
C
cni=/usr/lib/cni; [[ -d $cni ]] || cni=/opt/cni/bin
# restrict_oom_score_adj: where CAP_SYS_RESOURCE is missing runc can't lower the score.
cat >"$dir/containerd.toml" <<C
version = 2
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.10.2"
  stream_server_address = "127.0.0.1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
C
: >"$dir/resolv.conf"
cat >"$dir/kubelet.yaml" <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$name
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $PKI/$name.crt
tlsPrivateKeyFile: $PKI/$name.key
clusterDomain: cluster.local
clusterDNS: [10.96.0.10]
resolvConf: $dir/resolv.conf
failSwapOn: false
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
syncFrequency: 10s
maxPods: 200
C
# Limits of conntrack are sysctls that a network namespace can't write.
cat >"$dir/kube-proxy.yaml" <<C
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: $PROXY
clientConnection: {kubeconfig: $PKI/kube-proxy.kubeconfig}
hostnameOverride: $name
clusterCIDR: "$PODS"
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
C

keep "$name-containerd" containerd --config "$dir/containerd.toml"
until ctr version >/dev/null 2>&1; do sleep 0.1; done
for image in "$BIN"/images/*-"$ARCH".tar; do
  [[ -f $image ]] && ctr -n k8s.io images import "$image" >>"$LOG/$name-images.log" 2>&1
done
keep "$name-kubelet" "$BIN/kubelet" --config "$dir/kubelet.yaml" --kubeconfig "$PKI/$name.kubeconfig" \
  --hostname-override "$name" --node-ip "$addresses" --v=2
keep "$name-kube-proxy" "$BIN/kube-proxy" --config "$dir/kube-proxy.yaml"
while :; do sleep 3600 & wait $!; done
