"""Synthetic roads and the real commands, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).parents[1]
sys.path.insert(0, str(KIT))
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on the network
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side

TINY = ("--encoder", "resnet18", "--encoder_weights", "none", "--height", "64", "--width", "192", "--batch_size", "4")


def run(script, *flags, kit=KIT, cwd=None, env=None):
    """Run a script of the kit as a process; returns the CompletedProcess with text output."""
    command = [sys.executable, str(kit / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=600)


def succeed(script, *flags, **options):
    """Run a script that must succeed; returns what it printed."""
    done = run(script, *flags, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def roads(tmp_path_factory):
    """24 training and 3 test scenes in KITTI's layout and sizes."""
    import demo

    return demo.write_scenes(tmp_path_factory.mktemp("roads"), 24, 3, seed=1)


@pytest.fixture(scope="session")
def trained(roads, tmp_path_factory):
    """The --out of a small training on the roads."""
    out = tmp_path_factory.mktemp("out")
    succeed("train.py", "--data", roads, "--out", out, "--epochs", 16, *TINY)
    return out
