# For scripts that run in a guest: . "$VM_LIB"

# meet [WORD]: waits until the other host's script does the same, and prints its word.
meet() {
    local theirs
    echo "${1:-met}" >&9
    read -r -t 300 theirs <&8 || { echo "host $HOST_INDEX: the other host did not come" >&2; return 1; }
    echo "$theirs"
}

# rxe_pair [ADDRESS [ADDRESS]]: two devices on this host, rxe0 on v0 (10.77.0.1) and rxe1 on v1
# (10.77.0.2), whose packets cross a veth pair.
#
# rxe receives only in the first network namespace, so both addresses are of this host, and the
# kernel would deliver what goes from one to the other without a wire. So its table of local
# addresses is asked last: first come rules that send what goes to the one address out of the
# other's device, but not what arrives, nor what an address sends to itself.
rxe_pair() (
    set -e
    addresses=("${1:-10.77.0.1}" "${2:-10.77.0.2}")
    ip link add v0 mtu 4200 type veth peer name v1 mtu 4200
    sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.all.accept_local=1
    ip rule add pref 100 lookup local
    for i in 0 1; do
        own=${addresses[i]} other=${addresses[1 - i]} dev=v$i
        sysctl -qw "net.ipv4.conf.$dev.rp_filter=0" "net.ipv4.conf.$dev.accept_local=1" \
            "net.ipv4.conf.$dev.arp_ignore=1"
        ip link set $dev up
        ip addr add "$own/32" dev $dev
        ip neigh replace "$other" lladdr "$(cat /sys/class/net/v$((1 - i))/address)" dev $dev nud permanent
        ip route add "$other" dev $dev src "$own" table $((200 + i))
        ip rule add pref 10 iif $dev lookup local
        ip rule add pref 20 from "$own" to "$own" lookup local
        ip rule add pref 30 to "$other" lookup $((200 + i))
    done
    ip rule del pref 0
    for i in 0 1; do rdma link add rxe$i type rxe netdev v$i; done
)

# wait_for_port PORT: waits until a program of this host listens on a TCP port.
wait_for_port() {
    local tries=600
    until ss -Hltn "sport = :$1" | grep -q .; do
        [ $((tries -= 1)) -gt 0 ] || { echo "nobody listens on port $1" >&2; return 1; }
        sleep 0.1
    done
}
