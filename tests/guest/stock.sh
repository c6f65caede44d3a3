# The kernel's rxe on one end of a link, an endpoint with the underlay's GID on the other: unmodified
# programs of the two talk to each other, each the other's server in turn. $1: the directory with
# FreeFlow's programs and libraries; then the names of the parts to run.
set -u
. "$VM_LIB"
. "$(dirname "$0")/routers.sh"
freeflow=$1/bin/freeflow
shift

# rxe has RoCEv2's port in the first network namespace: the router is in another.
ip netns add ff
ip link add v0 mtu 4200 type veth peer name v1 mtu 4200 netns ff
ip addr add 10.88.0.1/24 dev v0
ip link set v0 up
ip -n ff addr add 10.88.0.2/24 dev v1
ip -n ff link set lo up
ip -n ff link set v1 up
rdma link add rxe0 type rxe netdev v0 || exit 1
ip netns exec ff "$freeflow" router --underlay 10.88.0.2 > /out/router 2>&1 &
wait_for_router $! /out/router "$freeflow" status

# at SIDE PROGRAM ARGUMENT...
at() {
    local side=$1
    shift
    case $side in
        rxe) timeout "$limit" "$@" ;;
        ff) timeout "$limit" ip netns exec ff "$freeflow" run --underlay-gid -- "$@" ;;
    esac
}

listens() {
    case $1 in
        rxe) ss -Hltn "sport = :$2" ;;
        ff) ip netns exec ff ss -Hltn "sport = :$2" ;;
    esac | grep -q .
}

port=20000 failed=0 passed=0 limit=${LIMIT:-60}

# verdict HELD TEXT...: counts and says what came of a check, with what its programs said if it is not
# "ok".
verdict() {
    local held=$1
    shift
    if [ "$held" = ok ]; then
        passed=$((passed + 1))
        echo "ok $*"
    else
        failed=$((failed + 1))
        echo "FAILED ($held) $*"
        tail -n 30 /out/client /out/server
        "$freeflow" status | tail -n 8
    fi
}

# between SERVER CLIENT PROGRAM ARGUMENT...
between() {
    local server=$1 client=$2 address began tries=300 code
    shift 2
    [ "$server" = rxe ] && address=10.88.0.1 || address=10.88.0.2
    began=$(date +%s)
    port=$((port + 1))
    at "$server" "$@" -p $port > /out/server 2>&1 &
    local pid=$!
    until listens "$server" $port; do
        kill -0 $pid 2> /dev/null && [ $((tries -= 1)) -gt 0 ] || break
        sleep 0.1
    done
    at "$client" "$@" -p $port $address > /out/client 2>&1
    code=$?
    [ $code = 0 ] || kill $pid 2> /dev/null
    wait $pid
    code=$code/$?
    grep -q "invalid data" /out/server /out/client && code=$code/data
    [ $code = 0/0 ] && code=ok
    verdict $code "$server <- $client: $* ($(($(date +%s) - began)) s)"
}

# awaits SIDE: by the connection manager, for whoever connects.
awaits() {
    case $1 in
        rxe) rdma resource show cm_id | grep -q "state LISTEN" ;;
        ff) "$freeflow" status -o json | grep -Eq '"cm_listeners": *[1-9]' ;;
    esac
}

