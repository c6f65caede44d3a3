# Two hosts: RDMA between them; then the second dies, and the first goes on for ever.
set -eu
. "$VM_LIB"
if [ "$HOST_INDEX" = 0 ]; then
    ib_send_bw -x 1 -s 4096 -n 100 &
    server=$!
    wait_for_port 18515
    meet listening
    wait $server
    meet done
    exec sleep infinity
else
    meet ready
    ib_send_bw -x 1 -s 4096 -n 100 10.99.0.1
    meet done
    echo c > /proc/sysrq-trigger
fi
