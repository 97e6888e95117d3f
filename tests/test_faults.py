"""Killed, starved, fed with damage: finished work stays, errors are one line.

FAULTS=n in the environment tries n of each kind.
"""

import json
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from commands import KILLED_STEP, Command
from conftest import ENCODER, KIT, TINY, build_once, run, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from kit.config import ModelConfig
from kit.data import csvs, folds, kitti, masks, readers, rle, samples
from kit.errors import UserError
from kit.network import model
from kit.training import callbacks, loaders, resolve

MANY = int(os.environ.get("FAULTS", 0))  # 0: a sample


def start(*flags, script=KIT / "train.py"):
    """Start train.py, or a script that imports it, in a process group of its own."""
    return Command(script, flags, merge=True)


PATCHED = """
import sys
sys.path.insert(0, {kit!r})
import train
from kit.cli import parse
from kit.errors import one_line_errors
{patch}
with one_line_errors():
    train.train(parse(train.Config, ""))
"""


def write_patched(folder, patch):
    """A script that is train.py with changes."""
    script = folder / "patched.py"
    script.write_text(PATCHED.format(kit=str(KIT), patch=patch))
    return script


def start_patched(folder, patch, *flags):
    return start(*flags, script=write_patched(folder, patch))


def wait_for(path, process, seconds=300):
    """Until a running process has written a file."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    """16 small images with masks: a run on them takes a second or two."""

    def build(root):
        rng = np.random.default_rng(0)
        for number in range(16):
            mask = np.zeros((48, 96), np.uint8)
            mask[16 + number :, 24:72] = 255
            image = rng.integers(0, 200, (48, 96, 3), np.uint8) + (mask // 8)[..., None]
            for folder, pixels in (("images", image), ("masks", mask)):
                (root / folder).mkdir(exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"f{number:02}.png")

    return build_once(tmp_path_factory, "frames", build)


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


# --------------------------------------------------------------------------------------------------
#  Interrupted
# --------------------------------------------------------------------------------------------------


def test_killed_at_random_moments_nothing_is_lost(frames, tmp_path):
    """SIGKILL again and again: files load, model.pt stays near the best, the run ends whole."""
    rng = np.random.default_rng(MANY)
    kills, survived, best, longest = MANY or 3, 0, 0.0, 5.0
    while kills:
        out = tmp_path / str(kills)
        flags = ("--data", frames, "--out", out, "--epochs", 6, *TINY)
        while True:
            began = time.monotonic()
            process = start(*flags)
            try:
                printed, _ = process.communicate(rng.uniform(0.5, longest) if kills else None)
                assert process.returncode == 0, printed
                longest = min(longest, time.monotonic() - began)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills, survived = kills - 1, survived + 1
            if (out / "last.ckpt").exists():
                model.read_checkpoint(out / "last.ckpt", "--resume")
            if (out / "model.pt").exists():
                found = model.load_model(out / "model.pt", "cpu").metrics
                reached = found.get("epoch", {}).get("MaxF", best)
                assert reached > best - callbacks.FALL_BACK
                best = max(best, reached)
        assert pd.read_csv(out / "metrics.csv").epoch.tolist() == [1, 2, 3, 4, 5, 6]
        assert not [path for path in out.iterdir() if path.name.endswith(".part")]
        best = 0.0
    print(f"{survived} kills survived")


def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(frames, tmp_path):
    """Also with workers, which Lightning fills before it tells the sampler the epoch."""
    killed = f"import os{KILLED_STEP}"
    flags = ("--data", frames, "--epochs", 3, *TINY, "--grow", "true")
    succeed("train.py", *flags, "--workers", 0, "--out", tmp_path / "whole")
    whole = pd.read_csv(tmp_path / "whole" / "metrics.csv").drop(columns="seconds")
    state = weights(tmp_path / "whole")
    for workers in (0, 2):
        out = tmp_path / f"cut{workers}"
        command = (*flags, "--workers", workers, "--out", out)
        process = start_patched(tmp_path, killed, *command)
        process.process.join(120)
        assert process.poll() == -signal.SIGKILL
        process.kill()  # its workers
        assert pd.read_csv(out / "metrics.csv").epoch.tolist() == [1]
        assert "after epoch 1" in succeed("train.py", *command)
        assert whole.equals(pd.read_csv(out / "metrics.csv").drop(columns="seconds"))
        own = weights(out)
        assert all(torch.equal(value, own[key]) for key, value in state.items())
        assert read_metrics(out) == read_metrics(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_politely_it_exports_what_was_reached(roads, tmp_path, number):
    process = start("--data", roads, "--out", tmp_path, "--epochs", 500, *TINY)
    wait_for(tmp_path / "last.ckpt", process)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == -number, printed
    assert "exports what was reached" in printed
    assert read_metrics(tmp_path)["image"]["all"]["images"] == 3
    assert (tmp_path / "last.ckpt").exists()
    assert "Traceback" not in printed


def test_ctrl_c_on_a_terminal_reaches_the_workers_too(roads, tmp_path):
    flags = ("--data", roads, "--out", tmp_path, "--epochs", 500, "--workers", 2, *TINY)
    process = start(*flags)
    wait_for(tmp_path / "last.ckpt", process)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT, printed
    assert "exports what was reached" in printed
    assert read_metrics(tmp_path)["image"]["all"]["images"] == 3
    assert "Traceback" not in printed


def test_a_worker_prints_its_errors_but_not_that_nobody_fetches_its_batch(capsys):
    for error in (ConnectionResetError("reset"), EOFError(), ValueError("broken")):
        loaders.print_error(type(error), error, None)
    assert capsys.readouterr().err == "ValueError: broken\n"


def test_while_it_exports_a_second_signal_ends_it_at_once():
    before = signal.getsignal(signal.SIGTERM)
    run = SimpleNamespace(rows=[], describe_end=str, signals=[], together=False)
    try:
        with callbacks.interruptible(run):
            handler = signal.getsignal(signal.SIGTERM)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                signal.signal(signal.SIGTERM, handler)  # as Lightning does at the end of a fit
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("choice", ["auto", "none", "file"])
def test_the_same_command_is_said_to_resume_only_where_it_does(tmp_path, choice):
    settings = {"lr": 1e-3, "resume": choice}
    clock, out = callbacks.Clock(3, 0, 0.0), tmp_path / "fold1"
    run = callbacks.TrainingCallback(out, tmp_path, clock, settings, pd.DataFrame())
    assert run.describe_end() == "no epoch is finished; the same command starts over"
    (tmp_path / "fold0").mkdir()
    (tmp_path / "fold0" / "last.ckpt").touch()  # the fold before it is kept
    flag = "" if choice == "auto" else " with --resume auto"
    assert run.describe_end() == f"the same command{flag} resumes"


def test_every_process_knows_that_a_finished_run_is_resumed(tmp_path):
    """Also before the first one has copied its model, or where another host has the copy."""
    earlier, settings = tmp_path / "earlier", {"lr": 1e-3, "devices": 2}
    earlier.mkdir()
    (earlier / "model.pt").touch()
    clock, out = callbacks.Clock(1, 0, 0.0), tmp_path / "out"
    run = callbacks.TrainingCallback(out, out, clock, settings, pd.DataFrame())
    assert run.nothing_to_train() == ""
    run.checkpoint, run.rows = earlier / "last.ckpt", [{"epoch": 1}]
    assert run.nothing_to_train().startswith("NOTHING WAS TRAINED")


# --------------------------------------------------------------------------------------------------
#  Starved
# --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_the_images(roads, tmp_path):
    patch = """
