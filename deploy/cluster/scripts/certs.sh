#!/bin/bash
# A CA, a certificate and a kubeconfig for each component, and the key that signs
# service accounts' tokens.
set -euo pipefail
. "$(dirname "$0")/env.sh"
mkdir -p "$PKI"; cd "$PKI"
key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"; }
sign() { # NAME SUBJECT [SUBJECT ALTERNATIVE NAMES]
  key "$1"
  openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out "$1.crt" -extfile <(
    printf 'keyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=clientAuth,serverAuth\n%s\n' "${3:+subjectAltName=$3}") 2>/dev/null
}
config() { # NAME
  cat >"$1.kubeconfig" <<K
apiVersion: v1
kind: Config
clusters: [{name: pc, cluster: {server: "$API", certificate-authority: $PKI/ca.crt}}]
users: [{name: $1, user: {client-certificate: $PKI/$1.crt, client-key: $PKI/$1.key}}]
contexts: [{name: pc, context: {cluster: pc, user: $1}}]
current-context: pc
K
}
client() { sign "$@"; config "$1"; }

key ca
openssl req -x509 -new -key ca.key -subj /CN=portcullis-test-ca -days 365 -out ca.crt
openssl genrsa -out sa.key 2048 2>/dev/null
openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
sign apiserver /CN=kube-apiserver "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1,IP:$NODE_NET.1,IP:10.96.0.1"
sign apiserver-kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client
client admin /O=system:masters/CN=admin
client kube-controller-manager /CN=system:kube-controller-manager
client kube-scheduler /CN=system:kube-scheduler
client kube-proxy /CN=system:kube-proxy
for ((i = 1; i <= NODES; i++)); do
  client "$(node $i)" "/O=system:nodes/CN=system:node:$(node $i)" "DNS:$(node $i),IP:$NODE_NET.$((10 + i))"
done
