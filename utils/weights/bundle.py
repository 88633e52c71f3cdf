"""Packs a checkpoint into a small file to share: weights in half precision, everything else as JSON beside them.

    python -m utils.weights.bundle --ckpt runs/NAME/latest.pth --out model.safetensors --note "data, source, licence"

`--ckpt model.safetensors` works everywhere. It has no training state: it can be tested, exported and started from,
not resumed.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from utils.cli import Parser, any_path, friendly_errors
from utils.files import replacing
from utils.weights.load import KEYS, load_checkpoint

# Options that name places on the machine that trained the model.
PATHS = {"data_root", "run_dir", "ckpt", "init_from", "backbone_weights"}


def bundle(checkpoint: dict, out: Path, *, note: str) -> None:
    """Writes a checkpoint with tensors and JSON only. Convolutions are float16, batch norms stay float32."""
    # Convolutions have four dimensions; what a batch norm counts would not fit into float16.
    state = {
        name: (value.half() if value.ndim == 4 else value).contiguous()
        for name, value in checkpoint["model_state"].items()
    }
    rest = {name: value for name, value in checkpoint.items() if name in KEYS | {"normalization", "about"}}
    rest |= {"optimizer_state": {}, "scheduler_state": {}, "scaler_state": {}, "published": note}
    rest["options"] = {name: value for name, value in rest["options"].items() if name not in PATHS}
    rest["about"] = {name: value for name, value in rest.get("about", {}).items() if name != "command"}
    del rest["model_state"]
    with replacing(out) as temporary:
        save_file(state, temporary, metadata={"deeplab": json.dumps(rest)})


def get_parser() -> Parser:
    parser = Parser(prog="python -m utils.weights.bundle", description="Pack a checkpoint into a small file.")
    parser.add_argument("--ckpt", type=any_path, required=True, metavar="FILE", help="checkpoint written by main.py")
    parser.add_argument("--out", type=any_path, required=True, metavar="FILE.safetensors", help="file to write")
    parser.add_argument("--note", default="a bundled model", help="data, source and licence, shown by the log")
    return parser


@friendly_errors
def main(argv: Sequence[str] | None = None) -> None:
    opts = get_parser().parse_args(argv)
    bundle(load_checkpoint(opts.ckpt), Path(opts.out), note=opts.note)
    print(f"Written: {opts.out}, {Path(opts.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
