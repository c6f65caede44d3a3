# Rates of FreeFlow and of the kernel's rxe, measured in turn on this machine: lines of a name and
# MiB/s, or connections per second. $1: the directory with FreeFlow's programs and libraries; $2: how
# often; $3: what netem loses, in per cent, one after the other.
#
# rxe0 and rxe1 are at the ends of a veth pair. FreeFlow's hosts are two network namespaces whose
# veth pairs end in a bridge between them. Where packets are lost, FreeFlow's trains are split
# (gso_max_segs) before they come there, so that it is single packets, as it is of rxe's.
set -u
. "$VM_LIB"
. "$(dirname "$0")/../../tests/guest/routers.sh"
freeflow=$1/bin/freeflow runs=$2 losses=$3
size=65536

modprobe -a sch_netem bridge || exit 1
rxe_pair || exit 1
ip netns add mid
ip -n mid link add br0 type bridge
ip -n mid link set br0 up
for i in 0 1; do
    ip netns add h$i
    ip link add eth0 mtu 4200 netns h$i type veth peer name p$i mtu 4200 netns mid
    ip -n mid link set p$i master br0 up
done
start_hosts

# One of them that hangs does not keep the others from being measured.
limit="timeout -k 5 60"

# Each takes perftest's arguments.
rxe_server() { $limit ib_write_bw -d rxe1 -x 1 "$@"; }
rxe_client() { $limit ib_write_bw -d rxe0 -x 1 "$@" 10.77.0.2; }
server() { on 0 run --ip 10.1.0.1 -- $limit ib_write_bw "$@"; }
local_client() { on 0 run --ip 10.1.0.2 -- $limit ib_write_bw "$@" 10.88.0.1; }
hosts_client() { on 1 run --ip 10.2.0.1 -- $limit ib_write_bw "$@" 10.88.0.1; }

port=20000

# rate NAME KIND: for 4 seconds, less one at each end.
rate() {
    local name=$1 kind=$2 tries=600 pid serve=rxe_server listens="ss -Hltn"
    port=$((port + 1))
    [ "$kind" = rxe ] || serve=server listens="ip netns exec h0 $listens"
    set -- -s $size -D 6 -f 1 -p $port
    $serve "$@" > /out/server 2>&1 &
    pid=$!
    until $listens "sport = :$port" | grep -q .; do
        kill -0 $pid 2> /dev/null && [ $((tries -= 1)) -gt 0 ] || break
        sleep 0.1
    done
    if "${kind}_client" "$@" > /out/client 2>&1; then
        awk -v name="$name" -v size=$size '$1 == size && NF >= 5 { print name, $4 }' /out/client
    else
        kill $pid
        tail -n 5 /out/client /out/server
        echo "$name failed"
    fi
    wait $pid
}

connections=200
rxe_cm() { $limit cmtime -c $connections "$@"; }
local_cm() { local ip=$1; shift; on 0 run --ip $ip -- $limit cmtime -c $connections "$@"; }
awaited() {
    case $1 in
        rxe) rdma resource show cm_id | grep -q "state LISTEN" ;;
        local) on 0 status -o json | grep -Eq '"cm_listeners": *[1-9]' ;;
    esac
}

# connect NAME KIND: connections made, accepted and ended by the connection manager, one step after the
# other, with all that they need.
connect() {
    local name=$1 kind=$2 tries=600 pid
    while awaited $kind && [ $((tries -= 1)) -gt 0 ]; do sleep 0.1; done
    case $kind in
        rxe) rxe_cm -b 10.77.0.2 ;;
        local) local_cm 10.1.0.1 ;;
    esac > /out/server 2>&1 &
    pid=$!
    until awaited $kind; do
        kill -0 $pid 2> /dev/null && [ $((tries -= 1)) -gt 0 ] || break
        sleep 0.1
    done
    case $kind in
        rxe) rxe_cm -b 10.77.0.1 -s 10.77.0.2 ;;
        local) local_cm 10.1.0.2 -s 10.1.0.1 ;;
    esac > /out/client 2>&1
    # A step has its milliseconds behind its name; each must be there.
    [ $? = 0 ] && awk -F: -v name="$name" -v connections=$connections '
        /^step/ { rows = 1; next }
        rows && NF == 2 { split($2, at, " "); sum += at[1]; steps++ }
        END {
            if (steps >= 7 && sum > 0) print name, connections * 1000 / sum
            else exit 1
        }' /out/client || { tail -n 20 /out/client /out/server; echo "$name failed"; }
    # It serves until it is killed; what has started it ends with it.
    pkill -x cmtime
    wait $pid
}

# lose PERCENT: both ways, for both; 0 for none.
lose() {
    local verb
    for verb in "ip netns exec mid tc qdisc replace dev p0" "ip netns exec mid tc qdisc replace dev p1" \
        "tc qdisc replace dev v0" "tc qdisc replace dev v1"; do
        $verb root netem loss "$1%" || exit 1
    done
}

for _ in $(seq "$runs"); do
    rate local local
    rate hosts hosts
    rate rxe rxe
    connect local-cm local
    connect rxe-cm rxe
done
for i in 0 1; do ip -n h$i link set eth0 gso_max_segs 1; done
for percent in $losses; do
    lose $percent
    for _ in $(seq "$runs"); do
        rate hosts-loss-$percent hosts
        rate rxe-loss-$percent rxe
    done
done
# Which figures there are is said by their lines.
exit 0
