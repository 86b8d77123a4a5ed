#!/usr/bin/env bash
# Fine-tuning under torchrun: as torchrun_pretrain.sh, with its variables, for `ccd-train finetune`.
#   bash launch/torchrun_finetune.sh --config recognizer_small --run_dir runs/reader --init runs/first \
#       --data.train data_lmdb/training/ARD --data.valid data_lmdb/validation
VERB=finetune exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun_pretrain.sh" "$@"
