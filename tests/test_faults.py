"""Killed, starved, fed with damage: finished work stays, errors are one line. FAULTS=n tries n of each kind."""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KIT, TINY, run, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import train
import utils
from utils import UserError

MANY = int(os.environ.get("FAULTS", 0))  # 0: a sample


def start(*flags, code=None, **options):
    """Start train.py (or code that imports it) in a process group of its own."""
    command = [sys.executable, *(("-c", code) if code else (str(KIT / "train.py"),)), *map(str, flags)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, cwd=KIT, **options)  # fmt: skip


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


# ---------------------------------------------------------------------------------------------------------------------
#  interrupted


def test_killed_at_random_moments_nothing_is_lost(roads, tmp_path):
    """SIGKILL again and again: what is on disk loads, model.pt stays near the best, the run ends as if nothing was."""
    rng = np.random.default_rng(MANY)
    kills, survived, best, lasts = MANY or 2, 0, 0.0, 25.0
    while kills:
        out = tmp_path / str(kills)
        flags = ("--data", roads, "--out", out, "--epochs", 6, *TINY)
        while True:
            began = time.monotonic()
            process = start(*flags)
            try:
                printed, _ = process.communicate(timeout=rng.uniform(3, lasts) if kills else None)
                assert process.returncode == 0, printed
                lasts = min(lasts, time.monotonic() - began)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills, survived = kills - 1, survived + 1
            if (out / "last.ckpt").exists():
                utils.read_checkpoint(out / "last.ckpt", "--resume")
            if (out / "model.pt").exists():
                reached = utils.load_model(out / "model.pt", "cpu").metrics.get("epoch", {}).get("MaxF", best)
                assert reached > best - train.SLACK
                best = max(best, reached)
        assert pd.read_csv(out / "metrics.csv").epoch.tolist() == [1, 2, 3, 4, 5, 6]
        assert not [path for path in out.iterdir() if path.name.endswith(".part")]
        best = 0.0
    print(f"{survived} kills survived")