# managed SERVER CLIENT PROGRAM SERVER_ARGUMENTS CLIENT_ARGUMENTS: programs that know each other by the
# connection manager alone. ADDRESS is the server's.
managed() {
    local server=$1 client=$2 program=$3 address began tries=300 code
    [ "$server" = rxe ] && address=10.88.0.1 || address=10.88.0.2
    began=$(date +%s)
    # The one before is gone.
    while awaits "$server" && [ $((tries -= 1)) -gt 0 ]; do sleep 0.1; done
    tries=300
    at "$server" "$program" ${4//ADDRESS/$address} > /out/server 2>&1 &
    local pid=$!
    until awaits "$server"; do
        kill -0 $pid 2> /dev/null && [ $((tries -= 1)) -gt 0 ] || break
        sleep 0.1
    done
    at "$client" "$program" ${5//ADDRESS/$address} > /out/client 2>&1
    code=$?
    [ $code = 0 ] || kill $pid 2> /dev/null
    wait $pid
    code=$code/$?
    [ $code = 0/0 ] && code=ok
    verdict $code "$server <- $client: $program $5 ($(($(date +%s) - began)) s)"
}

# refused SERVER CLIENT: nobody listens there.
refused() {
    local address held="not refused"
    [ "$1" = rxe ] && address=10.88.0.1 || address=10.88.0.2
    : > /out/server
    at "$2" rping -c -a $address -C 1 > /out/client 2>&1
    grep -q "RDMA_CM_EVENT_REJECTED, error 8" /out/client && held=ok
    verdict "$held" "$1 <- $2: refused"
}

both() {
    between rxe ff "$@"
    between ff rxe "$@"
}

devinfo() {
    at ff ibv_devinfo -v > /out/devinfo
    for wanted in 'GID\[  1\]:.*::ffff:10.88.0.2, RoCE v2' 'gid_tbl_len:[[:space:]]*2'; do
        grep -q "$wanted" /out/devinfo && continue
        failed=$((failed + 1))
        echo "FAILED: ibv_devinfo has no $wanted"
        cat /out/devinfo
    done
    at ff cat /sys/class/infiniband/freeflow0/ports/1/gids/1
}

pingpongs() {
    both ibv_rc_pingpong -g 1 -c -n 200
    both ibv_rc_pingpong -g 1 -c -n 50 -s 100001 -m 4096
    both ibv_rc_pingpong -g 1 -c -n 50 -s 5000 -m 256 -e
    both ibv_uc_pingpong -g 1 -c -n 200
    both ibv_ud_pingpong -g 1 -c -n 200 -s 1024
    both ibv_srq_pingpong -g 1 -c -n 200 -q 4
}

connected() {
    # Both sides must ask for what both can do: rxe could do more.
    for size in 1 65537; do
        both ib_send_bw -x 1 -s $size -n 100
        both ib_write_bw -x 1 -s $size -n 100
        both ib_read_bw -x 1 -o 16 -s $size -n 100
    done
    both ib_atomic_bw -x 1 -o 16 -n 100 -A FETCH_AND_ADD
    both ib_atomic_bw -x 1 -o 16 -n 100 -A CMP_AND_SWAP
    both ib_send_bw -x 1 -s 4096 -n 100 -b -q 4 -e
    both ib_write_bw -x 1 -s 10000 -n 100 -m 1024 -b -q 2
    both ib_send_lat -x 1 -s 64 -n 100
    both ib_write_lat -x 1 -s 3000 -n 100
    both ib_read_lat -x 1 -o 16 -s 3000 -n 100
    both ib_atomic_lat -x 1 -o 16 -n 100
}

unreliable() {
    both ib_send_bw -x 1 -c UC -s 10000 -n 100
    both ib_write_bw -x 1 -c UC -s 10000 -n 100
    both ib_write_lat -x 1 -c UC -s 10000 -n 100
    both ib_send_bw -x 1 -c UD -s 1024 -n 100
    both ib_send_lat -x 1 -c UD -s 1000 -n 100
}

loss() {
    modprobe sch_netem || exit 1
    tc qdisc add dev v0 root netem loss 1% || exit 1
    ip netns exec ff tc qdisc add dev v1 root netem loss 1% || exit 1
    both ibv_rc_pingpong -g 1 -c -n 100 -s 20001
    both ib_send_bw -x 1 -s 65536 -n 50
    both ib_write_bw -x 1 -s 65536 -n 50
    both ib_read_bw -x 1 -o 16 -s 65536 -n 50
    both ib_atomic_bw -x 1 -o 16 -n 100 -A FETCH_AND_ADD
    for side in "tc -s qdisc show dev v0" "ip netns exec ff tc -s qdisc show dev v1"; do
        $side > /out/lost
        ! grep -q "netem" /out/lost || grep -q "dropped 0," /out/lost || continue
        failed=$((failed + 1))
        echo "FAILED: nothing was lost"
        cat /out/lost
    done
    tc qdisc del dev v0 root
    ip netns exec ff tc qdisc del dev v1 root
}

# perftest is left out: its client asks for a second connection, and crashes if that comes before its
# server listens again.
manager() {
    modprobe rdma_ucm || exit 1
    local ends
    for ends in "rxe ff" "ff rxe"; do
        managed $ends rping "-s -a ADDRESS -V -C 20" "-c -a ADDRESS -V -C 20"
        managed $ends ucmatose "-b ADDRESS -c 5 -C 20" "-s ADDRESS -c 5 -C 20"
        managed $ends udaddy "-b ADDRESS -c 2 -C 10" "-s ADDRESS -c 2 -C 10"
    done
    # Without an endpoint nobody can refuse.
    at ff sleep 1000 &
    local pid=$!
    until "$freeflow" status -o json | grep -q '"tenant"'; do
        kill -0 $pid || break
        sleep 0.1
    done
    refused ff rxe
    kill $pid
    refused rxe ff
}

# copied SERVER CLIENT: a file, by a server that does not end.
copied() {
    local server=$1 client=$2 address tries=300 code
    [ "$server" = rxe ] && address=10.88.0.1 || address=10.88.0.2
    head -c 1000003 /dev/urandom > /run/from
    rm -f /run/to
    while awaits "$server" && [ $((tries -= 1)) -gt 0 ]; do sleep 0.1; done
    tries=300
    at "$server" rcopy > /out/server 2>&1 &
    until awaits "$server" || [ $((tries -= 1)) = 0 ]; do sleep 0.1; done
    at "$client" rcopy /run/from $address:/run/to > /out/client 2>&1
    code=$?
    killall rcopy
    wait $!
    [ $code = 0 ] && cmp /run/from /run/to && code=ok
    verdict $code "$server <- $client: rcopy"
}

# of SIDE PROGRAM: its process.
of() {
    local pid
    for pid in $(pgrep -x "$2"); do
        case $(ip netns identify "$pid") in
            ff) [ "$1" = ff ] && echo "$pid" ;;
            *) [ "$1" = rxe ] && echo "$pid" ;;
        esac
    done
}