loss, steps = train.loss, []
def broken(*arguments):
    steps.append(1)
    return loss(*arguments) * (float("nan") if len(steps) > 14 else 1)
train.loss = broken
"""
    out = tmp_path / "out"
    process = start_patched(tmp_path, patch, "--data", roads, "--out", out, "--epochs", 9, *TINY)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    last = printed.strip().splitlines()[-1]
    assert "the loss: is nan in epoch 3" in last
    assert last.count(".png") == 4
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_memory_that_runs_out_makes_smaller_parts(frames, tmp_path):
    patch = """
import torch
step = train.SegmentationModule.training_step
def training_step(self, batch, index):
    if len(batch["image"]) > 1:
        raise torch.OutOfMemoryError("made up")
    return step(self, batch, index)
train.SegmentationModule.training_step = training_step
"""
    out = tmp_path / "out"
    process = start_patched(tmp_path, patch, "--data", frames, "--out", out, "--epochs", 2, *TINY)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "gradient accumulation over 2 parts" in printed
    assert "gradient accumulation over 4 parts" in printed
    rows = pd.read_csv(out / "metrics.csv")
    assert rows.epoch.tolist() == [1, 2]
    assert rows.lr.iloc[-1] == pytest.approx(0.01 * 5e-4, rel=0.01), "as many steps as without"


def test_memory_that_runs_out_in_the_lr_finder_makes_smaller_parts(frames, tmp_path):
    patch = """
