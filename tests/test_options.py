import re
from pathlib import Path

import pytest

import visualize
from utils.errors import InputError
from utils.options import flags_page, get_parser

ROOT = Path(__file__).parent.parent


def test_defaults_are_the_experiment_of_the_readme():
    opts = get_parser().parse_args([])
    assert (opts.lr, opts.backbone_lr_factor, opts.momentum, opts.weight_decay) == (0.01, 0.1, 0.9, 1e-4)
    assert (opts.lr_policy, opts.step_size, opts.gamma, opts.warmup_itrs) == ("step", 1000, 0.9, 0)
    assert (opts.total_itrs, opts.batch_size, opts.crop_size, opts.val_interval) == (5000, 8, 513, 0)
    assert (opts.dataset, opts.loss_type, opts.focal_gamma) == ("voc", "cross_entropy", 2.0)
    assert (opts.backbone_weights, opts.amp, opts.device, opts.random_seed) == ("imagenet", "auto", "auto", 1)


def test_every_flag_is_read_somewhere():
    sources = [ROOT / "main.py", *(ROOT / "utils").rglob("*.py"), *(ROOT / "datasets").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    for name in vars(get_parser().parse_args([])):
        assert re.search(rf"opts\.{name}\b", text) or name in ("model", "output_stride"), f"--{name} is never read"


def test_flags_page_is_up_to_date():
    page = (ROOT / "docs" / "flags.md").read_text()
    assert page == flags_page(), "run: python -m utils.options > docs/flags.md"


@pytest.mark.parametrize("parser", [get_parser(), visualize.get_parser()], ids=["main", "visualize"])
def test_no_flag_is_of_type_bool(parser):
    """`type=bool` takes the text "False" for true."""
    commands = [action for action in parser._actions if action.choices and hasattr(action.choices, "values")]
    parsers = [parser, *(command for action in commands for command in action.choices.values())]
    assert all(action.type is not bool for p in parsers for action in p._actions)


def test_every_flag_of_visualize_is_read():
    text = (ROOT / "visualize.py").read_text() + (ROOT / "utils" / "pictures" / "sam.py").read_text()
    commands = visualize.get_parser()._subparsers._group_actions[0].choices
    for action in (action for command in commands.values() for action in command._actions):
        assert action.dest == "help" or f"opts.{action.dest}" in text, action.dest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--batch_size 0", "--batch_size: 0 is out of range; give 1 or more"),
        ("--total_itrs -5", "--total_itrs"),
        ("--lr nan", "--lr: nan is out of range; give 0 or more"),
        ("--lr inf", "--lr: inf"),
        ("--random_seed 20250101123456", "--random_seed: 20250101123456 is out of range; give 0 to 4294967295"),
        ("--gamma 1.5", "--gamma: 1.5 is out of range; give 0 to 1"),
        ("--crop_size 33.5", "--crop_size: invalid int value: '33.5'"),
        ("--model deeplabv4", "--model: deeplabv4: unknown model"),
        ("--loss_type dice", "--loss_type: invalid choice"),
        ("--outputstride 16", "unrecognized arguments: --outputstride"),
        ("--batch 8", "unrecognized arguments: --batch"),
    ],
)
def test_bad_flag_is_one_line_with_flag_and_value(arguments, words):
    with pytest.raises(InputError, match=re.escape(words)) as error:
        get_parser().parse_args(arguments.split())
    assert "\n" not in str(error.value)
