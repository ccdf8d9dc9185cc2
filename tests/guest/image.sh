#!/usr/bin/env bash
# Makes the disk, kernel and initrd of a small Debian guest, once for each suite, in a cache folder. Prints the folder.
#
#   tests/guest/image.sh [bookworm|trixie]
#
# Needs root (debootstrap), debootstrap, e2fsprogs. The cache is $BITNETD_GUEST_CACHE, else $XDG_CACHE_HOME/bitnetd-guest,
# else ~/.cache/bitnetd-guest; the mirror is $BITNETD_GUEST_MIRROR, else deb.debian.org. Remove the folder to make it anew.
set -euo pipefail

suite=${1:-bookworm}
mirror=${BITNETD_GUEST_MIRROR:-http://deb.debian.org/debian}
cache=${BITNETD_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnetd-guest}
here=$cache/$suite
recipe=2 # Raise it when something below changes: images of another recipe are made anew.

if [ "$(cat "$here/recipe" 2>/dev/null)" = "$recipe" ]; then
    echo "$here"
    exit
fi
for tool in debootstrap mke2fs; do
    command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install debootstrap e2fsprogs" >&2; exit 69; }
done
[ "$(id -u)" = 0 ] || { echo "debootstrap needs root" >&2; exit 77; }

rm -rf "$here"
mkdir -p "$here"
root=$here/root
debootstrap --variant=minbase \
    --include=systemd,systemd-sysv,udev,dbus,linux-image-cloud-amd64,initramfs-tools,procps,kmod,util-linux,jq \
    "$suite" "$root" "$mirror" >"$here/log" 2>&1 || { tail -20 "$here/log" >&2; exit 75; }

echo bitnetd-guest >"$root/etc/hostname"
echo '/dev/vda / ext4 rw,noatime 0 1' >"$root/etc/fstab"
: >"$root/etc/machine-id" # The journal is persistent under a number that is made at the first boot.
mkdir -p "$root/var/log/journal" "$root/payload"

# What runs is a tar archive on the second disk; what it says goes to the second console, and its end is the guest's.
cat >"$root/usr/local/sbin/guest-run" <<'RUN'
#!/bin/bash
cd /payload && tar -xf /dev/vdb && ./run >/dev/hvc0 2>&1 </dev/null
echo "guest-exit $?" >/dev/hvc0
sync
systemctl poweroff --force
RUN
chmod 755 "$root/usr/local/sbin/guest-run"
cat >"$root/etc/systemd/system/guest-run.service" <<'UNIT'
[Unit]
Description=What this guest was started for
After=multi-user.target

[Service]
Type=simple
ExecStart=/usr/local/sbin/guest-run
TimeoutStartSec=infinity

[Install]
WantedBy=default.target
UNIT
mkdir -p "$root/etc/systemd/system/default.target.wants"
ln -s ../guest-run.service "$root/etc/systemd/system/default.target.wants/"
rm -rf "$root/etc/systemd/system/getty.target.wants" "$root/var/cache/apt/archives/"*.deb

cp "$root"/boot/vmlinuz-* "$here/vmlinuz"
cp "$root"/boot/initrd.img-* "$here/initrd"
rm -f "$root"/boot/initrd.img-*
truncate -s 3G "$here/disk"
mke2fs -q -F -t ext4 -L guest -d "$root" "$here/disk"
rm -rf "$root"
echo "$recipe" >"$here/recipe"
echo "$here"