import torch
step = train.SegmentationModule.training_step
def training_step(self, batch, index):
    if len(batch["image"]) > 2:
        raise torch.OutOfMemoryError("made up")
    return step(self, batch, index)
train.SegmentationModule.training_step = training_step
"""
    flags = ("--data", frames, "--out", tmp_path / "out", "--epochs", 2, "--lr", "auto", *TINY)
    process = start_patched(tmp_path, patch, *flags)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "gradient accumulation over 2 parts" in printed
    assert "--lr auto: chose" in printed
    assert pd.read_csv(tmp_path / "out" / "metrics.csv").epoch.tolist() == [1, 2]


def test_a_killed_worker_exports_and_names_the_flag(frames, tmp_path):
    patch = """
import os, signal, torch
read = train.samples.read_sample
item = train.SegmentationDataset.__getitem__
def broken(self, position):
    if torch.utils.data.get_worker_info() and int(self.epoch) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item(self, position)
train.SegmentationDataset.__getitem__ = broken
"""
    out = tmp_path / "out"
    flags = ("--data", frames, "--out", out, "--epochs", 9, "--workers", 1, *TINY)
    process = start_patched(tmp_path, patch, *flags)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    assert "Traceback" not in printed
    assert "exports what was reached" in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: the workers that load data: one was killed")
    assert last.endswith("take --workers 0")
    assert (out / "metrics.json").exists()


def test_a_full_disk_is_one_line_and_leaves_no_half_file(roads, tmp_path):
    """The system refuses to write files over 1 MB."""
    patch = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    out = tmp_path / "out"
    process = start_patched(tmp_path, patch, "--data", roads, "--out", out, "--epochs", 2, *TINY)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    assert "Traceback" not in printed
    assert "model.pt: cannot be written" in printed.strip().splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == ["augmented.jpg", "examples.jpg"]


def test_an_out_that_vanishes_is_one_line(roads, tmp_path):
    out = tmp_path / "out"
    process = start("--data", roads, "--out", out, "--epochs", 500, *TINY)
    wait_for(out / "metrics.csv", process)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        shutil.rmtree(out, ignore_errors=True)  # again: Lightning makes the checkpoint's folder
        time.sleep(0.02)
    printed, _ = process.communicate(timeout=1)
    assert process.returncode == 2, printed
    assert "cannot be written" in printed.strip().splitlines()[-1]


# --------------------------------------------------------------------------------------------------
#  Hostile and damaged files
# --------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("flag", ["--model", "--resume", "--encoder_weights"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_file_that_would_run_code_is_refused(roads, tmp_path, flag, kind):
    ran = tmp_path / "ran"
    path = tmp_path / "model.pt"
    if kind == "torch":
        torch.save({"state_dict": Bomb(ran), "callbacks": {}}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(ran)))
    flags = (flag, path, "--data", roads, "--out", tmp_path / "out")
    done = run("infer.py", *flags) if flag == "--model" else run("train.py", *TINY, *flags)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


def test_a_model_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000000)}, tmp_path / "large.pt")
    bomb = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(tmp_path / "large.pt") as large,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for part in large.infolist():
            archive.writestr(part.filename, large.read(part))
    assert bomb.stat().st_size < 10000
    with pytest.raises(UserError, match="bomb.pt: .*unpacks to more than its size"):
        model.read_checkpoint(bomb, "--model")
    with pytest.raises(UserError, match="bomb.pt: .*unpacks to more than its size"):
        model.build_network(ModelConfig(encoder="resnet18"), str(bomb))


WRONG = [
    {"height": "a"}, {"width": 0}, {"std": (0.0, 1.0, 1.0)}, {"top": float("nan")}, {"tiles": 3},
    {"tta": "yes"}, {"areas": (1e99,)}, {"extra": 1}, {"thresholds": (2.0,)}, {"temperature": 0.0},
    {"class_names": ("a", "b")}, {"thresholds": ()}, {"exclusive": True},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_with_impossible_settings_is_refused(trained, tmp_path, wrong):
    content = torch.load(trained / "model.pt", weights_only=True)
    torch.save(content | {"model": content["model"] | wrong}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: .*train again"):
        model.load_model(tmp_path / "model.pt", "cpu")


def test_a_postscript_file_named_png_is_not_run(trained, tmp_path):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    header = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_text(header)
    flags = ("--model", trained, "--data", tmp_path / "a.png", "--out", tmp_path / "out")
    done = run("infer.py", *flags, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 2
    assert "a.png: not an image" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def test_a_pipe_is_not_waited_for(trained, roads, tmp_path):
    (tmp_path / "a.png").symlink_to(next((roads / "testing" / "image_2").iterdir()))
    for name in ("b.png", "sample_submission.csv"):
        os.mkfifo(tmp_path / name)
    flags = ("--model", trained, "--data", tmp_path, "--out", tmp_path / "out")
    done = run("infer.py", *flags)
    assert done.returncode == 2
    assert "1 of 2 could not be used" in done.stderr
    assert "b.png: a folder, pipe or device" in done.stderr
    assert (tmp_path / "out" / "masks" / "a.png").exists()
    done = run("infer.py", *flags, "--submission", "rle")
    assert done.returncode == 2
    assert "sample_submission.csv" in done.stderr.strip().splitlines()[-1]


def test_a_decompression_bomb_is_refused_by_its_header(trained, tmp_path):
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 9))
    bomb = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    flags = ("--model", trained, "--data", tmp_path / "bomb.png", "--out", tmp_path / "out")
    done = run("infer.py", *flags)
    assert done.returncode == 2
    assert "bomb.png" in done.stderr.strip().splitlines()[-1]


def damaged(content, rng):
    """Cut somewhere, or some bytes changed."""
    if rng.random() < 0.5:
        return content[: int(rng.integers(0, len(content)))]
    changed = bytearray(content)
    for place in rng.integers(0, len(content), int(rng.integers(1, 20))):
        changed[place] = int(rng.integers(0, 256))
    return bytes(changed)


def test_damaged_files_are_refused_or_read_right(trained, roads, tmp_path):
    """Every reader on cut and changed files: a UserError or a result of the right kind."""
    rng = np.random.default_rng(MANY)
    row = next(samples.find_samples(str(roads), training=True).samples.itertuples())
    image = Image.open(row.image)
    size = image.size[::-1]
    image.convert("RGB").save(tmp_path / "whole.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0  # turned, as phones write it
    Image.new("RGB", (9, 5), "green").save(tmp_path / "phone.webp", exif=exif)
    (tmp_path / "whole.csv").write_text("id,rle_mask\num_000000,1 4 9 2\num_000001,\n")
    Image.new("L", size[::-1], 255).save(tmp_path / "mask.png")
    stems = {"um_000000", "um_000001"}
    named = [Path(f"{stem}.png") for stem in stems]

    def read_image(path):
        return readers.read_image(path).shape[2] == 3

    def read_image_size(path):
        return min(readers.read_header(path).size) > 0

    def read_mask(kind):
        return lambda path: set(np.unique(kind(path).read(size))) <= {0, 1, 255}

    trials = [
        (row.image, read_image),
        (row.image, read_image_size),
        (row.mask.path, read_mask(kitti.KittiMask)),
        (tmp_path / "mask.png", read_mask(masks.MaskFile)),
        (tmp_path / "whole.jpg", read_image),
        (tmp_path / "phone.webp", read_image),
        (tmp_path / "whole.csv", lambda path: set(csvs.read_masks(path, named).rows) == stems),
        (row.views[0].calibration, lambda path: kitti.read_calibration(path).shape == (3, 4)),
        (
            trained / "model.pt",
            lambda path: model.load_model(path, "cpu").config.thresholds[0] >= 0,
        ),
    ]
    tried = refused = 0
    for whole, reader in trials:
        content = whole.read_bytes()
        for _ in range((MANY or 40) // (4 if whole.suffix == ".pt" else 1)):
            path = tmp_path / f"damaged{tried}{whole.suffix}"
            path.write_bytes(damaged(content, rng))
            tried += 1
            try:
                assert reader(path), path
            except UserError as error:
                refused, message = refused + 1, str(error)
            else:
                message = path.name
            assert path.name in message
            assert "\n" not in message
            path.unlink()
    print(f"{tried} damaged files: {refused} refused, {tried - refused} read")
    assert refused > tried / 3


@settings(max_examples=MANY or 60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.text("0123456789 -.x", max_size=30))
def test_any_rle_is_refused_or_decoded(height, width, runs):
    try:
        mask = rle.rle_decode(runs, (height, width))
    except UserError:
        return
    assert mask.shape == (height, width)
    assert set(np.unique(mask)) <= {0, 1}
    assert mask.sum() == sum(map(int, runs.split()[1::2]))


@settings(max_examples=MANY or 60, deadline=None)
@given(st.binary(max_size=200))
def test_any_csv_is_refused_or_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    path.write_bytes(b"id,rle_mask\n" + content)
    try:
        read = csvs.read_masks(path, [Path("a.png")]).planes(path)
        shape, message = read["a"].read((4, 4)).shape, "train.csv"
    except UserError as error:
        read, shape, message = {"a": None}, (1, 4, 4), str(error)
    assert set(read) == {"a"}
    assert shape == (1, 4, 4)
    assert "train.csv" in message


# --------------------------------------------------------------------------------------------------
#  Many processes
# --------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "14519", "SLURM_JOB_NAME": "roads", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0",
}  # fmt: skip


def slurm(host):
    """What `srun --nodes 2 --ntasks-per-node 1` sets on a host."""
    return SLURM | {"SLURM_PROCID": str(host), "SLURM_NODEID": str(host)}


def torchrun(folder, script, *flags):
    """torchrun with two processes, which load the libraries anew; returns what was printed."""
    launcher = folder / "torchrun.py"
    launcher.write_text("from torch.distributed.run import main\n\nmain()\n")
    options = ("--nproc_per_node", 2, "--master_addr", "127.0.0.1", "--master_port", free_port())
    command = Command(launcher, (*options, KIT / script, *flags))
    printed = command.communicate(timeout=600)
    assert command.returncode == 0, printed
    return printed[0]


def start_ranks(script, *flags, hosts=1):
    """Two processes with what torchrun sets, on one host or on two of SLURM."""
    port, running = free_port(), []
    for rank in range(2):
        host = rank if hosts == 2 else 0
        numbers = {"RANK": rank, "LOCAL_RANK": rank - host, "WORLD_SIZE": 2, "GROUP_RANK": host}
        numbers |= {"LOCAL_WORLD_SIZE": 2 // hosts, "MASTER_ADDR": "127.0.0.1"}
        numbers |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        environment = {name: str(value) for name, value in numbers.items()}
        environment |= slurm(host) if hosts == 2 else {}
        running.append(Command(KIT / script, flags, env=environment))
    return running


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def succeed_on_two_hosts(script, *flags):
    """Returns what the two processes printed."""
    running = start_ranks(script, *flags, hosts=2)
    printed = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    return [stdout for stdout, _ in printed]


def test_two_processes_train_one_model_also_on_two_hosts_of_slurm(frames, tmp_path):
    flags = ("--data", frames, "--epochs", 2, *TINY)
    rank = """
