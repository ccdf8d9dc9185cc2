#!/usr/bin/env bash
# Builds the Debian package twice, from two clean clones in folders of different names and depths, under different settings
# (locale, time zone, umask, number of jobs), and compares them bit for bit. Ends with exit code 1 if they differ, and says where.
#
#   packaging/reproduce.sh [COMMIT]     HEAD without it
#
# Needs what packaging/deb.sh needs, 6 GB in the temporary folder, and twice the time of a build with link-time optimisation.
set -euo pipefail
cd "$(dirname "$0")/.."

repository=$PWD
commit=$(git rev-parse "${1:-HEAD}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# build FOLDER SETTING...: prints the path of the package that a clone in FOLDER makes.
build() {
    local folder=$work/$1
    shift
    git clone --quiet --no-local "$repository" "$folder"
    git -C "$folder" checkout --quiet --detach "$commit"
    env "$@" "$folder/packaging/deb.sh" >"$work/log" 2>&1 || { tail -30 "$work/log" >&2; exit 75; }
    ls "$folder"/target/debian/*.deb
}
umask 022
first=$(build one LC_ALL=C TZ=UTC CARGO_BUILD_JOBS=2)
cp "$first" "$work/first.deb"
rm -rf "$work/one/target"
umask 077
second=$(build "another/place/with a longer name" LC_ALL=C.UTF-8 TZ=Pacific/Auckland CARGO_BUILD_JOBS=3)
umask 022

sha256sum "$work/first.deb" "$second" | sed "s|$work/||"
if cmp "$work/first.deb" "$second"; then
    echo "the same: $(basename "$second"), $(stat -c %s "$second") bytes, commit $commit"
    exit
fi
dpkg-deb --raw-extract "$work/first.deb" "$work/of-first"
dpkg-deb --raw-extract "$second" "$work/of-second"
echo "different:"
diff -rq "$work/of-first" "$work/of-second" || true
cmp -l "$work/of-first/usr/bin/bitnetd" "$work/of-second/usr/bin/bitnetd" | wc -l | sed 's/$/ bytes of the program differ/'
exit 1
