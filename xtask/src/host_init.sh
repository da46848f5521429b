#!/bin/sh
# First process of the test host: lays a writable layer over the outer machine's own root, enters it and runs the agent.
# Three 9p shares: hostroot (the outer /, read-only), out (results), control (the agent's orders and its answer).
export PATH=/bin
fail() { echo "XTASK-FATAL $1"; poweroff -f; }

dmesg -n 4
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
    case $module in
        loop.ko) insmod /modules/$module max_loop=8 ;;
        nbd.ko) insmod /modules/$module nbds_max=4 ;;
        *) insmod /modules/$module ;;
    esac || echo "XTASK-NOTE cannot load $module"
done </modules.order

share=trans=virtio,version=9p2000.L,msize=512000
mkdir -p /lower /upper /root
mount -t 9p -o $share,cache=loose,ro hostroot /lower || fail "cannot mount the outer root"
mount -t tmpfs -o size=75% upper /upper && mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /root || fail "cannot lay the overlay"

mount --move /proc /root/proc
mount --move /sys /root/sys
mount --move /dev /root/dev
cd /root || fail "no root"
mkdir -p dev/pts dev/shm dev/net
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t tmpfs -o mode=755 run run
[ -e dev/net/tun ] || mknod dev/net/tun c 10 200
ln -sf /proc/self/fd dev/fd
ln -sf fd/0 dev/stdin
ln -sf fd/1 dev/stdout
ln -sf fd/2 dev/stderr
mount -t cgroup2 cgroup2 sys/fs/cgroup 2>/dev/null
mount -t debugfs debugfs sys/kernel/debug 2>/dev/null
mount -t tracefs tracefs sys/kernel/tracing 2>/dev/null
mkdir -p run/xtask
mount -t 9p -o $share,cache=none control run/xtask || fail "cannot mount the control share"
mount -t 9p -o $share,cache=none out ".$(cat run/xtask/out)" || fail "cannot mount the share for results"
# A checkout below /tmp must stay visible; everything else wants a fast and empty /tmp.
[ -e run/xtask/keep-tmp ] || mount -t tmpfs -o mode=1777,size=75% tmp tmp
ip link set lo up

chroot . "$(cat run/xtask/agent)" inside /run/xtask
sync
poweroff -f
