#!/usr/bin/env bash
# Boots a guest (see image.sh), runs PAYLOAD/run in it as root, prints what that says and ends as it ends.
#
#   tests/guest/boot.sh [--suite bookworm] [--smp sockets=1,cores=2,threads=1] [--nodes 1] [--memory 1536] [--limit 600] PAYLOAD
#
# --nodes N: the guest has N memory nodes, CPUs and memory divided evenly. --memory in MiB, --limit in seconds.
# Needs qemu-system-x86. With /dev/kvm it takes seconds, without it minutes. Nothing the guest writes outlives it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

suite=bookworm smp=sockets=1,cores=2,threads=1 nodes=1 memory=1536 limit=600
while [ $# -gt 1 ]; do
    case $1 in
    --suite) suite=$2 ;;
    --smp) smp=$2 ;;
    --nodes) nodes=$2 ;;
    --memory) memory=$2 ;;
    --limit) limit=$2 ;;
    *) echo "unknown: $1" >&2; exit 64 ;;
    esac
    shift 2
done
payload=$1
command -v qemu-system-x86_64 >/dev/null || { echo "qemu-system-x86_64 is missing: apt-get install qemu-system-x86" >&2; exit 69; }

image=$("$here/image.sh" "$suite")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -C "$payload" --owner=0 --group=0 -cf "$work/payload.tar" .

n_cpus=1
for part in ${smp//,/ }; do n_cpus=$((n_cpus * ${part#*=})); done
numa=()
if [ "$nodes" -gt 1 ]; then
    for ((node = 0; node < nodes; node++)); do
        first=$((n_cpus * node / nodes)) last=$((n_cpus * (node + 1) / nodes - 1))
        numa+=(-object "memory-backend-ram,id=m$node,size=$((memory / nodes))M" -numa "node,nodeid=$node,memdev=m$node,cpus=$first-$last")
    done
fi
# Nested KVM may refuse to set the architecture capabilities; AMD needs topoext for two threads on a core; KVM of the PVM kind runs only kernels made for it.
accel=(-accel kvm -cpu host,arch-capabilities=off,topoext=on)
if [ ! -w /dev/kvm ] || [ -d /sys/module/kvm_pvm ]; then
    echo "no KVM for ordinary kernels here: this will be slow" >&2
    accel=(-accel tcg,thread=multi -cpu max,vendor=GenuineIntel) # Whose threads of a core need no further word.
fi

# What the payload says comes over a virtio console, the kernel's talk over a serial one.
timeout "$limit" qemu-system-x86_64 -nodefaults -no-user-config -display none -machine q35 "${accel[@]}" \
    -smp "$n_cpus,$smp" -m "$memory" "${numa[@]}" -no-reboot \
    -kernel "$image/vmlinuz" -initrd "$image/initrd" \
    -append "root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off systemd.show_status=no systemd.getty_auto=no" \
    -drive "file=$image/disk,if=virtio,format=raw,snapshot=on" \
    -drive "file=$work/payload.tar,if=virtio,format=raw,readonly=on" \
    -serial "file:$work/console" \
    -device virtio-serial-pci -chardev stdio,id=out,signal=off -device virtconsole,chardev=out </dev/null |
    sed -u 's|\r$||' | tee "$work/said" | grep --line-buffered -v '^guest-exit ' || true

code=$(sed -n 's/^guest-exit //p' "$work/said" | tail -1)
if [ -z "$code" ]; then
    echo "the guest did not come to an end within $limit s; its console:" >&2
    tail -30 "$work/console" >&2
    exit 75
fi
exit "$code"
