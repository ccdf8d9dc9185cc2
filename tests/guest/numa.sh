#!/usr/bin/env bash
# Placement on a machine with 2 sockets x 3 cores x 2 threads and 2 memory nodes, in a guest: see checks/numa.
#
#   tests/guest/numa.sh [BITNETD]     without BITNETD, the release build
#
# $BITNETD_GUEST_LIMIT: seconds it may take, 840 without it.
set -euo pipefail
cd "$(dirname "$0")/../.."

bitnetd=${1:-}
if [ -z "$bitnetd" ]; then
    cargo build --release --locked -p bitnetd
    bitnetd=target/release/bitnetd
fi
payload=$(mktemp -d)
trap 'rm -rf "$payload"' EXIT
cp "$bitnetd" "$payload/bitnetd"
cp tests/guest/checks/say.sh "$payload/say.sh"
cp tests/guest/checks/numa "$payload/run"
tests/guest/boot.sh --smp sockets=2,cores=3,threads=2 --nodes 2 --memory 2048 --limit "${BITNETD_GUEST_LIMIT:-840}" "$payload"
