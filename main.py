"""Train, evaluate and resume DeepLabV3 and DeepLabV3+.

    python main.py --download                                # PASCAL VOC 2012 with the defaults
    python main.py --dataset folder --data_root my_data      # your own masks, in VOC layout
    python main.py --dataset shapes --backbone_weights none  # generated data, nothing to download
    python main.py --continue_training                       # resume where the run stopped
    python main.py --test_only --ckpt runs/NAME/best.pth     # evaluate a checkpoint
    torchrun --nproc_per_node 4 main.py --batch_size 16      # four GPUs, 16 images per step in all

The flags are in `utils/options.py` and under --help. A run writes everything to runs/NAME.
"""

import logging
import time
from argparse import Namespace

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, PolynomialLR, StepLR
from tqdm import tqdm

from datasets.audit import require_sound
from datasets.loader import end_workers, eval_loader, open_eval_set, open_train_set, train_loader
from datasets.stats import count_class_weights
from utils.checkpoint import TrainingState, out_of_patience, require_finite
from utils.cli import friendly_errors, is_out_of_memory
from utils.distributed import (
    from_main,
    is_main,
    local_main_first,
    parallel,
    rank,
    require_same_ids,
    session,
    world_size,
)
from utils.engine import choose_amp, choose_device, compile_model, evaluate, forward_backward, parse_tta, seed_step
from utils.environment import device_name
from utils.errors import InputError, SampleError
from utils.loss import build_loss
from utils.metrics import RunningMean, scores
from utils.options import check_options, get_parser, memory_advice, notes_on_batches, require_labels
from utils.pictures.plotting import PredictionWriter, draw_curves, prediction_strips
from utils.run import Run, finished_scores, open_run
from utils.signals import StopSignals
from utils.visualizer import Dashboards, open_dashboards
from utils.weights.load import initial_model

log = logging.getLogger("deeplab")


