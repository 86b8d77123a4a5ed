#!/usr/bin/env bash
# CCD pretraining from nothing to a run that was interrupted and went on, in a few minutes on 2 CPU cores.
#   bash launch/quickstart.sh            on 2,000 words that it renders itself
#   bash launch/quickstart.sh LMDB       on your own word images (image-%09d, num-samples)
# Everything goes into quickstart/; what is there already (.venv, words, shards) is used again.
set -euo pipefail
lmdb=${1:+$(realpath -- "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/set_up.sh
STEPS=${STEPS:-120}

once() {  # once FOLDER COMMAND… : runs the command with `--out FOLDER`, unless the folder is there; complete or not there
    [ -d "$1" ] && return
    rm -rf "$1.part"
    "${@:2}" --out "$1.part"
    mv "$1.part" "$1"
}

pretrain() {
    NPROC=2 exec bash launch/torchrun_pretrain.sh --config vit_nano --run_dir "$run" --data.shards "$shards" \
        --data.workers 1 --max-steps "$STEPS" --train.micro_batch_size 16 --log.every_steps 5 --log.pictures_every_steps 40
}

last_step() {
    tail -n 1 "$run/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": *\([0-9]*\).*/\1/p'
}

set_up ''
if [ -z "$lmdb" ]; then
    work=quickstart/words lmdb=quickstart/words/lmdb
    once "$lmdb" ccd-data synth --num-samples 2000 --seed 1 --labels
else
    work=quickstart/$(basename "$lmdb")-$(cksum <<< "$lmdb" | cut -d ' ' -f 1)
fi
shards=$work/shards
once "$shards" ccd-data convert --src "$lmdb" --name words --workers 2 --samples-per-shard 500
ccd-data verify "$shards"

run=$work/run-$(date +%Y%m%d-%H%M%S)
echo "pretraining vit_nano with 2 processes under DeepSpeed, to be interrupted half way …"
(pretrain) & first=$!
trap 'kill "$first" 2>/dev/null' EXIT
while kill -0 "$first" 2>/dev/null && [ "$(($(last_step) + 0))" -lt $((STEPS / 2)) ]; do sleep 0.2; done
echo "SIGTERM at step $(last_step), as a scheduler sends it before it takes a machine away …"
kill -TERM "$first" 2>/dev/null || true
code=0
wait "$first" || code=$?
trap - EXIT
[ "$code" = 75 ] || stop "the first half ended with exit code $code, where 75 (unfinished) was expected; see $run"

echo "the same command once more: it goes on where it stopped …"
(pretrain)
ccd-train report "$run"
cat <<END

finished: $STEPS steps, interrupted half way.
  run folder    $run
  report        $run/report.html
  pictures      $run/pictures
  TensorBoard   .venv/bin/tensorboard --logdir $run/tensorboard
next, after . .venv/bin/activate (120 steps are too few to read by; docs/finetuning.md says how much it takes):
  ccd-train views --data.shards $shards --out views.png
  ccd-train probe --weights $run --data $lmdb
  ccd-train finetune --config recognizer_nano --init $run --data.train $lmdb --data.valid OTHER_WORDS --run_dir reader
END