import os
from pytorch_lightning.utilities import rank_zero_only
rank_zero_only.rank = int(os.environ["RANK"])  # was read when Lightning was loaded
"""
    script = write_patched(tmp_path, rank)
    assert torchrun(tmp_path, "train.py", *flags, "--out", tmp_path / "host").count("wrote") == 1
    printed = succeed_on_two_hosts(script, *flags, "--out", tmp_path / "hosts")
    assert ["wrote" in text for text in printed] == [True, False]  # the first process alone writes
    one, two = (pd.read_csv(tmp_path / out / "metrics.csv") for out in ("host", "hosts"))
    assert one.epoch.tolist() == [1, 2]
    one, two = one.drop(columns="seconds"), two.drop(columns="seconds")
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    for out in ("host", "hosts"):
        assert read_metrics(tmp_path / out)["image"]["all"]["images"] == 2


ONE_OF_TWO = """
import os, torch
from pytorch_lightning.utilities import rank_zero_only
from kit.training import callbacks
rank_zero_only.rank = rank = int(os.environ["RANK"])  # was read when Lightning was loaded
if rank == 1:
    train.images.write_image = None  # two that write one file fail now and then
    callbacks.writable_folder = callbacks.write_file = None
step, steps = train.SegmentationModule.training_step, []
def training_step(self, batch, index):
    steps.append(1)
    if rank == 1:
        {fault}
    return step(self, batch, index)
