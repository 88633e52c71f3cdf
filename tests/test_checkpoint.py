import copy
import os
import pickle

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from network import build_model
from utils.checkpoint import TrainingState, save_checkpoint
from utils.errors import InputError
from utils.weights.load import KEYS, load_checkpoint, load_file, load_model_state, require_classes


def complete(**changes):
    states = {name: {} for name in KEYS if name.endswith("_state")}
    options = {"model": "deeplabv3_resnet50", "output_stride": 16}
    content = {"options": options, "class_names": ["sky", "road"], "palette": [[0, 0, 0]], "scores": None}
    return states | content | {"cur_itrs": 0, "best_itr": 0, "best_score": 0.5} | changes


def test_checkpoint_comes_back_and_leaves_no_temporary_file(tmp_path):
    save_checkpoint(tmp_path / "a.pth", complete(cur_itrs=7, model_state={"w": torch.arange(3)}))
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint["cur_itrs"] == 7 and torch.equal(checkpoint["model_state"]["w"], torch.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_save_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "a.pth", complete(cur_itrs=7))
    with pytest.raises(Exception, match="pickle|local"):
        save_checkpoint(tmp_path / "a.pth", complete(cur_itrs=8, options=lambda: 0))
    assert load_checkpoint(tmp_path / "a.pth")["cur_itrs"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_missing_file_is_refused_never_ignored(tmp_path):
    with pytest.raises(InputError, match=r"--ckpt .*typo\.pth: no such file"):
        load_checkpoint(tmp_path / "typo.pth")
    with pytest.raises(InputError, match=r"--ckpt n+: no such file"):
        load_checkpoint("n" * 300)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_file_with_code_in_it_is_refused_and_nothing_runs(tmp_path, writer):
    writer(complete(options=Malicious(tmp_path / "ran")), tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth: holds more than tensors and builtins"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_file_cut_short_is_refused_by_name(tmp_path, keep):
    save_checkpoint(tmp_path / "a.pth", complete(model_state={"w": torch.randn(1000)}))
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(InputError, match=r"a\.pth") as error:
        load_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


def test_damaged_files_are_refused_whatever_is_damaged(tmp_path):
    rng = np.random.default_rng(0)
    for legacy in (False, True):
        path = tmp_path / "a.pth"
        content = complete(model_state={"w": torch.randn(30)})
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        sound = np.frombuffer(path.read_bytes(), np.uint8)
        for number in range(150):
            damaged = sound.copy()
            damaged[rng.integers(0, len(sound), 4)] = rng.integers(0, 256, 4)
            if number % 3 == 0:
                damaged = damaged[: rng.integers(0, len(sound))]
            path.write_bytes(damaged.tobytes())
            try:
                load_checkpoint(path)  # damage to a number may go unseen
            except InputError as error:
                assert "a.pth" in str(error) and "\n" not in str(error)


def test_file_of_another_kind_is_refused(tmp_path):
    torch.save({"model_state": {}, "options": {}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"not a checkpoint of main\.py, best_itr, .*, scores is missing"):
        load_checkpoint(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"--backbone_weights .*b\.pth: holds a list"):
        load_file(tmp_path / "b.pth", "--backbone_weights")


def test_other_classes_are_refused_with_both_lists():
    require_classes(["sky", "road"], ["sky", "road"], "a.pth")
    with pytest.raises(InputError, match=r"2 classes \(sky, road\), but the data set has 2 \(road, sky\)"):
        require_classes(["sky", "road"], ["road", "sky"], "a.pth")


def test_weights_of_another_model_are_refused():
    state = build_model("deeplabv3_mobilenet_v3_large", num_classes=2).state_dict()
    model = build_model("deeplabv3plus_mobilenet_v3_large", num_classes=2)
    fault = r"a\.pth: the weights do not fit the model \(classifier\.project\.0\.weight: missing; \d+ such"
    with pytest.raises(InputError, match=fault):
        load_model_state(model, complete(model_state=state), "a.pth")


@pytest.mark.parametrize("state", [0, None, {}, {"w": 3}, {3: torch.zeros(1)}])
def test_weights_that_are_none_are_refused(state):
    with pytest.raises(InputError, match=r"--ckpt a\.pth: holds no state dict"):
        load_model_state(torch.nn.Linear(2, 1), complete(model_state=state), "a.pth")


def training_state(lr=0.1, make=lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.5)):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return TrainingState(model, optimizer, make(optimizer), torch.amp.GradScaler("cpu", enabled=False))


def steps(state, count):
    rates = []
    for _ in range(count):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.optimizer.zero_grad()
        state.model(torch.ones(1, 2)).square().sum().backward()
        state.optimizer.step()
        state.scheduler.step()
        state.itr += 1
    return rates


def frozen(state):
    checkpoint = {
        "optimizer_state": state.optimizer.state_dict(),
        "scaler_state": {},
        "cur_itrs": state.itr,
        "scores": None,
        "best_score": 0.5,
        "best_itr": 2,
    }
    return copy.deepcopy(checkpoint)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.9),
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 11, 0.9),
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [lr_scheduler.LinearLR(optimizer, 0.2, total_iters=4), lr_scheduler.PolynomialLR(optimizer, 11, 0.9)],
            optimizer,
        ),
    ],
    ids=["step", "poly", "warm-up"],
)
@pytest.mark.parametrize("stop", [0, 1, 5, 10])
def test_rates_and_weights_go_on_bit_for_bit(make, stop):
    whole = training_state(make=make)
    rates = steps(whole, 11)
    first = training_state(make=make)
    steps(first, stop)
    second = training_state(make=make)
    second.model.load_state_dict(first.model.state_dict())
    second.restore(frozen(first), "a.pth")
    assert second.itr == stop and (second.best_score, second.best_itr) == (0.5, 2)
    assert steps(second, 11 - stop) == rates[stop:]
    assert torch.equal(second.model.weight, whole.model.weight)


@pytest.mark.parametrize("stored", [{}, {"scale": 512.0}])
def test_training_goes_on_in_fp16_whether_or_not_it_began_so(stored):
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    checkpoint = frozen(training_state()) | {"scaler_state": scaler.state_dict() | stored if stored else {}}
    state = training_state()
    state.scaler = scaler
    state.restore(checkpoint, "a.pth")
    assert scaler.state_dict()["scale"] == stored.get("scale", 65536.0)


def test_rate_of_the_command_line_holds_when_it_changes():
    first = training_state(lr=0.1)
    steps(first, 4)
    second = training_state(lr=1.0)
    second.restore(frozen(first), "a.pth")
    assert steps(second, 3) == [0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": []}, "its options has the wrong type"),
        ({"options": {"model": "a"}}, "its options lack output_stride"),
        ({"class_names": 5}, "its class_names has the wrong type"),
        ({"cur_itrs": "4"}, "its cur_itrs has the wrong type"),
    ],
)
def test_a_checkpoint_of_other_kinds_is_refused(tmp_path, changes, words):
    torch.save(complete() | changes, tmp_path / "a.pth")
    with pytest.raises(InputError, match=words):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.eye(2).to_sparse(), "not a plain tensor"),
        (torch.ones(2, device="meta"), "not a plain tensor"),
    ],
)
def test_weights_that_cannot_be_computed_with_are_refused(tmp_path, value, words):
    torch.save(complete(model_state={"weight": value}), tmp_path / "a.pth")
    with pytest.raises(InputError, match=words):
        load_model_state(torch.nn.Linear(1, 2, bias=False), load_checkpoint(tmp_path / "a.pth"), "a.pth")
