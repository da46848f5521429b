#!/bin/sh
# Serves commands in a guest under test, on the virtio-console port named `harness` or on the tty given as an argument.
# A line
#     ID BASE64(COMMAND)
# is answered with
#     ID STATUS BASE64(OUTPUT)
# and every connection begins with HARNESS-READY. Ends when there is no such port. Runs under busybox and under Debian.

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
    while [ $tries -lt 6000 ]; do
        for place in /sys/class/virtio-ports/*; do
            name=
            [ -e "$place/name" ] && read -r name <"$place/name"
            if [ "$name" = harness ]; then
                port=/dev/${place##*/}
                return 0
            fi
        done
        tries=$((tries + 1))
        sleep 0.02
    done
    return 1
}

# Output goes through a file: a process left in the background keeps writing there and holds up nobody.
answer() {
    echo "$2" | base64 -d >/run/harness-command
    sh /run/harness-command >/run/harness-output 2>&1 </dev/null 3>&-
    status=$?
    printf '%s %s %s\n' "$1" "$status" "$(base64 -w 0 /run/harness-output)" >&3
    rm -f /run/harness-output
}

if [ -n "$1" ]; then
    port=/dev/$1
    stty -F "$port" raw -echo
else
    find_port || exit 1
fi
exec 3<>"$port"
while :; do
    # Blocks until the other side is there; reading ends when it goes away.
    echo HARNESS-READY >&3
    while read -r id command <&3; do
        [ -n "$command" ] && answer "$id" "$command"
    done
    sleep 0.05
done
