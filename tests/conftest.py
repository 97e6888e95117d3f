"""Synthetic roads and the real commands, run as a user runs them."""

import fcntl
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import RUNNING, Command

KIT = Path(__file__).parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tools")]
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on the network
os.environ["OMP_NUM_THREADS"] = "1"  # several tests run at a time

ENCODER = "tu-test_efficientnet"  # made by timm for tests: a training takes half as long
TINY = (
    "--encoder", ENCODER, "--encoder_weights", "none",
    "--height", "32", "--width", "96", "--grow", "false", "--batch_size", "4",
)  # fmt: skip


def run(script, *flags, kit=KIT, cwd=None, env=None, fresh=False):
    """Run a script of the kit as a process; returns the CompletedProcess with text output.

    `fresh`: with a Python that has loaded nothing yet, to test how a script starts.
    """
    args = [str(kit / script), *map(str, flags)]
    if fresh or "--help" in args:
        options = {"cwd": cwd, "env": os.environ | (env or {}), "timeout": 600}
        return subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)
    command = Command(args[0], args[1:], cwd, env)
    printed = command.communicate(timeout=600)
    return subprocess.CompletedProcess(args, command.returncode, *printed)


def succeed(script, *flags, **options):
    """Run a script that must succeed; returns what it printed."""
    done = run(script, *flags, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pytest_collection_finish():
    """What is loaded by now stays: to search it for garbage takes a tenth of the tests' time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_command_is_left():
    """After a test that failed; pytest would wait for what still runs."""
    yield
    for command in list(RUNNING):
        command.kill()


def build_once(factory, name, build):
    """The folder that `build(folder)` fills, shared by the processes of pytest-xdist."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        build(folder)
        return folder
    folder = factory.getbasetemp().parent / name
    built = folder.with_suffix(".built")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a build that failed
            folder.mkdir()
            build(folder)
            built.touch()
    return folder


@pytest.fixture(scope="session")
def roads(tmp_path_factory):
    """24 training and 3 test scenes in KITTI's layout, of a third of its sizes."""
    import demo

    def build(folder):
        demo.write_scenes(folder, 24, 3, seed=1, scale=1 / 3)

    return build_once(tmp_path_factory, "roads", build)


@pytest.fixture(scope="session")
def trained(roads, tmp_path_factory):
    """The --out of a small training on the roads."""

    def build(folder):
        flags = (*TINY, "--height", 64, "--width", 192, "--grow", "true", "--epochs", 16)
        succeed("train.py", "--data", roads, "--out", folder, *flags)

    return build_once(tmp_path_factory, "trained", build)
