# To be sourced: two hosts with routers, in network namespaces h0 and h1 whose eth0 lead to each other.
# $freeflow names the command.

# on HOST ARGUMENT...: freeflow there.
on() {
    local host=$1
    shift
    ip netns exec h$host "$freeflow" --runtime-dir /run/h$host "$@"
}

# wait_for_router PID LOG STATUS...: until the router answers this command; the script ends with the
# router's words if that ends first, or does not come.
wait_for_router() {
    local pid=$1 log=$2 tries=600
    shift 2
    until "$@" > /dev/null 2>&1; do
        kill -0 $pid 2> /dev/null && [ $((tries -= 1)) -gt 0 ] || { cat $log; exit 1; }
        sleep 0.1
    done
}

# Gives the hosts addresses (10.88.0.1 and 2), endpoints' networks (10.1.0.0/16 and 10.2.0.0/16), and
# routers.
start_hosts() {
    local i
    for i in 0 1; do
        ip -n h$i addr add 10.88.0.$((i + 1))/24 dev eth0
        ip -n h$i link set lo up
        ip -n h$i link set eth0 up
        echo "default 10.$((i + 1)).0.0/16 10.88.0.$((i + 1))"
    done > /run/hosts
    for i in 0 1; do
        on $i router --underlay 10.88.0.$((i + 1)) --hosts /run/hosts --insecure > /out/router$i 2>&1 &
        wait_for_router $! /out/router$i on $i status
    done
}
