#!/usr/bin/env bash
# preStop hook of a worker pod: k8s/drain.sh SECONDS
#
# Kubernetes deletes pods without asking Ray. This tells Ray that the node has SECONDS left: Ray Serve starts replicas
# elsewhere, sends them what is new, and stops the ones here once their requests are answered. The raylet ends by itself
# when nothing runs on its node any more, and with it the container.
set -euo pipefail

ray drain-node --address "$RAY_ADDRESS" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "pod $HOSTNAME is being deleted" --deadline-remaining-seconds "$1"
while pgrep -x raylet >/dev/null; do sleep 1; done
