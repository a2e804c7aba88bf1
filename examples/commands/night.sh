#!/usr/bin/env bash
# Trains three models, as many at a time as there are GPUs free for them, and says which are any good.
# DEVICES=simulated:4 tries it without a GPU.
cd "$(dirname "$0")" || exit

on_gpus() {
    gpu-launcher run ${DEVICES:+--devices "$DEVICES"} "$@"
}

on_gpus -- python train.py line 1 & line=$!
on_gpus --gpus 2 --timeout 8h -- python train.py cubic 3 & cubic=$!
on_gpus --memory 8GiB --priority -1 -- python train.py constant 0 & constant=$!

failed=0
for job in $line $cubic $constant; do
    wait "$job" || failed=$((failed + 1)) # the exit code is the script's own
done
echo "$failed of 3 failed"
