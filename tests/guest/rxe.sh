# Two rxe devices of one host: they are there, and what goes from one to the other crosses a wire.
set -eu
. "$VM_LIB"
rxe_pair
rdma link
ibv_devices
ib_send_bw -d rxe1 -x 1 -s 4096 -n 100 > /out/server 2>&1 &
server=$!
wait_for_port 18515
sent=$(cat /sys/class/net/v0/statistics/tx_packets)
ib_send_bw -d rxe0 -x 1 -s 4096 -n 100 10.77.0.2
wait $server || { cat /out/server; exit 1; }
sent=$(($(cat /sys/class/net/v0/statistics/tx_packets) - sent))
[ $sent -ge 100 ] || { echo "only $sent packets crossed the wire"; exit 1; }
echo "args: $*"
exit 7
