#!/bin/sh
# First process of a guest under test. It reports itself on the console and then serves commands that arrive as lines
#     ID BASE64(COMMAND)
# on the virtio-console port named `harness` (or on the tty named by harness.port=), answering each with
#     ID STATUS BASE64(OUTPUT)
# and opening the conversation with HARNESS-READY every time the other side connects.
#
# Words of the kernel's command line:
#     harness.modules=all|none|NAME,NAME…    drivers to load (default: all that the image has)
#     harness.port=ttyS1                     serve commands on this tty instead of a port
#     harness.exit=poweroff|reboot|panic|triplefault|idle    do that at once and serve no commands
export PATH=/bin HOME=/root TERM=dumb
echo GUEST-INIT-REACHED

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

modules=all tty= exit=
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        harness.modules=*) modules=${word#*=} ;;
        harness.port=*) tty=${word#*=} ;;
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
    idle) while :; do sleep 86400; done ;;
esac

mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=755 run /run
ln -s /proc/self/fd /dev/fd
ip link set lo up
# The power button: acpid runs /etc/acpi/PWRF/00000080 when an input device reports it.
if grep -qs 'Power Button' /proc/bus/input/devices; then
    acpid -f -c /etc/acpi -l /run/acpid.log -p /run/acpid.pid </dev/null >/dev/null 2>&1 &
fi

has_console() {
    for device in /sys/bus/virtio/devices/*; do
        [ -e "$device/device" ] || continue
        read -r kind <"$device/device"
        [ "$kind" = 0x0003 ] && return 0
    done
    return 1
}

# Sets `port` to the device of the port named `harness`. The names arrive from the device after its driver is up.
find_port() {
    has_console || return 1
    tries=0
    while [ $tries -lt 250 ]; do
        for place in /sys/class/virtio-ports/*; do
            name=
            [ -e "$place/name" ] && read -r name <"$place/name"
            if [ "$name" = harness ]; then
                port=/dev/${place##*/}
                return 0
            fi
        done
        tries=$((tries + 1))
        usleep 20000
    done
    return 1
}

# Output goes through a file: a process left in the background keeps writing there and holds up nobody.
answer() {
    echo "$2" | base64 -d >/run/command
    sh /run/command >/run/output 2>&1 </dev/null 3>&-
    status=$?
    printf '%s %s %s\n' "$1" "$status" "$(base64 -w 0 /run/output)" >&3
    rm -f /run/output
}

serve() {
    while :; do
        # Blocks until the other side is there; reading ends when it goes away.
        echo HARNESS-READY >&3
        while read -r id command <&3; do
            [ -n "$command" ] && answer "$id" "$command"
        done
        usleep 50000
    done
}

if [ -n "$tty" ]; then
    port=/dev/$tty
    stty -F "$port" raw -echo
    exec 3<>"$port"
    serve
elif find_port; then
    exec 3<>"$port"
    serve
fi
while :; do sleep 86400; done