def train(
    opts: Namespace, run: Run, checkpoint: dict | None, *, device: torch.device, amp: torch.dtype | None
) -> dict:
    """Trains from scratch, from weights, or from where a run stopped; returns the scores of the last validation."""
    # Data and model. One process per machine goes first: the others find what it has downloaded or generated.
    with local_main_first():
        val_set = open_eval_set(opts, checkpoint, run.folder / "splits")
        train_set = open_train_set(opts, checkpoint, run.folder / "splits")
        model = initial_model(opts, checkpoint, val_set.class_names, device)
    require_same_ids(val_set, train_set)
    log.info(f"Dataset: {opts.dataset}, Train set: {len(train_set)}, Val set: {len(val_set)}")

    # SGD, with the backbone at a fraction of the learning rate. Fused is one kernel for all weights, but if a scaler
    # skips the first step it leaves the momentum uninitialised.
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    fused = True if device.type == "cuda" and not scaler.is_enabled() else None
    backbone = {"params": model.backbone.parameters(), "lr": opts.lr * opts.backbone_lr_factor}
    head = {"params": model.classifier.parameters(), "lr": opts.lr}
    optimizer = SGD([backbone, head], momentum=opts.momentum, weight_decay=opts.weight_decay, fused=fused)

    # The learning rate of each iteration: StepLR or poly, after a linear warm-up of 0 or more iterations.
    warmup = LinearLR(optimizer, start_factor=1 / (opts.warmup_itrs + 1), total_iters=opts.warmup_itrs)
    if opts.lr_policy == "poly":
        schedule = PolynomialLR(optimizer, total_iters=opts.total_itrs, power=0.9)
    else:
        schedule = StepLR(optimizer, step_size=opts.step_size, gamma=opts.gamma)
    scheduler = ChainedScheduler([warmup, schedule], optimizer)

    # The loss, a mean over the valid pixels: cross-entropy by default.
    weights = count_class_weights(train_set, opts.class_weights, device)
    criterion = build_loss(
        opts.loss_type, gamma=opts.focal_gamma, threshold=opts.ohem_threshold, keep=opts.ohem_keep, weights=weights
    )

    # The state of the training, its batches, its folder and its dashboards.
    per_epoch = len(train_set) // opts.batch_size
    state = TrainingState(model, optimizer, scheduler, scaler, itrs_per_epoch=per_epoch, warmup_itrs=opts.warmup_itrs)
    if opts.continue_training and checkpoint:
        state.restore(checkpoint, opts.ckpt)
    loader = train_loader(opts, train_set, device, start_itr=state.itr, rank=rank(), processes=world_size())
    val_loader = eval_loader(opts, val_set, device, rank=rank(), processes=world_size())
    val_interval = opts.val_interval or per_epoch
    if opts.patience:
        itrs = opts.patience * val_interval
        log.info(f"--patience {opts.patience}: stops after {itrs:,} iterations without a better mIoU")
    net = compile_model(parallel(model)) if opts.compile else parallel(model)
    if is_main():
        require_sound(opts, [train_set, val_set], fresh=not (opts.continue_training and checkpoint))
        run.start(opts, device, [train_set, val_set], resumed_at=state.validated_itr)
    vis = open_dashboards(opts, run.folder / "tb", resumed_at=state.itr) if is_main() else Dashboards()
    vis.start(vars(opts), run.history())
    writer = PredictionWriter(run.folder / "results", val_set) if opts.save_val_results else None
    hidden = None if is_main() else True  # None: hidden only where there is no terminal
    bar = tqdm(total=opts.total_itrs, initial=state.itr, desc="training", dynamic_ncols=True, disable=hidden)
    since_log, stop = RunningMean(), StopSignals()
    try:
        batches = iter(loader)
        model.train()
        while True:
            # Validate every epoch and at the end; a run whose validation was interrupted resumes with it.
            done = state.itr >= opts.total_itrs
            if (done or state.itr % val_interval == 0) and state.itr > state.validated_itr:
                require_finite(state.losses, state.itr, loader)
                trained = time.perf_counter()
                log.info(f"validation after iteration {state.itr}...")
                loss_sum = torch.zeros((), device=device)
                matrix = evaluate(model, val_loader, amp=amp, on_batch=writer, stop=stop, loss_sum=loss_sum)
                if stop.requested():
                    break
                result = scores(require_labels(matrix, opts))
                is_best = state.add_validation(result, val_loss=float(loss_sum / matrix.sum()))
                if is_main():
                    rows = run.add_validation(state, matrix, val_set.class_names, trained=trained)
                    draw_curves({run.folder.name: rows}, run.folder / "curves.png")
                    # The best model is saved first: a kill between the two saves must not lose it.
                    if is_best:
                        run.save("best.pth", state, opts=opts, dataset=val_set)
                    run.save("latest.pth", state, opts=opts, dataset=val_set)
                    num_strips = opts.vis_num_samples if opts.enable_vis or opts.tensorboard else 0
                    strips = prediction_strips(model, val_set, num_strips, amp)
                    vis.validation(rows[-1], val_set.class_names, state.scores["Class IoU"], strips)
                done |= out_of_patience(opts.patience, state.since_best)
                state.clock = time.perf_counter()

            # Leave at the end, without patience left, or after a stop signal to any process.
            if done or stop.requested():
                break

            # Take one step, on this process's share of the batch.
            images, targets = (batch.to(device, non_blocking=True) for batch in next(batches))
            seed_step(opts.random_seed, state.itr)
            optimizer.zero_grad(set_to_none=True)
            loss = forward_backward(net, criterion, images, targets, scaler=scaler, amp=amp, parts=opts.grad_accum)
            scaler.step(optimizer)
            scaler.update()
            state.add_step(loss, lr=scheduler.get_last_lr()[-1])
            scheduler.step()

            # Log the mean loss since the last line.
            since_log.add(loss)
            bar.update()
            if state.itr % opts.print_interval == 0 or state.itr == opts.total_itrs:
                require_finite(since_log, state.itr, loader)
                mean = since_log.pop()
                bar.set_postfix_str(f"loss={mean:.4f}, lr={state.lr:.2e}")
                log.info(f"Epoch {state.epoch}, Itrs {state.itr}/{opts.total_itrs}, Loss={mean:.6f}")
                vis.step(state.itr, mean, state.lr)

        # After a stop: save, so that the run can resume.
        if not done or state.itr > state.validated_itr:
            if is_main():
                run.save("latest.pth", state, opts=opts, dataset=val_set)
            log.info(f"The run was interrupted at iteration {state.itr}. Add --continue_training to resume.")
            raise SystemExit(128 + stop.received)
    except SampleError:
        # Only this process knows of the error, so only the main process can save without the others.
        if is_main() and state.itr:
            run.save("latest.pth", state, opts=opts, dataset=val_set)
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise InputError(memory_advice(opts, state.itr + 1, amp=amp, processes=world_size())) from None
        raise
    finally:
        bar.close()
        vis.close()
        end_workers(loader, val_loader)
        # Last, because torchrun sends SIGTERM to the processes that another one has left behind.
        stop.close()
    log.info(state.summary(opts.patience))
    return state.scores


