#!/usr/bin/env bash
# rootfs.sh ARCH DIR: make DIR the root filesystem of the agent's image, but for
# the agent: iptables of both backends from the packages of the Debian release
# that this runs on, and what it needs to run. No shell, no package manager.
# Nothing of the image is executed, so ARCH (amd64 or arm64) may be that of
# another machine; and the machine's own packages and lists of packages aren't
# touched, so root isn't needed.
set -euo pipefail
umask 022

fail() { echo "rootfs.sh: $*" >&2; exit 1; }
[[ $# == 2 && $1 == @(amd64|arm64) ]] || fail "usage: rootfs.sh amd64|arm64 DIR"
arch=$1 dir=$(realpath -m "$2")
[[ ! -e $dir ]] || fail "$dir is there already"
mirror=${DEBIAN_MIRROR:-http://deb.debian.org}
key=/usr/share/keyrings/debian-archive-keyring.gpg
release=$(. /etc/os-release && [[ $ID == debian ]] && echo "$VERSION_CODENAME") ||
  fail "this isn't Debian: use deploy/Dockerfile"
here=$(dirname "$(realpath "$0")")
cache=$(realpath -m "$here/../../.bin/apt-$arch") # ignored by git

# An apt of its own. To its knowledge no package is installed, so that it
# downloads all that iptables depends on.
apt() {
  apt-get -q -o APT::Architecture="$arch" -o APT::Architectures="$arch" \
    -o Dir::State="$cache" -o Dir::State::status="$cache/status" -o Dir::Cache="$cache" \
    -o Dir::Etc::SourceList="$cache/sources.list" -o Dir::Etc::SourceParts=- \
    -o APT::Sandbox::User= -o Debug::NoLocking=true -o APT::Update::Error-Mode=any "$@" >&2
}
rm -rf "$cache"/{archives,unpacked,rootfs} # older versions would lie beside newer ones
mkdir -p "$cache"/{lists,archives}/partial "$cache/unpacked"
: > "$cache/status"
cat > "$cache/sources.list" <<END
deb [signed-by=$key] $mirror/debian $release main
deb [signed-by=$key] $mirror/debian $release-updates main
deb [signed-by=$key] $mirror/debian-security $release-security main
END
apt update
apt install --download-only --yes --no-install-recommends iptables
(cd "$cache/archives" && apt download base-files) # has the texts of common licences
for deb in "$cache"/archives/*.deb; do dpkg-deb -x "$deb" "$cache/unpacked"; done

# Out of the packages, what the commands need, their extensions, and the licences.
# /etc/protocols isn't needed: iptables itself knows the names that the agent uses.
cd "$cache/unpacked"
needed=$(env -u GOOS -u GOARCH go run -C "$here" . -closure "$PWD" \
  usr/sbin/{ip,ip6}tables-{nft,legacy}{,-save,-restore} usr/lib/*/xtables/*.so)
new=$cache/rootfs
mkdir -p "$new"/{etc,run,tmp,usr/sbin,var/log}
chmod 1777 "$new/tmp"
sed 's,^/,,' <<<"$needed" | xargs -d '\n' cp -a --parents -t "$new"
cp -a --parents -t "$new" usr/share/doc/*/copyright usr/share/common-licenses
for command in {ip,ip6}tables; do # nft is what these are in Debian, too
  for suffix in '' -save -restore; do
    ln -s "$command-nft$suffix" "$new/usr/sbin/$command$suffix"
  done
done
echo 'root:x:0:0:root:/:/usr/sbin/nologin' > "$new/etc/passwd"
mkdir -p "$(dirname "$dir")"
mv "$new" "$dir"
