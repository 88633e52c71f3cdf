"""The optimizer and its schedule."""

import argparse

from torch.optim import SGD, lr_scheduler

from network._deeplab import DeepLab


def build_optimizer(
    opts: argparse.Namespace, model: DeepLab, *, scaled: bool = False
) -> tuple[SGD, lr_scheduler.LRScheduler]:
    """SGD with the backbone at a lower rate (group 0; the head is group 1), and the schedule of both rates.

    The schedule is stepped every iteration: `lr`, times `gamma` after every `step_size` iterations or times
    (1 - iteration / total)^0.9, times a factor that rises linearly to 1 in the warm-up, if there is one.
    scaled: whether a GradScaler scales the loss (fp16).
    """
    groups = [
        {"params": model.backbone.parameters(), "lr": opts.lr * opts.backbone_lr_factor},
        {"params": model.classifier.parameters(), "lr": opts.lr},
    ]
    # One kernel for all weights; but where a scaler skips the first step, it leaves the momentum uninitialised.
    fused = True if model.device.type == "cuda" and not scaled else None
    optimizer = SGD(groups, lr=opts.lr, momentum=opts.momentum, weight_decay=opts.weight_decay, fused=fused)
    schedules = []
    if opts.warmup_itrs:
        first = 1 / (opts.warmup_itrs + 1)
        schedules.append(lr_scheduler.LinearLR(optimizer, start_factor=first, total_iters=opts.warmup_itrs))
    if opts.lr_policy == "poly":
        schedules.append(lr_scheduler.PolynomialLR(optimizer, total_iters=opts.total_itrs, power=0.9))
    else:
        schedules.append(lr_scheduler.StepLR(optimizer, step_size=opts.step_size, gamma=opts.gamma))
    return optimizer, lr_scheduler.ChainedScheduler(schedules, optimizer)