def test(opts: Namespace, run: Run, checkpoint: dict, *, device: torch.device, amp: torch.dtype | None) -> dict:
    """Evaluates a checkpoint on `--val_split`, writes scores and card to `test_<split>` and returns the scores."""
    from utils.against import read_against  # training has no card
    from utils.card import Card, write_card

    with local_main_first():
        test_set = open_eval_set(opts, checkpoint, run.folder.parent / "splits")
        model = initial_model(opts, checkpoint, test_set.class_names, device)
    require_same_ids(test_set)
    log.info(f"Dataset: {opts.dataset}, Test set: {len(test_set)} ({opts.val_split})")
    loader = eval_loader(opts, test_set, device, rank=rank(), processes=world_size())
    if is_main():
        require_sound(opts, [test_set], fresh=False)
        other = read_against(opts.against, test_set.ids, test_set.class_names)
        run.start(opts, device, [test_set])
    log.info("validation...")
    writer = PredictionWriter(run.folder / "results", test_set) if opts.save_val_results else None
    card = Card(test_set.ids, test_set.num_classes, device, also=writer)
    try:
        matrix = evaluate(model, loader, amp=amp, tta=parse_tta(opts.tta) if opts.tta else None, on_batch=card)
    finally:
        end_workers(loader)
    result, figures = scores(require_labels(matrix, opts)), card.gather().compute()
    if is_main():
        run.write_scores(result, matrix, test_set.class_names, boundary_iou=figures["class_boundary_iou"])
        write_card(run.folder, figures, result, opts=opts, class_names=test_set.class_names, against=other)
    return result


@friendly_errors
def main(argv: list[str] | None = None) -> dict:
    """Runs a command line; returns the last scores, named as in `utils.metrics.scores`."""
    with session():
        opts = get_parser().parse_args(argv)
        check_options(opts, processes=world_size())
        if opts.export:
            from utils.weights.onnx import export_checkpoint  # training does not need it

            return export_checkpoint(opts)
        device = choose_device(opts.device)
        amp = choose_amp(opts.amp, device)
        opts, run, checkpoint = from_main((opts, *open_run(opts)) if is_main() else None)
        with run:
            log.info(f"Device: {device_name(device)}, {str(amp or torch.float32).removeprefix('torch.')}")
            for note in notes_on_batches(opts, device, processes=world_size()):
                log.info(note)
            if finished := finished_scores(opts, checkpoint):
                return finished
            try:
                return (test if opts.test_only else train)(opts, run, checkpoint, device=device, amp=amp)
            except SampleError as error:
                raise InputError(f"{error}; or add --skip_bad to leave such samples out") from None


if __name__ == "__main__":
    main()
