#!/bin/sh
# Cross-entropy against focal loss: the same seed, data and budget. From the repository's root:
#     DATA=folder_with_VOCdevkit WEIGHTS=efficientnet-lite0-57934424.pth sh docs/results/voc_pair.sh
set -e
for loss in cross_entropy focal_loss; do
    python main.py --year 2012_aug --data_root "$DATA" --run_name "pair_$loss" --loss_type $loss --continue_training \
        --model deeplabv3plus_tf_efficientnet_lite0 --backbone_weights "$WEIGHTS" --amp off --num_workers 1 \
        --lr 0.02 --backbone_lr_factor 0.2 --lr_policy poly --warmup_itrs 40 --total_itrs 400 \
        --crop_size 193 --train_scale 0.4,1.25 --val_split val200 --val_interval 200 --print_interval 20
done
test="python main.py --test_only --year 2012_aug --data_root $DATA --amp off"
$test --ckpt runs/pair_cross_entropy/latest.pth
$test --ckpt runs/pair_focal_loss/latest.pth --against runs/pair_cross_entropy/test_val
python visualize.py curves runs/pair_cross_entropy runs/pair_focal_loss
python visualize.py compare --ckpt runs/pair_cross_entropy/latest.pth runs/pair_focal_loss/latest.pth \
    --data_root "$DATA" --split val
