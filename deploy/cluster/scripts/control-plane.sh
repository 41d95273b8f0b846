#!/bin/bash
# Init of the control plane's namespaces: etcd, API server, controller manager and
# scheduler.
. "$(dirname "$0")/env.sh"
trap 'exit 0' TERM
keep etcd "$BIN/etcd" --name pc --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn \
  --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
  --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
  --initial-cluster pc=http://127.0.0.1:2380
keep kube-apiserver "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 \
  --bind-address=0.0.0.0 --secure-port=6443 --advertise-address=$NODE_NET.1 \
  --service-cluster-ip-range=$SERVICES --allow-privileged=true --authorization-mode=Node,RBAC \
  --client-ca-file="$PKI/ca.crt" --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
  --kubelet-client-certificate="$PKI/apiserver-kubelet-client.crt" --kubelet-client-key="$PKI/apiserver-kubelet-client.key" \
  --kubelet-preferred-address-types=InternalIP \
  --service-account-issuer=https://kubernetes.default.svc.cluster.local \
  --service-account-key-file="$PKI/sa.pub" --service-account-signing-key-file="$PKI/sa.key"
until "$BIN/kubectl" --kubeconfig "$PKI/admin.kubeconfig" get --raw /readyz >/dev/null 2>&1; do sleep 0.2; done
# With the default of 20 requests a second the start-up crawls.
fast="--leader-elect=false --kube-api-qps=500 --kube-api-burst=1000 --bind-address=127.0.0.1"
as() { echo "--kubeconfig=$PKI/$1.kubeconfig --authentication-kubeconfig=$PKI/$1.kubeconfig --authorization-kubeconfig=$PKI/$1.kubeconfig"; }
keep kube-controller-manager "$BIN/kube-controller-manager" $(as kube-controller-manager) $fast --use-service-account-credentials \
  --service-account-private-key-file="$PKI/sa.key" --root-ca-file="$PKI/ca.crt" \
  --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key" \
  --allocate-node-cidrs=false --service-cluster-ip-range=$SERVICES
keep kube-scheduler "$BIN/kube-scheduler" $(as kube-scheduler) $fast
while :; do sleep 3600 & wait $!; done
