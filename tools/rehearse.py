"""The rehearsal of a code competition: the notebook as Kaggle reruns it on hidden test images.

    python tools/kernel.py rehearse --data FOLDER --hours 9 --images 10000

The input is read-only and there is no network: with Linux's namespaces where they are allowed. The
hidden test set is made of FOLDER's own images: another number of them, under other ids, half of
them of another size, one of them damaged, and one id without an image.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hidden import Hidden, check_submission, copy_tree, make_hidden

from kit.errors import UserError, first_five

if TYPE_CHECKING:
    from nbformat import NotebookNode

# Verdicts, in the site's words
OK = "Succeeded"
TIMEOUT = "Notebook Timeout"
EXCEPTION = "Notebook Threw Exception"
COMPUTE = "Notebook Exceeded Allowed Compute"
NO_CSV = "Submission CSV Not Found"
SCORING = "Submission Scoring Error"
KAGGLE = "Kaggle Error"

SMP = "segmentation_models_pytorch"  # not on Kaggle's image


class Verdict(NamedTuple):
    """What Kaggle would say, and the line that explains it."""

    name: str
    reason: str


# --------------------------------------------------------------------------------------------------
#  The run
# --------------------------------------------------------------------------------------------------

# Shows a process the folders of Kaggle and no network, in namespaces of its own: unshare(1).
NAMESPACE = """
set -e
root=$1 input=$2 working=$3; shift 3
mount -t tmpfs none "$root"
for path in /*; do
  if [ -L "$path" ]; then cp -P "$path" "$root/"
  elif [ -d "$path" ] && [ "$path" != /kaggle ]; then
    mkdir "$root$path"; mount --rbind "$path" "$root$path"
  fi
done
mkdir -p "$root/kaggle/input" "$root/kaggle/working"
mount --bind "$input" "$root/kaggle/input"; mount -o remount,bind,ro "$root/kaggle/input"
mount --bind "$working" "$root/kaggle/working"
while [ "$1" != -- ]; do
  mount --bind "$1" "$root$1"; mount -o remount,bind,ro "$root$1"; shift
done
shift
ip link set lo up 2>/dev/null || true
exec chroot "$root" env -C /kaggle/working "$@"
"""

# What the notebook's processes import first: no network, and smp only as it is attached.
GUARD = """
import importlib.machinery, socket

finder, hidden, place = importlib.machinery.PathFinder, {hidden!r}, {place!r}
find, connect = finder.find_spec, socket.socket.connect

def find_spec(name, path=None, target=None):
    return find(name, [place] if name == hidden else path, target)

def connect_at_home(self, address):
    at_home = self.family == getattr(socket, "AF_UNIX", None) or str(address[0]).startswith(
        ("127.", "::1", "localhost"))
    if not at_home:
        raise OSError(101, "Network is unreachable")
    return connect(self, address)

finder.find_spec, socket.socket.connect = staticmethod(find_spec), connect_at_home
"""


class Run(NamedTuple):
    """What became of a notebook: seconds of each cell by its id, and how it failed, if it did."""

    seconds: dict[str, float]
    cell: str  # that failed
    error: str
    limit: str  # that was exceeded
    timed_out: bool
    printed: str  # by the cell run-infer


def namespace(folder: Path, read_only: list[Path]) -> list[str]:
    """What starts a command as on Kaggle; [] where the system does not allow it."""
    (folder / "root").mkdir()
    places = (folder / "root", folder / "input", folder / "working", *read_only)
    command = ["unshare", "-rmn", "sh", "-c", NAMESPACE, "sh", *map(str, places), "--"]
    with contextlib.suppress(OSError):
        if not subprocess.run([*command, "true"], capture_output=True, timeout=60).returncode:
            return command
    return []


def environment_of(folder: Path, hides_smp: bool) -> dict[str, str]:
    """The environment of a rerun: none of this machine's caches, proxies that lead nowhere."""
    site = folder / "site"
    site.mkdir()
    hidden = SMP if hides_smp else ""
    (site / "sitecustomize.py").write_text(GUARD.format(hidden=hidden, place=str(site)))
    caches = ("HF_HOME", "TORCH_HOME", "KAGGLEHUB_CACHE", "IPYTHONDIR", "TMPDIR")
    (folder / "tmp").mkdir()
    own = {name: str(folder / "tmp") for name in caches}
    own |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    own |= {"KAGGLE_IS_COMPETITION_RERUN": "1", "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    own |= {"PYTHONPATH": str(site), "PIP_TARGET": str(site), "PIP_RETRIES": "0"}
    unwanted = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "PYTEST_CURRENT_TEST", "KIT_NOTEBOOK")
    return {k: v for k, v in os.environ.items() if k not in unwanted} | own


def proportional_memory(pid: int) -> int:
    """Bytes of memory of a process, its part of what is shared; 0 where Linux does not say."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return 1024 * sum(int(size) for size in re.findall(r"^Pss: +(\d+)", text, re.MULTILINE))
    return 0


def watch(pid: int, working: Path, gigabytes: tuple[float, float], stop: threading.Event) -> str:
    """Kill a process and its children where memory or the disk is used up; returns which."""
    import psutil

    while not stop.wait(0.5):
        with contextlib.suppress(psutil.Error, OSError):
            kernel = psutil.Process(pid)
            processes = [kernel, *kernel.children(recursive=True)]
            sizes = [path.lstat().st_size for path in working.rglob("*")]
            used = (sum(proportional_memory(p.pid) for p in processes), sum(sizes))
            for amount, most, what in zip(used, gigabytes, ("memory", "disk"), strict=True):
                if amount > most * 1e9:
                    for process in reversed(processes):
                        process.kill()
                    return f"it used {amount / 1e9:.1f} GB of {what}, there are {most:g}"
    return ""


def execute(
    notebook: NotebookNode, stage: Stage, hours: float, gigabytes: tuple[float, float]
) -> Run:
    """Run a notebook on a stage. The kernel is reached through files, not a network."""
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    started: dict[str, float] = {}
    seconds: dict[str, float] = {}
    end, stop, limits = time.monotonic() + 3600 * hours, threading.Event(), []

    def begin(cell: NotebookNode, **_: Any) -> None:
        started[cell.id] = time.monotonic()
        if len(started) == 1:
            pid, working = manager.provisioner.pid, stage.folder / "working"
            run = threading.Thread(
                target=lambda: limits.append(watch(pid, working, gigabytes, stop)), daemon=True
            )
            run.start()
            threads.append(run)

    def finish(cell: NotebookNode, **_: Any) -> None:
        seconds[cell.id] = time.monotonic() - started[cell.id]

    threads: list[threading.Thread] = []
    with tempfile.TemporaryDirectory() as sockets:  # of short names, as sockets need them
        manager = AsyncKernelManager(transport="ipc", ip=f"{sockets}/k")
        python = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        manager.kernel_spec.argv = [*stage.prefix, *python]
        client = NotebookClient(
            notebook, km=manager, timeout_func=lambda _: max(1, int(end - time.monotonic())),
            resources={"metadata": {"path": str(stage.folder / "working")}},
            on_cell_start=begin, on_cell_executed=finish,
        )  # fmt: skip
        try:
            error, timed_out = run_cells(client, stage.env, started)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    cell = name_of_cell(notebook, next(reversed(started), ""))
    return Run(seconds, cell, error, "".join(limits), timed_out, printed_by(notebook, "run-infer"))


def run_cells(client: Any, env: dict[str, str], started: dict[str, float]) -> tuple[str, bool]:
    """Run all cells: the error that ended them, or "", and whether the time was over.

    `started`: the cells that have begun, which the client fills.
    """
    from nbclient import exceptions

    try:
        client.execute(env=env, cleanup_kc=True)
    except exceptions.CellTimeoutError:
        return "", True
    except exceptions.CellExecutionError as failure:
        return f"{failure.ename}: {failure.evalue}", False
    except exceptions.DeadKernelError:
        return "the kernel died", False
    except (RuntimeError, OSError) as failure:
        if started:
            raise
        atexit.unregister(client._cleanup_kernel)  # which nbclient forgets in this case
        return f"the notebook could not be started: {failure}", False
    return "", False


def name_of_cell(notebook: NotebookNode, cell: str) -> str:
    """The number and the id of a cell, for people; "" for none."""
    numbers = {node.id: number for number, node in enumerate(notebook.cells, 1)}
    return f"cell {numbers[cell]} ({cell})" if cell else ""


def printed_by(notebook: NotebookNode, name: str) -> str:
    """What a cell printed."""
    outputs = (one.get("outputs", []) for one in notebook.cells if one.get("id") == name)
    return "".join(output.get("text", "") for output in itertools.chain(*outputs))


# --------------------------------------------------------------------------------------------------
#  Settings, clock, verdict
# --------------------------------------------------------------------------------------------------


def settings_cell(notebook: NotebookNode) -> NotebookNode | None:
    """The cell that sets DATA and TRAIN; None in a notebook that is not the kit's."""
    for cell in notebook.cells:
        if len(re.findall(r"^(?:DATA|TRAIN) = ", cell.source, re.MULTILINE)) == 2:
            return cell
    return None


def read_settings(cell: NotebookNode | None) -> dict[str, Any]:
    """{name: value} of the settings cell."""
    pairs = re.findall(r"^([A-Z_]+) = (.+?)(?:  #.*)?$", cell.source if cell else "", re.MULTILINE)
    return {name: value_of(text) for name, text in pairs}


def value_of(text: str) -> Any:
    """A value as Python writes it, or the text itself."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def change_settings(cell: NotebookNode, changes: dict[str, Any]) -> None:
    """Change lines of the settings cell; a setting that it lacks is one more line."""
    lines = [line for line in cell.source.split("\n") if line.split(" = ")[0] not in changes]
    cell.source = "\n".join([*lines, *(f"{name} = {value!r}" for name, value in changes.items())])


FIXED = ("run-train", "look-data", "scores")  # cells of the kit that know nothing of test images


def times_of(run: Run) -> dict[str, float]:
    """The seconds of each cell; those that infer.py predicts apart from those that it starts."""
    times = dict(run.seconds)
    speed = re.search(r"\d+ images in ([\d.]+) s,", run.printed)
    if speed:
        times["prediction"] = float(speed[1])
        times["run-infer"] -= times["prediction"]
    return times


def growth(
    times: dict[str, float], count: int, more: dict[str, float] | None = None, many: int = 0
) -> dict[str, float]:
    """Seconds for each image, by cell: as two runs show, of one run at most."""
    if not more:
        return {name: t / count for name, t in times.items() if name not in FIXED}
    each = {name: (more.get(name, t) - t) / (many - count) for name, t in times.items()}
    each |= dict.fromkeys(FIXED, 0)
    return each | growth({k: t for k, t in times.items() if k == "prediction"}, count)


def estimate(
    times: dict[str, float], each: dict[str, float], count: int, images: int,
    own: dict[str, Any], changes: dict[str, Any],
) -> tuple[float, str]:  # fmt: skip
    """The seconds of a rerun with so many images, and how they come about.

    `each`: see `growth`. `own`: the notebook's settings, `changes`: those of this run; the training
    counts as it is in `own`.
    """
    each = {name: max(0.0, slope) for name, slope in each.items()}
    once = sum(max(0.0, t - each.get(name, 0) * count) for name, t in times.items())
    training = longer = times.get("run-train", 0.0)
    if (own | changes).get("TRAIN") and training:
        minutes, epochs = own.get("MAX_MINUTES") or 0, own.get("EPOCHS") or 40
        if minutes or changes.get("EPOCHS"):
            longer = 60 * minutes or training * epochs / changes["EPOCHS"]
        longer = max(training, min(longer, 60 * own.get("SESSION_MINUTES", 660)))
    once += longer - training
    limit = 60 * (own.get("PREDICT_MINUTES") or 0) or float("inf")
    prediction = min(limit, each.get("prediction", 0) * images)
    whole = once + prediction + images * sum(each[name] for name in each if name != "prediction")
    words = f"{once:.0f} s once, {longer:.0f} s of it training"
    words += f", {(whole - once) / images:.3f} s for each image on this machine"
    return whole, f"{words}: {whole / 3600:.2f} hours for {images} images"


OUT_OF_COMPUTE = re.compile(
    r"the kernel died|status -9\b|MemoryError|out of memory|No space left|Unable to allocate"
)
OFFLINE = re.compile(
    r"unreachable|name resolution|Name or service|ProxyError|ConnectionError|Connection refused|"
    r"URLError|Max retries|cannot be had|internet on"
)


def judge(run: Run, working: Path, hidden: Hidden, hours: float, time_needed: float) -> Verdict:
    """The verdict on a run."""
    problem = " ".join(run.error.removeprefix("StepFailed: ").split("\n")[0].split())
    if run.limit or OUT_OF_COMPUTE.search(run.error):
        return Verdict(COMPUTE, f"{run.cell}: {run.limit or problem}")
    if not run.seconds and not run.cell:
        return Verdict(KAGGLE, problem)
    if run.error:
        remedy = "; there is no network: attach it (python tools/kernel.py bundle OWNER/SLUG)"
        return Verdict(
            EXCEPTION, f"{run.cell}: {problem}{remedy * bool(OFFLINE.search(run.error))}"
        )
    if run.timed_out or time_needed > 3600 * hours:
        needs = f"it needs {time_needed / 3600:.1f} hours of {hours:g}"
        problem = f"{run.cell} ran into the limit" if run.timed_out else needs
        return Verdict(TIMEOUT, f"{problem}; set PREDICT_MINUTES, TTA = False, or fewer models")
    path = working / "submission.csv"
    if not path.is_file():
        others = [str(p.relative_to(working)) for p in working.rglob("*.csv") if "sub" in p.name]
        there = f"; there is {first_five(others)}" if others else '; set SUBMISSION = "rle"'
        return Verdict(NO_CSV, f"the notebook wrote no submission.csv into its folder{there}")
    problem = check_submission(path, hidden)
    if problem:
        return Verdict(SCORING, f"submission.csv: {problem}")
    return Verdict(OK, f"submission.csv has each of the {len(hidden.answers)} rows of the sample")


# --------------------------------------------------------------------------------------------------
#  The command
# --------------------------------------------------------------------------------------------------


def attach(folders: tuple[Path, ...], folder: Path, link: Any) -> bool:
    """Mount what is attached besides the competition; whether smp's wheel is in it."""
    for path in folders:
        if not path.is_dir():
            raise UserError(
                f"--attach {path}", "is no folder", "name a folder, as a data set has it"
            )
        about = path / "dataset-metadata.json"
        name = json.loads(about.read_text())["id"] if about.exists() else f"you/{path.name}"
        target = folder / "input" / "datasets" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        link(path.absolute(), target)
    return any(list(path.rglob(f"{SMP}-*")) for path in folders)


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """{path: size and date} of all files of a folder."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


class Stage(NamedTuple):
    """A folder in which a notebook is rerun."""

    folder: Path
    prefix: list[str]  # of its kernel's command
    env: dict[str, str]
    hidden: Hidden
    has_wheel: bool  # of smp


def prepare(
    folder: Path, data: Path, slug: str, attached: tuple[Path, ...], more: bool = False
) -> Stage:
    """Set up the folders of a rerun. `more`: with more hidden images. Raises UserError."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("input", "working"):
        (folder / name).mkdir(parents=True)
    prefix = namespace(folder, [path.resolve() for path in (data, *attached) if path.is_dir()])
    link = os.symlink if prefix else copy_tree
    has_wheel = attach(attached, folder, link)
    hidden = make_hidden(data, folder / "input" / "competitions" / slug, link, more)
    return Stage(folder, prefix, environment_of(folder, has_wheel), hidden, has_wheel)


def measure_again(
    notebook: NotebookNode, first: Stage, stage: Stage, hours: float, gigabytes: tuple[float, float]
) -> dict[str, float]:
    """The seconds of the cells with another number of images, trained as before."""
    print(
        f"runs it again with {stage.hidden.count} images, to see what grows with them", flush=True
    )
    if (first.folder / "working" / "out").exists():
        shutil.copytree(first.folder / "working" / "out", stage.folder / "working" / "out")
    return times_of(execute(notebook, stage, hours, gigabytes))


def changed_input(before: dict[Path, tuple[int, int]], stage: Stage) -> str:
    """What a notebook has written to its input, where that could be written to."""
    after = {} if stage.prefix else contents(stage.folder / "input")
    changed = sorted({path for path, _ in before.items() ^ after.items()})
    return first_five(path.relative_to(stage.folder / "input") for path in changed)


def rehearse(
    notebook: NotebookNode,
    data: Path,
    folder: Path,
    hours: float = 9,
    images: int = 1000,
    attached: tuple[Path, ...] = (),
    changes: dict[str, Any] | None = None,
    gigabytes: tuple[float, float] = (29, 20),
) -> Verdict:
    """Run a notebook in `folder` as Kaggle reruns it, and print the verdict. Raises UserError.

    `changes`: settings of this run alone; `gigabytes`: of memory and of /kaggle/working.
    """
    folder, data = folder.resolve(), data.resolve()
    changes, own = dict(changes or {}), read_settings(settings_cell(notebook))
    todo = adapt(notebook, changes)
    slug = slug_of(str((own | changes).get("DATA", "auto")), data)
    stage = prepare(folder, data, slug, attached)
    if own and not stage.has_wheel:
        todo.append(
            "attach the wheel of segmentation-models-pytorch, here it was this machine's: "
            "python tools/kernel.py bundle OWNER/SLUG"
        )
    print_stage(stage)
    before, again = {} if stage.prefix else contents(folder / "input"), copy.deepcopy(notebook)
    run = execute(notebook, stage, hours, gigabytes)
    (folder / "executed.ipynb").write_text(json.dumps(notebook, indent=1))
    count, times = stage.hidden.count, times_of(run)
    each = growth(times, count)
    surely = estimate(times, {"prediction": each.get("prediction", 0)}, count, images, own, changes)
    verdict = judge(run, folder / "working", stage.hidden, hours, surely[0])
    needed, at_most = estimate(times, each, count, images, own, changes), " at most"
    if verdict.name == OK and needed[0] > 3600 * hours:
        more = prepare(folder.with_name(f"{folder.name}-again"), data, slug, attached, more=True)
        times_again = measure_again(again, stage, more, hours, gigabytes)
        each = growth(times, count, times_again, more.hidden.count)
        needed, at_most = estimate(times, each, count, images, own, changes), ""
        verdict = judge(run, folder / "working", stage.hidden, hours, needed[0])
    changed = changed_input(before, stage)
    if changed and verdict.name != EXCEPTION:
        verdict = Verdict(EXCEPTION, f"it writes to /kaggle/input, which is read-only: {changed}")
    print(f"clock: {needed[1]}{at_most}")
    print_verdict(verdict, folder, todo)
    return verdict


def print_stage(stage: Stage) -> None:
    """What is hidden, and how the notebook is shut in."""
    print(f"hidden test set: {stage.hidden.words}")
    how = "Linux's namespaces" if stage.prefix else "proxies and sockets; its input is a copy"
    print(f"no network, read-only input: by {how}", flush=True)


def slug_of(setting: str, data: Path) -> str:
    """The name of the competition that DATA means."""
    return data.name if setting == "auto" else setting.rstrip("/").split("/")[-1]


def print_verdict(verdict: Verdict, folder: Path, todo: list[str]) -> None:
    """The end of what is printed; `todo`: before a submission."""
    print(f"the notebook with its outputs: {folder / 'executed.ipynb'}\n")
    print(f"{verdict.name}: {verdict.reason}")
    for line in todo:
        print(f"before you submit: {line}")


def adapt(notebook: NotebookNode, changes: dict[str, Any]) -> list[str]:
    """Change the settings as asked for, and those without which there is no submission.

    Returns what is to be done before the notebook is submitted.
    """
    cell, todo = settings_cell(notebook), []
    if not cell:
        return []
    own = read_settings(cell)
    if own.get("SUBMISSION") == "none" and "SUBMISSION" not in changes:
        changes["SUBMISSION"] = "rle"
        todo.append('set SUBMISSION = "rle" in notebook.py, as this rehearsal did')
    if "MAX_MINUTES" in changes and not own.get("MAX_MINUTES"):
        todo.append("the clock counts MAX_MINUTES of this rehearsal; set it in notebook.py, too")
    change_settings(cell, changes)
    return todo
