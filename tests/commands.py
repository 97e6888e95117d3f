"""The kit's commands in processes of their own that find the heavy libraries loaded.

Loading torch, Lightning, albumentations and smp takes ten seconds of a CPU, most commands of the
tests take less. So multiprocessing's forkserver loads them once; the kit itself it never loads.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

RUNNING = []  # commands that have not ended yet
LIBRARIES = [
    "albumentations", "cv2", "matplotlib.pyplot", "pandas", "pytorch_lightning",
    "segmentation_models_pytorch", "sklearn.metrics", "sklearn.model_selection", "torch",
]  # fmt: skip
# code that kills the process in its second epoch, after `import os, train`
KILLED_STEP = """
step = train.SegmentationModule.training_step
def training_step(self, batch, index):
    if self.current_epoch == 1 and index == 1:
        os.kill(os.getpid(), 9)
    return step(self, batch, index)
train.SegmentationModule.training_step = training_step
"""


class Command:
    """`python SCRIPT FLAGS` in a session of its own, with what the tests need of a Popen.

    `merge`: stderr goes where stdout goes; `terminal`: the path of one, where both go.
    """

    def __init__(self, script, flags, cwd=None, env=None, merge=False, terminal=None):
        self.args = [str(script), *map(str, flags)]
        self.folder = tempfile.TemporaryDirectory()
        paths = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        self.stdout, self.stderr = paths[0], paths[0] if merge else paths[1]
        for path in paths:
            path.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        outputs = (terminal, terminal) if terminal else (self.stdout, self.stderr)
        self.process = context.Process(target=become, args=(self.args, cwd, env or {}, outputs))
        self.process.start()
        self.pid = self.process.pid
        RUNNING.append(self)

    def poll(self):
        """The exit status, None while it runs; minus the signal that ended it."""
        return self.process.exitcode

    def communicate(self, timeout=None):
        """Wait for the end; returns what was printed to stdout and stderr."""
        self.process.join(timeout)
        self.returncode = self.poll()
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        RUNNING.remove(self)
        return self.stdout.read_text(), self.stderr.read_text()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """End it and the processes that it has started, as the end of a Kaggle session does."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.pid, signal.SIGKILL)
        self.communicate()


def become(args, cwd, env, outputs):
    """Turn this process into the command."""
    os.setsid()
    default = multiprocessing.get_all_start_methods()[0]  # of worker processes
    multiprocessing.set_start_method(default, force=True)
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(env)
    os.chdir(cwd or os.getcwd())
    sys.argv = args
    others = [path for path in sys.path if not (Path(path) / "kit").is_dir()]
    sys.path[:] = [str(Path(args[0]).parent), *others]
    runpy.run_path(args[0], run_name="__main__")