train.SegmentationModule.training_step = training_step
"""
FAULTS_OF_ONE = {
    "memory": ('if len(batch["image"]) > 1: raise torch.OutOfMemoryError', 0, "over 4 parts"),
    "no number": (
        'if len(steps) > 1: callbacks.check_loss(torch.tensor(float("nan")), 1, ["x"])',
        2,
        "the loss: is nan",
    ),
    "death": ("if len(steps) > 1: os._exit(9)", 2, "--devices: another process ended"),
    "nothing": ("pass", 0, "wrote"),
}


@pytest.mark.parametrize("name", FAULTS_OF_ONE)
def test_two_processes_leave_together(frames, tmp_path, name):
    """Whatever one of them meets with; with one validation image, which both validate."""
    fault, status, words = FAULTS_OF_ONE[name]
    script = write_patched(tmp_path, ONE_OF_TWO.format(fault=fault))
    flags = ("--data", frames, "--out", tmp_path / "out", "--epochs", 3, "--folds", 16, *TINY)
    running = start_ranks(script, *flags, "--batch_size", 8, "--grow", "false")
    printed = [process.communicate(timeout=120) for process in running]
    assert running[0].returncode == status, printed
    assert running[1].returncode == (9 if name == "death" else status), printed
    assert words in "".join(map("".join, printed))
    assert (tmp_path / "out" / "metrics.json").exists() is (name != "no number")
    assert (tmp_path / "out" / "last.ckpt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_exports_and_ends_both(frames, tmp_path, number):
    script = write_patched(tmp_path, ONE_OF_TWO.format(fault="pass"))
    flags = ("--data", frames, "--out", tmp_path / "out", "--epochs", 900, *TINY)
    running = start_ranks(script, *flags)
    wait_for(tmp_path / "out" / "last.ckpt", running[0])
    running[0].send_signal(number)
    printed = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [-number, -number], printed
    assert "exports what was reached; the same command resumes" in printed[0][0]
    assert (tmp_path / "out" / "metrics.json").exists()


def test_two_processes_share_the_images(roads, trained, tmp_path):
    flags = ("--model", trained, "--data", roads / "training", "--save_probs", "true")
    flags = (*flags, "--submission", "kitti")
    succeed_on_two_hosts("infer.py", *flags, "--out", tmp_path / "two")
    succeed("infer.py", *flags, "--out", tmp_path / "one")
    one, two = {}, {}
    for found, folder in ((one, tmp_path / "one"), (two, tmp_path / "two")):
        for path in folder.rglob("*.*"):
            found[path.relative_to(folder)] = path.read_bytes()
    assert one.keys() == two.keys()
    for name in map(Path, ("metrics.json", "submission_kitti.zip")):
        assert one[name] == two[name]


MISTAKES = {
    "a fold": ("train.py", (*TINY, "--fold", 40), "--fold 40"),
    "a size": ("train.py", (*TINY, "--arch", "FPN", "--height", 65), "--height 65"),
    "a flag": ("train.py", ("--epoch", 2), "--epoch"),
    "a model": ("infer.py", ("--model", "nowhere"), "--model nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_however_many_processes_find_it(roads, tmp_path, name):
    """Both processes of a torchrun end with status 2, and say why in the same line."""
    script, flags, words = MISTAKES[name]
    flags = ("--data", roads, "--out", tmp_path / "out", *flags)
    running = start_ranks(script, *flags)
    printed = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [2, 2], printed
    [line] = set("".join(stderr for _, stderr in printed).strip().splitlines())
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
#  Items that stay in memory
# --------------------------------------------------------------------------------------------------


def same_item(one, other):
    """Whether two items of a dataset are equal bit for bit."""
    equal = {torch.Tensor: torch.equal, np.ndarray: np.array_equal}
    return one.keys() == other.keys() and all(
        equal.get(type(value), lambda a, b: a == b)(value, other[key]) for key, value in one.items()
    )


def prepared(folder, **settings):
    """Config, ModelConfig and samples of fold 0, as train.py makes them."""
    collection = samples.find_samples(str(folder), training=True)
    table = samples.scan(collection.samples, collection.classes)
    table["fold"] = folds.assign_folds(table, 10, 0).fold
    settings |= {"encoder": ENCODER, "encoder_weights": "none", "height": 64, "width": 192}
    collection = collection._replace(samples=table)
    resolved = resolve.resolve(train.Config(**settings), collection, 0, train.RESOLUTIONS)
    return *resolved, samples.decode_pairs(table, resolved[1], 1 << 30)


def test_validation_items_are_read_once_and_stay_the_same(roads, tmp_path):
    """The kit's default loaders: validation items come from memory from the second epoch on."""
    folder = tmp_path / "data"
    shutil.copytree(roads / "training", folder / "training")
    config, model_config, table = prepared(folder)
    _, loader = train.make_loaders(config, model_config, table)
    assert isinstance(loader.dataset, loaders.Cached)
    plain = train.SegmentationDataset(table[table.fold == 0], model_config, 0, None)
    expected = [plain[index] for index in range(len(plain))]
    for _ in range(2):
        items = []
        for batch in loader:
            for index in range(len(batch["name"])):
                items.append({key: values[index] for key, values in batch.items()})
        assert len(items) == len(expected) == 3
        assert all(same_item(*pair) for pair in zip(items, expected, strict=True))
        shutil.rmtree(folder, ignore_errors=True)  # a second reading would fail


