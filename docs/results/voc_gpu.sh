#!/bin/sh
# What one GPU adds to the tables of docs/results.md and docs/performance.md, in about ten minutes on an H100:
#     DATA=folder_with_VOCdevkit WEIGHTS=efficientnet-lite0.pth OUT=folder sh docs/results/voc_gpu.sh
# ITRS=4 CROP=65 BATCH=2 DEVICE=cpu VAL=val200 tries the script on a CPU.
set -e
ITRS=${ITRS:-4000} CROP=${CROP:-513} BATCH=${BATCH:-16} DEVICE=${DEVICE:-cuda} VAL=${VAL:-val200}
mkdir -p "$OUT"

python main.py --year 2012_aug --data_root "$DATA" --run_dir runs --run_name voc_gpu --device "$DEVICE" \
    --model deeplabv3plus_tf_efficientnet_lite0 --backbone_weights "$WEIGHTS" --num_workers 8 \
    --lr 0.02 --backbone_lr_factor 0.2 --lr_policy poly --warmup_itrs 100 --total_itrs "$ITRS" \
    --batch_size "$BATCH" --crop_size "$CROP" --val_split "$VAL" --val_interval "$ITRS" --continue_training
cp runs/voc_gpu/log.txt runs/voc_gpu/history.csv "$OUT"
# Half the size of a checkpoint's weights, so that it is quick to fetch. Score it on all of val where the data are.
python -m utils.weights.bundle --ckpt runs/voc_gpu/latest.pth --out "$OUT/voc_gpu.safetensors"

# Speed of every part, and the peak memory of a training step of ResNet-50 at batch 8 and crop 513.
compile=$([ "$DEVICE" = cuda ] && echo --compile || true)
python -m utils.benchmark --device "$DEVICE" $compile --json "$OUT/speed.json"
