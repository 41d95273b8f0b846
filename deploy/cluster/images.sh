#!/bin/bash
# images.sh: the images that the cluster itself and its tests need, into .bin/images:
# the sandboxes' pause, and upstream's agnhost and busybox, without a registry.
set -euo pipefail
. "$(dirname "$0")/scripts/env.sh"
export CGO_ENABLED=0
work=$BIN/cluster-images
mkdir -p "$work" "$BIN/images"
go build -C "$REPO/deploy/image" -o "$BIN/image" .
go build -C "$REPO/deploy/cluster" -trimpath -ldflags '-s -w' -o "$work/pause" ./pause
if [[ ! -x $work/busybox/bin/busybox ]]; then
  get() { apt-get download -q -o APT::Sandbox::User=root busybox-static; }
  (cd "$work" && { get 2>/dev/null || { apt-get update -q && get; }; } && dpkg-deb -x busybox-static_*.deb busybox)
fi
busybox=$work/busybox/bin/busybox
links=()
for applet in $($busybox --list); do [[ $applet = busybox ]] || links+=(-link "/bin/$applet=/bin/busybox"); done
echo root:x:0:0:root:/root:/bin/sh >"$work/passwd"
echo root:x:0: >"$work/group"
etc="/etc/passwd=$work/passwd /etc/group=$work/group"
image() { local name=$1; shift; "$BIN/image" -o "$BIN/images/$name-$ARCH.tar" -arch "$ARCH" "$@" >/dev/null; }
image pause -ref registry.k8s.io/pause:3.10.2 -entrypoint /pause /pause="$work/pause"
image agnhost -ref registry.k8s.io/e2e-test-images/agnhost:2.66.1 -entrypoint /agnhost -cmd pause "${links[@]}" \
  /agnhost="$BIN/agnhost" /bin/busybox="$busybox" $etc
image busybox -ref registry.k8s.io/e2e-test-images/busybox:1.37.0-1 -cmd sh "${links[@]}" /bin/busybox="$busybox" $etc
