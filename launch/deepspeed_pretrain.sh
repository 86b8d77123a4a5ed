#!/usr/bin/env bash
# Pretraining under DeepSpeed's own launcher, for clusters with ssh (and pdsh) between the nodes.
#
#   bash launch/deepspeed_pretrain.sh HOSTFILE --config vit_small --run_dir runs/first --data.shards shards
#
# HOSTFILE has a line `node1 slots=8` for every node. All nodes must see this folder and the run folder at the same paths.
# Ends as the run ended: 0 finished, 2 refused, 3 failed, 75 unfinished (start it again; it goes on where it stopped).
set -euo pipefail
python -c 'import launch, ccd_train' 2>/dev/null || {
    echo "error: $(command -v python || echo python) does not know this package; activate the environment it is installed in" >&2
    exit 2
}
exec python -m launch.hostfile "$@"