# killed SERVER CLIENT VICTIM: the stream's other side is told (a stock one if it polls; one that blocks
# sees completions alone). By its own deadline it would fail too, but with 124.
killed() {
    local server=$1 client=$2 victim=$3 address tries=300 pids codes
    local both="-T a -C 1000 -I 1000000 -S 5000"
    [ "$server" = rxe ] && address=10.88.0.1 || address=10.88.0.2
    while awaits "$server" && [ $((tries -= 1)) -gt 0 ]; do sleep 0.1; done
    tries=300
    at "$server" rstream $both > /out/server 2>&1 &
    pids=$!
    until awaits "$server" || [ $((tries -= 1)) = 0 ]; do sleep 0.1; done
    at "$client" rstream $both -s $address > /out/client 2>&1 &
    pids="$pids $!"
    tries=300
    until rdma resource show qp | grep -q "type RC state RTS" || [ $((tries -= 1)) = 0 ]; do sleep 0.1; done
    kill -KILL $(of "$victim" rstream)
    codes=
    for pid in $pids; do
        wait "$pid"
        codes="$codes $?"
    done
    # timeout(1) and freeflow end as the program that was killed.
    local held="$codes"
    [ $tries != 0 ] && [[ " $codes " != *" 124 "* ]] && [[ " $codes " != *" 0 "* ]] && held=ok
    verdict "$held" "$server <- $client: $victim killed ($codes)"
}

# A stock program that polls is told of a stream's end before it has read what came before: rstream
# takes that for a failure, so that clients that poll are left out. So are datagrams: for them,
# librdmacm makes address handles without GRH, which RoCE has to have.
streams() {
    modprobe rdma_ucm || exit 1
    local ends mode
    for ends in "rxe ff" "ff rxe"; do
        for mode in "-S 1" "-S 64 -T b" "-S 30000 -T n" "-S 5000 -T r" "-S 1000 -i 0" "-S 1000 -i 1024" \
            "-S 5000 -k 1" "-S 10000 -B 4096" "-S 200000 -C 2"; do
            mode="-T v -C 10 -I 10 $mode"
            managed $ends rstream "$mode" "-s ADDRESS $mode"
        done
        for mode in "-S 64" "-S 30000 -T b" "-S 5000 -T n"; do
            mode="-T v -C 10 -I 10 $mode"
            managed $ends riostream "$mode" "-s ADDRESS $mode"
        done
        copied $ends
        killed $ends rxe
        killed $ends ff
    done
}

for part; do $part; done
"$freeflow" status
echo "$passed passed, $failed failed"
[ $failed = 0 ]
