# The clock of this machine jumps while programs of two hosts talk to each other. $1: the directory
# with FreeFlow's programs and libraries; $2: how many messages.
set -u
. "$(dirname "$0")/routers.sh"
freeflow=$1/bin/freeflow

ip netns add h0
ip netns add h1
ip link add eth0 mtu 4200 netns h0 type veth peer name eth0 mtu 4200 netns h1
start_hosts

on 0 run --ip 10.1.0.1 -- ibv_rc_pingpong -g 0 -c -e -n "$2" > /out/server 2>&1 &
server=$!
tries=600
until ip netns exec h0 ss -Hltn "sport != :4792" | grep -q .; do
    kill -0 $server 2> /dev/null && [ $((tries -= 1)) -gt 0 ] || { cat /out/server; exit 1; }
    sleep 0.1
done
on 1 run --ip 10.2.0.1 -- ibv_rc_pingpong -g 0 -c -e -n "$2" 10.88.0.1 > /out/client 2>&1 &
client=$!
jumps=0
for when in "+1 year" 1990-01-01 2037-01-01 "-10 years" "+1 hour"; do
    sleep 0.1
    kill -0 $client 2> /dev/null || break
    date -s "$when" > /dev/null || exit 1
    on 0 status > /dev/null || exit 1
    jumps=$((jumps + 1))
done
wait $client && wait $server || { cat /out/client /out/server; exit 1; }
cat /out/client
grep -q "invalid data" /out/client /out/server && exit 1
echo "$jumps jumps"
[ $jumps -ge 3 ]
