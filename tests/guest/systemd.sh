#!/usr/bin/env bash
# The Debian package in a Debian guest with its real systemd: see checks/systemd. About two minutes with KVM.
#
#   tests/guest/systemd.sh [DEB] [bookworm|trixie]     without DEB, packaging/deb.sh makes it
#
# $BITNETD_GUEST_LIMIT: seconds it may take, 840 without it; more for a machine that is busy with other things.
set -euo pipefail
cd "$(dirname "$0")/../.."

deb=${1:-}
suite=${2:-bookworm}
if [ -z "$deb" ]; then
    packaging/deb.sh
    deb=$(ls target/debian/bitnetd_*.deb)
fi
payload=$(mktemp -d)
trap 'rm -rf "$payload"' EXIT
cp "$deb" "$payload/bitnetd.deb"
cp tests/guest/checks/say.sh "$payload/say.sh"
cp tests/guest/checks/systemd "$payload/run"
tests/guest/boot.sh --suite "$suite" --smp sockets=1,cores=2,threads=1 --memory 1536 --limit "${BITNETD_GUEST_LIMIT:-840}" "$payload"