def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(roads, tmp_path):
    flags = ("--data", roads, "--epochs", 3, *TINY)
    succeed("train.py", *flags, "--out", tmp_path / "whole")
    succeed("train.py", *flags, "--out", tmp_path / "again")
    process = start(*flags, "--out", tmp_path / "cut")
    while not (tmp_path / "cut" / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "after epoch 1" in succeed("train.py", *flags, "--out", tmp_path / "cut")
    whole = pd.read_csv(tmp_path / "whole" / "metrics.csv").drop(columns="seconds")
    for name in ("again", "cut"):
        assert whole.equals(pd.read_csv(tmp_path / name / "metrics.csv").drop(columns="seconds")), name
        assert all(torch.equal(v, weights(tmp_path / name)[k]) for k, v in weights(tmp_path / "whole").items()), name
        assert (tmp_path / name / "metrics.json").read_text() == (tmp_path / "whole" / "metrics.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_politely_it_exports_what_is_reached(roads, tmp_path, number):
    process = start("--data", roads, "--out", tmp_path, "--epochs", 500, *TINY)
    while not (tmp_path / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == -number, printed
    assert "exports what is reached" in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["image"]["all"]["images"] == 3
    assert (tmp_path / "last.ckpt").exists()
    assert "Traceback" not in printed


# ---------------------------------------------------------------------------------------------------------------------
#  starved

PATCHED = """
import sys, torch
import utils, train
sys.excepthook = utils.complain
{patch}
train.train(utils.parse(utils.Config, ""))
"""


def test_a_loss_that_is_no_number_names_the_pictures(roads, tmp_path):
    patch = """
whole, steps = train.loss, []
def loss(*arguments):
    steps.append(1)
    return whole(*arguments) * (float("nan") if len(steps) > 14 else 1)
train.loss = loss
"""
    process = start("--data", roads, "--out", tmp_path, "--epochs", 9, *TINY, code=PATCHED.format(patch=patch))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    last = printed.strip().splitlines()[-1]
    assert "the loss is nan in epoch 3" in last
    assert last.count(".png") == 4
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_memory_that_runs_out_makes_smaller_parts(roads, tmp_path):
    patch = """
step = train.RoadModel.training_step
def training_step(self, batch, index):
    if len(batch["image"]) > 1:
        raise torch.OutOfMemoryError("made up")
    return step(self, batch, index)
train.RoadModel.training_step = training_step
"""
    process = start("--data", roads, "--out", tmp_path, "--epochs", 2, *TINY, code=PATCHED.format(patch=patch))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "in 2 parts" in printed
    assert "in 4 parts" in printed
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert rows.epoch.tolist() == [1, 2]
    assert rows.lr.iloc[-1] == pytest.approx(0.01 * 5e-4, rel=0.01), "as many steps as with whole batches"


def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def test_a_full_disk_is_one_line_and_leaves_no_half_file(roads, tmp_path):
    """The system refuses to write files over 1 MB."""
    process = start("--data", roads, "--out", tmp_path, "--epochs", 2, *TINY, preexec_fn=limit)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    assert "Traceback" not in printed
    assert "model.pt: cannot be written" in printed.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_vanishes_is_one_line(roads, tmp_path):
    out = tmp_path / "out"
    process = start("--data", roads, "--out", out, "--epochs", 500, *TINY)
    while not (out / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.02)
    while out.exists():
        shutil.rmtree(out, ignore_errors=True)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2, printed
    assert "cannot be written" in printed.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
#  hostile and damaged files


class Bomb:
    """A pickle that would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("flag", ["--model", "--resume", "--encoder_weights"])
@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_a_file_that_would_run_code_is_refused(roads, tmp_path, flag, way):
    ran = tmp_path / "ran"
    path = tmp_path / "model.pt"
    if way == "torch":
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
    with zipfile.ZipFile(tmp_path / "large.pt") as large, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in large.infolist():
            archive.writestr(part.filename, large.read(part))
    assert bomb.stat().st_size < 10000
    with pytest.raises(UserError, match="bomb.pt: .*unpacks to more than its size"):
        utils.read_checkpoint(bomb, "--model")
    with pytest.raises(UserError, match="bomb.pt: .*unpacks to more than its size"):
        utils.build_model(utils.Config(encoder="resnet18"), str(bomb))


@pytest.mark.parametrize("wrong", [{"height": "a"}, {"width": 0}, {"std": (0.0, 1.0, 1.0)}, {"top": float("nan")},
                                   {"tiles": 3}, {"tta": "yes"}, {"min_pixels": 1e99}, {"extra": 1}])  # fmt: skip
def test_a_model_with_settings_that_no_flag_takes_is_refused(trained, tmp_path, wrong):
    content = torch.load(trained / "model.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | wrong}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.pt"):
        utils.load_model(tmp_path / "model.pt", "cpu")


def test_a_postscript_file_named_png_is_not_run(trained, tmp_path):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    done = run("infer.py", "--model", trained, "--data", tmp_path / "a.png", "--out", tmp_path / "out",
               env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})  # fmt: skip
    assert done.returncode == 2
    assert "a.png: not a picture" in done.stderr.strip().splitlines()[-1]
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
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    done = run("infer.py", "--model", trained, "--data", tmp_path / "bomb.png", "--out", tmp_path / "out")
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
    """Every reader of the kit on cut and changed files: a UserError or a result of the right kind, nothing else."""
    rng = np.random.default_rng(MANY)
    samples = utils.find_samples(str(roads), training=True)
    row = next(samples.itertuples())
    picture = Image.open(row.image)
    size = picture.size[::-1]
    picture.convert("RGB").save(tmp_path / "whole.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0  # turned, as phones write it
    Image.new("RGB", (9, 5), "green").save(tmp_path / "phone.webp", exif=exif)
    (tmp_path / "whole.csv").write_text("id,rle_mask\num_000000,1 4 9 2\num_000001,\n")
    images = {"um_000000": None, "um_000001": None}
    readers = {
        row.image: lambda path: utils.read_image(path).shape[2] == 3,
        row.mask: lambda path: set(np.unique(utils.read_truth(path, "kitti", size))) <= {0, 1, 255},
        str(tmp_path / "whole.jpg"): lambda path: utils.read_image(path).shape[2] == 3,
        str(tmp_path / "phone.webp"): lambda path: utils.read_image(path).shape[2] == 3,
        str(tmp_path / "whole.csv"): lambda path: len(utils.read_runs(utils.Path(path), images)[0]) == 2,
        row.calib: lambda path: utils.read_calibration(path).shape == (3, 4),
        str(trained / "model.pt"): lambda path: utils.load_model(utils.Path(path), "cpu").threshold >= 0,
    }
    tried = refused = 0
    for whole, reader in readers.items():
        content = open(whole, "rb").read()  # noqa: SIM115
        for number in range((MANY or 40) // (4 if whole.endswith(".pt") else 1)):
            path = tmp_path / f"damaged{number}{os.path.splitext(whole)[1]}"
            path.write_bytes(damaged(content, rng))
            tried += 1
            try:
                assert reader(str(path)), path
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
def test_any_run_lengths_are_refused_or_decoded(height, width, runs):
    try:
        mask = utils.rle_decode(runs, (height, width))
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
        runs, _ = utils.read_runs(path, {"a": None})
    except UserError as error:
        runs, message = {"a": ""}, str(error)
    else:
        message = "train.csv"
    assert set(runs) == {"a"}
    assert "train.csv" in message


# ---------------------------------------------------------------------------------------------------------------------
#  many processes


def side_by_side(commands, script, flags):
    """Run one command a host, given as words and environment; all must succeed."""
    running = [subprocess.Popen([sys.executable, *words, str(KIT / script), *map(str, flags)], env=os.environ | env,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for words, env in commands]  # fmt: skip
    printed = [process.communicate(timeout=600)[0] for process in running]
    assert not any(process.returncode for process in running), printed
    return printed


def torchrun(script, *flags, hosts=1):
    usual = ["-m", "torch.distributed.run", "--nnodes", hosts, "--nproc_per_node", 2 // hosts,
             "--master_addr", "127.0.0.1", "--master_port", 29516 + hosts]  # fmt: skip
    return side_by_side([([*map(str, usual), "--node_rank", str(n)], {}) for n in range(hosts)], script, flags)


def srun(script, *flags):
    """What SLURM's `srun --nodes 2 --ntasks-per-node 1` sets, with this machine as both hosts."""
    usual = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1",
             "SLURM_JOB_ID": "14519", "SLURM_JOB_NAME": "roads", "SLURM_LOCALID": "0"}  # fmt: skip
    return side_by_side([([], usual | {"SLURM_PROCID": n, "SLURM_NODEID": n}) for n in "01"], script, flags)


def test_two_processes_on_one_host_or_two_train_one_model(roads, tmp_path):
    flags = ("--data", roads, "--epochs", 2, *TINY)
    torchrun("train.py", *flags, "--out", tmp_path / "host")
    torchrun("train.py", *flags, "--out", tmp_path / "hosts", hosts=2)
    printed = srun("train.py", *flags, "--out", tmp_path / "slurm")
    one, *others = (pd.read_csv(tmp_path / out / "metrics.csv") for out in ("host", "hosts", "slurm"))
    assert one.epoch.tolist() == [1, 2]
    for other in others:
        pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"), check_exact=True)
    for out in ("host", "hosts", "slurm"):
        assert json.loads((tmp_path / out / "metrics.json").read_text())["image"]["all"]["images"] == 3
    assert sum("wrote" in text for text in printed) == 1  # the first process alone writes


def test_two_processes_share_the_pictures(roads, trained, tmp_path):
    flags = ("--model", trained, "--data", roads / "training", "--save_probs", "true", "--submission", "kitti")
    torchrun("infer.py", *flags, "--out", tmp_path / "a")
    srun("infer.py", *flags, "--out", tmp_path / "b")
    succeed("infer.py", *flags, "--out", tmp_path / "c")
    a, b, c = ({p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob("*") if p.is_file()}
               for out in "abc")  # fmt: skip
    assert a.keys() == b.keys() == c.keys()
    for name in map(utils.Path, ("metrics.json", "submission_kitti.zip")):
        assert a[name] == b[name] == c[name]


def test_srun_that_does_not_say_how_many_run_on_a_host_is_one_line(roads, tmp_path):
    done = run("train.py", "--data", roads, "--out", tmp_path, *TINY, env={"SLURM_NTASKS": "2", "SLURM_PROCID": "0"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: SLURM: ") and "--ntasks-per-node" in done.stderr
