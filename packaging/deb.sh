#!/usr/bin/env bash
# Builds the Debian package from this checkout, and prints its path and checksum. Needs cargo-deb (cargo install cargo-deb).
#
#   packaging/deb.sh            into target/debian/
#
# Nothing of the machine should be in it: times are those of the commit, and paths are mapped away.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v cargo-deb >/dev/null || { echo "cargo-deb is missing: cargo install cargo-deb" >&2; exit 69; }
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export LC_ALL=C TZ=UTC
cargo_home=${CARGO_HOME:-$HOME/.cargo}
unset RUSTFLAGS
# In this form a path may have blanks.
export CARGO_ENCODED_RUSTFLAGS="--remap-path-prefix=$PWD=/bitnetd"$'\x1f'"--remap-path-prefix=$cargo_home=/cargo"
export CARGO_TARGET_DIR=$PWD/target

cargo build --profile dist --locked -p bitnetd
bitnetd=target/dist/bitnetd
rm -rf target/package target/debian
mkdir -p target/package/man
"$bitnetd" man target/package/man
"$bitnetd" completions bash >target/package/bitnetd.bash
"$bitnetd" completions zsh >target/package/_bitnetd
"$bitnetd" completions fish >target/package/bitnetd.fish
cargo deb --quiet --no-build --profile dist --locked -p bitnetd >&2
echo "binary: $(stat -c %s "$bitnetd") bytes" >&2
sha256sum target/debian/*.deb
