#!/usr/bin/env bash
# Pretraining under torchrun, on this machine or on several. Every argument goes to `ccd-train pretrain`.
#
#   bash launch/torchrun_pretrain.sh --config vit_small --run_dir runs/first --data.shards shards
#       all GPUs of this machine; without a GPU, 2 processes. NPROC=4 sets another number.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 bash launch/torchrun_pretrain.sh …
#       once on each machine, NODE_RANK counting from 0; MASTER_ADDR is the first one, MASTER_PORT (29500) free on it.
#
# Ends as the run ended: 0 finished, 2 refused, 3 failed, 75 unfinished (start it again; it goes on where it stopped).
set -euo pipefail

python -c 'import launch, ccd_train' 2>/dev/null || {
    echo "error: $(command -v python || echo python) does not know this package; activate the environment it is installed in" >&2
    exit 2
}
nproc=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
case $nproc in
    gpu) python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && right=yes ;;
    auto | cpu) right=yes ;;
    *[!0-9]* | 0*) ;;
    *) right=yes ;;
esac
[ -n "${right:-}" ] || {
    echo "error: NPROC=$nproc: no number of processes; give 1 or more, auto, cpu, or, where there is a GPU, gpu" >&2
    exit 2
}
if [ "${NNODES:-1}" = 1 ]; then
    rendezvous=(--standalone)
else
    : "${NODE_RANK:?which of the $NNODES machines is this one, counted from 0?}" "${MASTER_ADDR:?name of the first machine}"
    rendezvous=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
exec python -m launch.outcome \
    python -m launch.torchrun "${rendezvous[@]}" --nproc_per_node "$nproc" -m ccd_train "${VERB:-pretrain}" "$@"
