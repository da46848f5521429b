#!/bin/sh
# First process of a guest under test. It reports itself on the console, loads drivers and starts the command server.
#
# Words of the kernel's command line:
#     harness.modules=all|none|NAME,NAME…    drivers to load (default: all that the image has)
#     harness.port=ttyS1                     serve commands on this tty instead of a port
#     harness.root=/dev/vda                  run that disk's own init instead, drivers loaded
#     harness.exit=poweroff|reboot|panic|triplefault|idle    do that at once and serve no commands
#     harness.exit=look                      look for network cards, over and over, and tell their addresses on the console
#     harness.exit=input                     switch off when a line is typed on the console
export PATH=/bin HOME=/root TERM=dumb
echo GUEST-INIT-REACHED

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

modules=all tty= root= exit= acpid=
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        harness.modules=*) modules=${word#*=} ;;
        harness.port=*) tty=${word#*=} ;;
        harness.root=*) root=${word#*=} ;;
        harness.exit=*) exit=${word#*=} ;;
    esac
done

load() {
    while read -r file; do
        # Two modules may need the same third; the second attempt changes nothing.
        insmod /modules/$file 2>/dev/null
    done </modules/$1.order
}
case $modules in
    none) ;;
    all) load all ;;
    *) for module in $(echo "$modules" | tr , ' '); do load "$module"; done ;;
esac

case $exit in
    poweroff) poweroff -f ;;
    reboot) reboot -f ;;
    panic) echo c >/proc/sysrq-trigger ;;
    triplefault)
        echo triple >/sys/kernel/reboot/type
        reboot -f ;;
    input)
        read -r _
        poweroff -f
        ;;
    look)
        told=
        while :; do
            echo 1 >/sys/bus/pci/rescan
            found=$(cat /sys/class/net/eth*/address 2>/dev/null)
            [ "$found" = "$told" ] || echo "GUEST-SEES" $found
            told=$found
            sleep 0.1
        done ;;
    idle) while :; do sleep 86400; done ;;
esac

if [ -n "$root" ]; then
    mkdir -p /newroot
    tries=0
    until [ -b "$root" ] || [ $tries -ge 3000 ]; do
        tries=$((tries + 1))
        sleep 0.02
    done
    if mount -t ext4 "$root" /newroot; then
        for place in dev proc sys; do mount --move /$place /newroot/$place; done
        exec switch_root /newroot /sbin/init
    fi
    echo "GUEST-INIT-FAILED cannot mount $root"
fi

mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=755 run /run
ln -s /proc/self/fd /dev/fd
ip link set lo up
# The power button: acpid runs /etc/acpi/PWRF/00000080 when an input device reports it.
if grep -qs 'Power Button' /proc/bus/input/devices; then
    acpid -f -c /etc/acpi -l /run/acpid.log -p /run/acpid.pid </dev/null >/dev/null 2>&1 &
    acpid=$!
fi

# A button pressed after HARNESS-READY must not be missed: waits until acpid has opened the input devices.
await_acpid() {
    tries=0
    while [ -n "$acpid" ] && [ $tries -lt 3000 ]; do
        ls -l /proc/$acpid/fd 2>/dev/null | grep -q /dev/input/event && return
        tries=$((tries + 1))
        sleep 0.02
    done
}

await_acpid
harness-server "$tty"
while :; do sleep 86400; done