def test_the_tiles_of_a_validation_image_are_cut_from_one_decoding(roads, tmp_path, monkeypatch):
    _, model_config, table = prepared(roads, tiles=True, height=64, width=64)
    dataset = train.SegmentationDataset(table[table.fold == 0], model_config, 0, None)
    reads, read = [], samples.read_sample
    monkeypatch.setattr(samples, "read_sample", lambda *args: reads.append(1) or read(*args))
    items = [dataset[index] for index in range(len(dataset))]
    assert len(items) > 3 * len(reads) == 3 * (table.fold == 0).sum()


def test_a_dataset_reaches_workers_that_are_spawned(roads):
    """As on macOS and Windows, and from Python 3.14 on; they import train.py without running it."""
    config, model_config, table = prepared(roads)
    augment = train.augmentation(config)
    datasets = [
        train.SegmentationDataset(table, model_config, 0, augment),
        loaders.Cached(train.SegmentationDataset(table, model_config, 0, None), 1 << 20),
    ]
    expected = [dataset[0]["image"] for dataset in datasets]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset(datasets),  # for a single worker: it starts for seconds
        sampler=[0, len(datasets[0])],
        num_workers=1,
        multiprocessing_context="spawn",
        collate_fn=loaders.make_loader(datasets[0], None, 1, 1, 1, 0).collate_fn,
    )
    for image, batch in zip(expected, loader, strict=True):
        assert torch.equal(batch["image"][0], image)


@pytest.mark.parametrize("augment", [0.0, 1.0])
def test_training_items_are_made_from_decoded_pairs(roads, tmp_path, augment):
    folder = tmp_path / "data"
    shutil.copytree(roads / "training", folder / "training")
    config, model_config, table = prepared(folder, augment=augment)
    loader, _ = train.make_loaders(config, model_config, table)
    shutil.rmtree(folder)  # reading would fail
    for batch in loader:
        assert set(batch) == {"name", "image", "mask"}


def test_what_does_not_fit_into_memory_is_read_again():
    class Counted:
        """Items of 1000 bytes, which count how often they are read."""

        read = 0

        def __len__(self):
            return 5

        def __getitem__(self, index):
            self.read += 1
            return {"image": torch.full((1000,), index, dtype=torch.uint8), "name": str(index)}

    dataset = Counted()
    cached = loaders.Cached(dataset, 2500)
    for _ in range(3):
        assert [cached[index]["name"] for index in range(len(cached))] == list("01234")
        assert [int(cached[index]["image"][0]) for index in range(5)] == list(range(5))
    assert len(cached.items) == 2, "whole items alone, up to the limit"
    assert dataset.read == 2 + 3 * 2 * 3
