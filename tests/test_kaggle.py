"""The notebook's hands, without a notebook: what is attached, flags, scripts, earlier versions."""

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import KIT, run
from PIL import Image

import train
from kit import cli, kaggle


def settings(**changes):
    """What the settings cell assigns, some of it changed."""
    text = (KIT / "notebook.py").read_text()
    [cell] = re.findall(r"^# %% settings\n(.*?)^# %%", text, re.MULTILINE | re.DOTALL)
    values = {}
    exec(cell, {}, values)
    return values | changes


def contents_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder next to an empty input, without GPUs and without a network."""
    for name in ("input", "working", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(kaggle, "MOUNTS", (str(tmp_path / "kaggle" / "input"), "../input"))
    monkeypatch.setattr(kaggle, "is_online", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HF_HUB_CACHE", "")  # as it is now after the test, whatever the kit does
    for name in ("HF_HUB_CACHE", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)

    class Place:
        input, working = tmp_path / "input", tmp_path / "working"

        @staticmethod
        def attach(*names, content=""):
            for name in names:
                path = Place.input / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
            return path if len(names) == 1 else [Place.input / name for name in names]

        @staticmethod
        def saved(name, words="encoder_weights min_pixels"):
            """A file as torch saves it."""
            path = Place.attach(name)
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", words)
            return path

        @staticmethod
        def gpus(*names):
            """An nvidia-smi that knows these."""
            tool = tmp_path / "bin" / "nvidia-smi"
            tool.write_text("#!/bin/sh\n" + "".join(f"echo '{name}'\n" for name in names))
            tool.chmod(0o755)

    return Place


def write_scripts(folder, body="print(sys.argv[1:])", field=""):
    """Small stand-ins for the two scripts."""
    for name, title in (("train.py", "Config"), ("infer.py", "Options")):
        text = f"import sys, time, signal, os\nclass {title}:\n    data: str\n    out: str\n"
        fields = "    epochs: int\n    resume: str\n" if name == "train.py" else "    model: list\n"
        (folder / name).write_text(f"{text}{fields}    tta: bool\n{field}\n{body}\n")


# --------------------------------------------------------------------------------------------------
#  Settings and flags
# --------------------------------------------------------------------------------------------------


def test_a_script_gets_each_setting_that_it_has_a_field_for(place):
    names = "metric arch encoder encoder_weights height width max_minutes session_minutes seed lr"
    names += " init config flips extra"
    names += (
        " batch_size loss augment masks classes folds fold devices threshold submission pos_weight"
    )
    write_scripts(place.working, field="".join(f"    {name}: str\n" for name in names.split()))
    own = settings(POS_WEIGHT=2.0, TTA=False)
    train = kaggle.flags("train.py", own, data="X")
    infer = kaggle.flags("infer.py", own, model=["a", "b"])
    for words in (train, infer):
        assert words[words.index("--pos_weight") + 1] == "2.0"
        assert words[words.index("--tta") + 1] == "false"
        assert "--train" not in words
    assert train[:2] == ["--data", "X"]
    assert train.count("--data") == 1
    assert infer[:3] == ["--model", "a", "b"]
    assert "--epochs" in train
    assert "--epochs" not in infer
    with pytest.raises(kaggle.StepFailed, match=r"^POS_WEIHGT: .*did you mean POS_WEIGHT\?$"):
        kaggle.flags("train.py", settings(POS_WEIHGT=2.0))
    with pytest.raises(kaggle.StepFailed, match="function loss"):
        kaggle.flags("train.py", settings(FOCAL_LOSS=1))
    with pytest.raises(kaggle.StepFailed, match="^OUT: "):
        kaggle.flags("train.py", settings(OUT="elsewhere"))


def test_what_equals_the_default_of_a_script_is_left_out(monkeypatch):
    monkeypatch.chdir(KIT)
    assert kaggle.flags("train.py", settings()) == ["--session_minutes", "660"]
    assert kaggle.flags("infer.py", settings()) == ["--batch_size", "0", "--tta", "true"]


@pytest.mark.parametrize(
    ("setting", "value", "train", "infer"),
    [
        ("EPOCHS", 40, "--epochs 40", ""),
        ("EPOCHS", 0, "", ""),
        ("SEED", 0, "", ""),
        ("SEED", 7, "--seed 7", ""),
        ("TTA", True, "", "--tta true"),
        ("TTA", False, "--tta false", "--tta false"),
        ("TTA", "auto", "--tta auto", ""),
        ("FOLD", 0, "", ""),
        ("FOLD", "all", "--fold all", ""),
        ("LR", 0, "", ""),
        ("LR", "auto", "--lr auto", ""),
        ("LOSS", "bce=1,dice=1", "", ""),
        ("LOSS", "bce=1", "--loss bce=1", ""),
        ("AUGMENT", 1.0, "", ""),
        ("AUGMENT", 1, "--augment 1", ""),
        ("GROW", True, "--grow true", ""),
        ("MIN_PIXELS", -1, "", "--min_pixels -1"),
        ("DATA", "auto", "", ""),
        ("THRESHOLD", 0.4, "", "--threshold 0.4"),
        ("CLASSES", ["car", "road"], "--classes car road", ""),
    ],
)
def test_what_differs_from_the_default_of_a_script_is_kept(
    monkeypatch, setting, value, train, infer
):
    monkeypatch.chdir(KIT)
    own = {"DATA": "auto", "TRAIN": True, setting: value}
    assert kaggle.flags("train.py", own) == train.split()
    assert kaggle.flags("infer.py", own) == infer.split()


def test_values_of_a_step_come_before_the_settings(monkeypatch):
    monkeypatch.chdir(KIT)
    own = settings(MASKS="labels", DEVICES=2)
    values = {"data": Path("/input/my data"), "out": "predictions", "masks": "auto"}
    words = kaggle.flags("infer.py", own, model=["a.pt"], **values)
    assert words[:4] == ["--model", "a.pt", "--data", "/input/my data"]
    assert "--masks" not in words
    assert "--devices" not in words
    assert kaggle.flags("train.py", {}, check=True, out="out") == ["--check", "true"]


def test_the_limit_of_the_training_is_not_that_of_the_prediction(monkeypatch):
    monkeypatch.chdir(KIT)
    own = settings(MAX_MINUTES=600, PREDICT_MINUTES=30, FLIPS="hv")
    assert "--max_minutes 600" in " ".join(kaggle.flags("train.py", own))
    assert "--flips hv" in " ".join(kaggle.flags("train.py", own))
    for minutes in (0, 30):
        words = kaggle.flags("infer.py", own, max_minutes=minutes)
        assert words.count("--max_minutes") == (minutes > 0)
        assert "600" not in words


def test_defaults_are_read_without_running_the_script(place):
    fields = "a: float = -1\n    b: float = 1 / 3\n    c: float = -EPS\n    d: str\n    e: bool = ("
    text = f"class Config:\n    {fields}\n        True\n    )\nraise SystemExit\n"
    (place.working / "train.py").write_text(text)
    assert kaggle.defaults("train.py") == {"a": -1, "b": None, "c": None, "d": None, "e": True}


def test_settings_are_those_of_the_cell_as_it_was_last_run():
    """A line that was mistyped, and one that was deleted, do not survive in the session."""
    cells = [
        "",
        "DATA = 'a'\nTRAIN = True\nEPOCHS = 3\nEPOSCH = 5",
        "DATA = 'b'\nWIDTH, TRAIN = 5, False\nEPOCHS: int = 4",
        "DATA",
        "TRAIN = DATA = (",
    ]
    namespace = {"DATA": "b", "TRAIN": False, "EPOCHS": 4, "WIDTH": 5, "EPOSCH": 5, "In": cells}
    own = kaggle.read_settings(cells, namespace)
    assert sorted(own.items()) == [("DATA", "b"), ("EPOCHS", 4), ("TRAIN", False), ("WIDTH", 5)]
    with pytest.raises(kaggle.StepFailed, match="run the settings cell first"):
        kaggle.read_settings(cells[-1:], namespace)


def test_flags_are_printed_as_settings(place):
    text = "--model a, --encoder_weights b, --out c or --unknown"
    assert kaggle.with_setting_names(text) == text, "there are no scripts"
    for script in ("train.py", "infer.py"):
        shutil.copy(KIT / script, place.working)
    words = "MODELS a, ENCODER_WEIGHTS b, --out c or --unknown"
    assert kaggle.with_setting_names(text) == words


# --------------------------------------------------------------------------------------------------
#  Run a script
# --------------------------------------------------------------------------------------------------


def test_a_failed_step_is_one_line():
    assert kaggle.StepFailed("DATA: gone")._render_traceback_() == ["error: DATA: gone"]


def test_a_failing_script_ends_the_cell_with_its_own_message(place, capsys):
    printed = "print('hello'); print('error: --resume x: gone; or --unknown', file=sys.stderr)"
    write_scripts(place.working, f"{printed}; sys.exit(2)")
    with pytest.raises(kaggle.StepFailed) as failure:
        kaggle.run("train.py")
    assert str(failure.value) == "RESUME x: gone; or --unknown", "in the notebook's words"
    capsys.readouterr()
    with pytest.raises(kaggle.StepFailed):
        kaggle.run("train.py", "--out", "a b")
    assert "$ python train.py --out 'a b'\nhello\n" in capsys.readouterr().out
    write_scripts(place.working, "print('--data', os.environ['KIT_NOTEBOOK'])")
    kaggle.run("train.py")
    assert capsys.readouterr().out.splitlines()[-1] == "DATA 1"
    write_scripts(place.working, r"sys.stdout.buffer.write(b'caf\xc3\xa9 \xff\n')")
    kaggle.run("train.py")
    assert capsys.readouterr().out.splitlines()[-1] == "caf\u00e9 \ufffd"
    write_scripts(place.working, "os.kill(os.getpid(), 9)")
    with pytest.raises(kaggle.StepFailed, match="^it ended with status -9, see above$"):
        kaggle.run("train.py")


def test_data_that_cannot_be_trained_on_is_one_line_before_the_training(tmp_path, monkeypatch):
    monkeypatch.chdir(KIT)
    for name, mode in (("images/a.png", "RGB"), ("images/b.png", "RGB"), ("masks/a.png", "L")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new(mode, (8, 8)).save(tmp_path / name)
    values = {"data": tmp_path, "out": tmp_path / "data_check", "check": True}
    done = run("train.py", *kaggle.flags("train.py", settings(), **values))
    assert done.returncode == 2
    last = kaggle.with_setting_names(done.stderr).strip().splitlines()[-1]
    assert last.startswith("error: DATA ")
    assert "leave these images out with MISSING leave_out" in last
    assert "Traceback" not in done.stderr


CELL = f"""
import sys, threading
sys.path.insert(0, {str(KIT)!r})
from kit import kaggle
timer = threading.Timer
threading.Timer = lambda seconds, *options: timer(min(seconds, float(sys.argv[1])), *options)
try:
    kaggle.run("train.py")
except kaggle.StepFailed as failure:
    print(*failure._render_traceback_())
    sys.exit(1)
print("not reached")
"""
PATIENT = """
from pathlib import Path
def interrupted(*_):
    Path('signals').write_text(Path('signals').read_text() + 'x')
Path('signals').write_text('')
signal.signal(signal.SIGINT, interrupted)
print('ready', flush=True)
Path('pid').write_text(str(os.getpid()))
time.sleep(SECONDS)
print('exported', flush=True)
"""


def start_cell(folder, seconds, killed_after=60):
    """A process that runs the stand-in for train.py, which takes its time; returned once it runs.

    `killed_after`: seconds that it gets after a Ctrl-C.
    """
    write_scripts(folder, PATIENT.replace("SECONDS", str(seconds)))
    process = subprocess.Popen(
        [sys.executable, "-c", CELL, str(killed_after)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
    return process


@pytest.mark.parametrize("group", [True, False], ids=["the group", "the kernel"])
def test_a_stop_reaches_the_script_once_and_waits_for_it(place, group):
    """Jupyter signals the kernel's whole group; subprocess.run would kill the script soon after."""
    process = start_cell(place.working, seconds=2)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.strip().splitlines()[-2:] == ["exported", "error: stopped"]
    assert (place.working / "signals").read_text() == "x"
    assert "not reached" not in output


def test_a_script_that_does_not_stop_is_killed(place):
    process = start_cell(place.working, seconds=60, killed_after=0.5)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert output.strip().splitlines()[-1] == "error: stopped, killed after 60 s"
    assert "exported" not in output


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's PR_SET_PDEATHSIG")
def test_a_kernel_that_is_killed_leaves_no_training_behind(place):
    process = start_cell(place.working, seconds=60)
    process.kill()
    process.communicate(timeout=60)
    state = Path(f"/proc/{(place.working / 'pid').read_text()}/stat")
    wait_for(lambda: not state.exists() or state.read_text().split()[2] == "Z", 10)


# --------------------------------------------------------------------------------------------------
#  What is attached
# --------------------------------------------------------------------------------------------------


def test_the_set_up_shows_what_there_is(place, monkeypatch):
    place.attach("competitions/tgs-salt/train/images/a.png", "datasets/bob/wheels/x.whl")
    place.attach("old-mount/one.txt")
    place.attach(*(f"notebooks/carol/earlier/{number}.txt" for number in range(7)))
    place.gpus("Tesla T4", "Tesla T4")
    printed = kaggle.Session().describe()
    for line in (
        "  competitions/tgs-salt: train",
        "  datasets/bob/wheels: x.whl",
        "  notebooks/carol/earlier: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ... (7 in all)",
        "  old-mount: one.txt",
        "GPU: Tesla T4, Tesla T4; internet: off",
    ):
        assert line in printed.splitlines()
    assert "NO GPU" not in printed
    assert "weights" not in printed
    place.gpus()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    printed = kaggle.Session().describe()
    assert "GPU: none" in printed
    assert "*** NO GPU" in printed


def test_nothing_is_attached(place, monkeypatch):
    monkeypatch.setattr(kaggle, "is_online", lambda: True)
    session = kaggle.Session()
    printed = f"attached in {place.input}:\n  nothing\nGPU: none; internet: on"
    assert session.describe() == printed
    (place.working.parent / "kaggle" / "input").mkdir(parents=True)
    assert kaggle.Session().root == place.working.parent / "kaggle" / "input"


def test_what_is_attached_later_is_seen(place):
    session = kaggle.Session()
    place.attach("datasets/bob/images/a.png")
    with pytest.raises(kaggle.StepFailed):
        session.find("DATA", "images")
    session.look()
    assert session.find("DATA", "images") == place.input / "datasets/bob/images"


def test_the_internet_is_there_if_the_package_index_is(monkeypatch):
    asked = []

    def refuse(address, timeout):
        asked.append((address, timeout))
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert not kaggle.is_online()
    assert asked == [("https://pypi.org/simple/segmentation-models-pytorch/", 3)]
    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: io.BytesIO())
    assert kaggle.is_online()


def test_the_walk_is_fast_enough(place):
    for folder in range(30):
        (place.input / f"images{folder}").mkdir()
        for number in range(300):
            (place.input / f"images{folder}" / f"{number}.png").touch()
    session = kaggle.Session()
    start = time.process_time()
    session.look()
    assert time.process_time() - start < 0.5
    assert len(session.files) == 9000


@pytest.mark.parametrize(
    ("mount", "name"),
    [
        ("competitions/tgs-salt", "tgs-salt"),
        ("tgs-salt", "tgs-salt"),
        ("Competitions/TGS-Salt", "tgs-salt"),
        ("competitions/tgs-salt", "TGS-salt"),
        ("competitions/tgs-salt", "/kaggle/input/tgs-salt"),
        ("competitions/tgs-salt/train", "tgs-salt/train"),
        ("datasets/bob/my-images", "my-images"),
        ("datasets/bob/my-images", "bob/my-images"),
        ("datasets/bob/my-images/deep/er/data_road", "data_road"),
        ("notebooks/bob/prepared", "prepared"),
        ("models/bob/road-net/pytorch/default/1", "road-net"),
    ],
)
def test_data_takes_a_bare_slug(place, mount, name):
    place.attach(f"{mount}/image.png")
    folder = place.input / mount
    while name != "tgs-salt/train" and folder.name.lower() != Path(name).name.lower():
        folder = folder.parent
    assert kaggle.Session().data_folder(name, "none") == folder


def test_of_several_folders_of_a_name_the_highest_is_taken(place):
    place.attach("datasets/bob/images/deep/images/a.png", "competitions/salt/a/b/images/a.png")
    session = kaggle.Session()
    assert session.data_folder("images", "none") == place.input / "datasets/bob/images"


def test_a_slug_that_is_not_attached_or_not_clear_is_an_error(place, capsys):
    place.attach("datasets/bob/images/a.png", "datasets/carol/images/a.png")
    session = kaggle.Session()
    with pytest.raises(kaggle.StepFailed, match="^DATA: tgs-salt is not attached"):
        session.data_folder("tgs-salt", "none")
    assert "  datasets/bob/images: a.png" in capsys.readouterr().out
    with pytest.raises(kaggle.StepFailed, match="bob/images or .*carol/images"):
        session.data_folder("images", "none")


KITTI = "datasets/sakshaymahna/kittiroadsegmentation/training/image_2/um_000000.png"


@pytest.mark.parametrize(
    ("attached", "taken"),
    [
        ([KITTI, "competitions/salt/train/a.png"], "competitions/salt"),
        ([KITTI, "salt/train/a.png", "salt/sample_submission.csv"], "salt"),
        (["competitions/salt/a.png", "datasets/bob/sample_submission.csv"], "competitions/salt"),
        ([KITTI], None),
        (["competitions/salt/a.png", "competitions/nuclei/b.png"], None),
        (["salt/sampleSubmission.csv", "nuclei/stage_2_sample_submission.csv"], None),
    ],
)
def test_auto_with_a_submission_takes_the_only_competition(place, capsys, attached, taken):
    place.attach(*attached)
    session = kaggle.Session()
    if taken:
        assert session.data_folder("auto", "rle") == place.input / taken
        assert "SUBMISSION is rle" in capsys.readouterr().out.splitlines()[-1]
        return
    with pytest.raises(kaggle.StepFailed, match="^DATA: ") as failure:
        session.data_folder("auto", "rle")
    last = str(failure.value)
    several = len(attached) > 1
    assert ("salt" in last and "nuclei" in last) if several else "no competition" in last
    listed = f"  {attached[0].split('/')[0]}"
    assert listed in capsys.readouterr().out, "what is attached is listed"


def test_without_a_submission_auto_is_kitti_and_the_competition_is_named(place, capsys):
    place.attach(KITTI, "competitions/salt/train/a.png")
    assert kaggle.Session().data_folder("auto", "none") == "auto"
    assert "salt" in capsys.readouterr().out.splitlines()[-1]


def test_zips_of_a_competition_are_unpacked_outside_the_working_folder(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mount = place.attach("competitions/salt/train.csv", content="id,rle\n").parent
    place.attach("competitions/salt/more/a.txt", "competitions/salt/done/b.txt")
    contents = {
        "train.zip": ["train/a.png", "train/b.png"],  # with its own folder
        "test.zip": ["images/c.png", "d.png"],
        "sample_submission.csv.zip": ["sample_submission.csv"],
        "done.zip": ["other.txt"],  # its folder is there already
    }
    for name, members in contents.items():
        with zipfile.ZipFile(mount / name, "w") as archive:
            for member in members:
                info = zipfile.ZipInfo(member, (2020, 1, 2, 3, 4, 6))
                archive.writestr(info, member)
    before = contents_of(place.input)
    folder = kaggle.Session().data_folder("salt", "none")
    assert kaggle.Session().data_folder("salt", "none") == folder
    assert place.working not in folder.parents
    assert not list(place.working.iterdir())
    for name in ("train/a.png", "train/b.png", "test/images/c.png", "test/d.png"):
        assert (folder / name).read_text() == name.removeprefix("test/")
    assert time.localtime((folder / "train/a.png").stat().st_mtime)[:4] == (2020, 1, 2, 3)
    assert (folder / "sample_submission.csv").is_file()
    assert (folder / "train.csv").read_text() == "id,rle\n"
    assert (folder / "more" / "a.txt").exists()
    assert {path.name for path in folder.glob("*.zip")} == {"done.zip"}
    assert (folder / "done" / "b.txt").exists()
    assert contents_of(place.input) == before


def test_no_more_processes_than_gpus(place, capsys):
    session = kaggle.Session()
    assert session.processes(1) == 1
    assert session.launcher(1) == []
    place.gpus("Tesla T4")
    session = kaggle.Session()
    assert session.processes(2) == 1
    printed = capsys.readouterr().out
    assert printed == "DEVICES: 1 instead of 2; GPUs of this session: 1\n"
    assert session.launcher(2) == []
    place.gpus("Tesla T4", "Tesla T4")
    session = kaggle.Session()
    assert session.processes(2) == 2
    assert session.launcher(2) == ["-m", "torch.distributed.run", "--nproc_per_node", 2]


# --------------------------------------------------------------------------------------------------
#  segmentation-models-pytorch and weights
# --------------------------------------------------------------------------------------------------


def make_wheel(folder, version):
    """An installable stand-in for the library."""
    info = f"segmentation_models_pytorch-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: segmentation-models-pytorch\nVersion: {version}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"segmentation_models_pytorch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("segmentation_models_pytorch/__init__.py", f"version = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", about + "Requires-Dist: torch<1\n")  # --no-deps
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def smp(monkeypatch):
    """Whether segmentation-models-pytorch can be found: `smp(False)`."""
    find = importlib.util.find_spec

    def is_there(there):
        answer = find("json") if there else None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: answer if "segmentation_models" in name else find(name, *more),
        )

    return is_there


@pytest.fixture
def commands(monkeypatch):
    """The command lines that would have run."""
    lines = []
    monkeypatch.setattr(kaggle, "run", lambda *words: lines.append(list(map(str, words))))
    return lines


def test_the_newest_attached_wheel_is_installed(place, smp, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    make_wheel(place.input / "datasets" / "bob" / "wheels" / "deep", "0.10.0")
    make_wheel(place.input / "z-old", "0.9.1")
    make_wheel(place.input / "z-older", "0.5.0")
    smp(False)
    kaggle.Session().install_smp()
    assert "0.10.0-py3-none-any.whl" in capsys.readouterr().out
    installed = tmp_path / "site" / "segmentation_models_pytorch" / "__init__.py"
    assert "0.10.0" in installed.read_text()
    smp(True)
    kaggle.Session().install_smp()
    assert not capsys.readouterr().out, "it is there"


@pytest.mark.parametrize(
    ("versions", "newest"),
    [
        (["0.6", "0.5.9"], "0.6"),
        (["0.9.10", "0.9.9"], "0.9.10"),
        (["1.0.0", "0.10.0"], "1.0.0"),
        (["0.10.0.post1", "0.10.0", "0.10"], "0.10.0.post1"),
    ],
)
@pytest.mark.parametrize("turn", [1, -1], ids=["the newest first", "the newest last"])
def test_versions_are_compared_as_numbers(place, smp, commands, versions, newest, turn):
    for number, version in enumerate(versions[::turn]):
        make_wheel(place.input / f"wheel{number}", version)
    smp(False)
    kaggle.Session().install_smp()
    [[*_, wheel]] = commands
    assert Path(wheel).name == f"segmentation_models_pytorch-{newest}-py3-none-any.whl"


def test_without_internet_and_wheel_there_is_one_sentence(place, smp, commands, monkeypatch):
    make_wheel(place.input / "too-old", "0.5.0")
    smp(False)
    words = r"turn the internet on.*wheel, 0\.6 or newer"
    with pytest.raises(kaggle.StepFailed, match=words) as failure:
        kaggle.Session().install_smp()
    assert "\n" not in str(failure.value)
    assert not commands
    monkeypatch.setattr(kaggle, "is_online", lambda: True)
    kaggle.Session().install_smp()
    assert commands[0][-2:] == ["--no-deps", "segmentation-models-pytorch>=0.6"]


def test_a_source_archive_is_taken_too(place, smp, commands):
    place.attach("smp/segmentation_models_pytorch-0.7.0.tar.gz", "smp/other-9.tar.gz")
    smp(False)
    kaggle.Session().install_smp()
    [command] = commands
    assert command[-1].endswith("smp/segmentation_models_pytorch-0.7.0.tar.gz")
    assert "--no-index" in command
    assert "--no-deps" in command


def test_encoder_weights_come_from_what_is_attached(place):
    def found(encoder="resnet34", weights="imagenet"):
        taken = kaggle.Session().encoder_weights(encoder, weights)
        return taken, os.environ.get("HF_HUB_CACHE")

    place.attach("cache/hub/models--smp-hub--resnet50.imagenet/snapshots/1/model.safetensors")
    assert found() == ("imagenet", None), "another encoder's"
    folder = place.input / "models/bob/hub/pytorch/1/models--smp-hub--resnet34.imagenet"
    folder.mkdir(parents=True)
    assert found() == ("imagenet", str(folder.parent))
    for name in ("se_resnet34-1.pth", "resnet34-1.txt", "xresnet34.pth"):
        place.attach(f"weights/{name}")
    assert found() == ("imagenet", str(folder.parent))
    file = place.attach("models/torch/nets/resnet34/weights/1/resnet34-b627a593.pth")
    assert found() == (file, None), "a file comes before a cache"
    assert found(weights="none") == ("none", None)
    lite = place.attach("lite/tf_efficientnet_lite0-0aa007d2.pth")
    assert found("timm-tf_efficientnet_lite0") == (lite, None)


def test_of_an_attached_run_its_settings_and_its_model_are_found(place, capsys):
    version = "notebooks/bob/version-3"
    recipe, folds = place.attach(f"{version}/out/config.json", f"{version}/out/fold0/config.json")
    model = place.attach(f"{version}/out/model.pt")
    hub = place.attach("datasets/bob/hub/model.safetensors")
    session = kaggle.Session()
    assert session.recipe("version-3") == session.recipe("version-3/out") == recipe
    assert session.recipe("out/fold0/config.json") == folds
    files = ("model.pt", "model.safetensors")
    assert session.file_in("INIT", "version-3", *files) == model
    assert session.file_in("INIT", "bob/hub", *files) == hub
    assert session.file_in("INIT", "", *files) == session.recipe("") == ""
    with pytest.raises(kaggle.StepFailed, match="CONFIG: version-4 is not attached"):
        session.recipe("version-4")


def test_the_encoder_of_a_file_of_settings_counts_where_the_cell_has_its_default(place):
    shutil.copy(KIT / "train.py", place.working)
    file = place.attach("lite/resnet50-11ad3fa6.pth")
    content = {"encoder": "resnet50", "encoder_weights": "imagenet"}
    recipe = place.attach("run/config.json", content=json.dumps(content))
    session = kaggle.Session()
    assert session.encoder_weights("resnet34", "imagenet") == "imagenet"
    assert session.encoder_weights("resnet34", "imagenet", recipe) == file
    assert session.encoder_weights("resnet18", "imagenet", recipe) == "imagenet"
    recipe.write_text(json.dumps(content | {"encoder_weights": "none"}))
    assert session.encoder_weights("resnet34", "imagenet", recipe) == "none"
    recipe.write_text("[1]")
    assert session.encoder_weights("resnet34", "imagenet", recipe) == "imagenet"


def test_a_file_of_settings_counts_for_all_that_the_cell_leaves_at_its_defaults(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(KIT)
    recipe = tmp_path / "config.json"
    names = {"DATA", "SUBMISSION", "TRAIN", "CONFIG", "INIT", "RESUME", "DEVICES"}
    given = {"epochs": 7, "lr": 0.003, "arch": "FPN", "fold": 3, "height": 96, "augment": 0.5}
    recipe.write_text(json.dumps(given))
    words = kaggle.flags("train.py", settings(SEED=9), config=recipe)
    config = cli.parse(train.Config, "", words)
    assert {name: getattr(config, name) for name in given} == given
    assert (config.seed, config.session_minutes) == (9, 660)
    passed = {word[2:].upper() for word in words if word.startswith("--")}
    assert passed <= names | {"SEED", "SESSION_MINUTES"}


# --------------------------------------------------------------------------------------------------
#  Models and earlier versions
# --------------------------------------------------------------------------------------------------


def test_foreign_models_are_skipped_by_name(place, capsys):
    def found(models="auto", train=False):
        return kaggle.Session().model_files(models, train)

    with pytest.raises(kaggle.StepFailed, match=r"no model\.pt of this kit"):
        found()
    foreign = place.attach("datasets/bob/yolo/model.pt", content="foreign")
    other = place.saved("datasets/bob/other/model.pt", "state_dict encoder_weights")
    with pytest.raises(kaggle.StepFailed, match=r"no model\.pt of this kit"):
        found()
    own = place.saved("notebooks/alice/kit/out/fold0/model.pt")
    place.saved("notebooks/alice/kit/out-1/fold0/model.pt")  # set aside: a run started over
    capsys.readouterr()
    assert found() == [own]
    lines = capsys.readouterr().out.splitlines()
    skipped = [line.split()[1] for line in lines if line.startswith("skipped")]
    assert sorted(skipped) == sorted([str(foreign), str(other)])
    assert found(train=True) == ["out"]
    assert found(["yolo/model.pt", "kit"]) == [foreign, place.input / "notebooks/alice/kit"]
    assert found("kit") == [place.input / "notebooks/alice/kit"]
    shutil.rmtree(place.input)
    (place.working / "out").mkdir()
    assert found() == ["out"], "of an earlier cell"


RUN = ("model.pt", "config.json", "metrics.csv", "metrics.json", "curves.png", "validation.jpg")


def test_only_the_kits_own_files_of_an_earlier_version_are_copied(place, capsys):
    for name in ("folds-ckpt/last.ckpt", "datasets/bob/images/last.ckpt"):
        place.attach(name, content="foreign")
    place.saved("datasets/bob/lightning/last.ckpt", "pytorch-lightning_version encoder_weights")
    kaggle.Session().copy_earlier_version()
    assert "copied" not in capsys.readouterr().out
    assert not (place.working / "out").exists()
    version = "notebooks/alice/kit/out"
    place.saved(f"{version}/last.ckpt")
    place.saved(f"{version}-1/last.ckpt")  # set aside by a run that started over
    place.attach(
        *(f"{version}/{name}" for name in RUN), f"{version}/huge.bin", f"{version}/sub/model.pt"
    )
    kaggle.Session().copy_earlier_version()
    printed = capsys.readouterr().out
    assert f"copied {place.input / version} to out/: resumed if it fits" in printed
    assert {path.name for path in (place.working / "out").rglob("*")} == {*RUN, "last.ckpt"}
    assert [path.name for path in place.working.iterdir()] == ["out"]


def test_of_several_versions_the_newest_is_copied(place, capsys):
    for number in (1, 2, 3):
        place.saved(f"notebooks/alice/kit-{number}/out/fold0/last.ckpt")
        place.saved(f"notebooks/alice/kit-{number}/out/fold1/last.ckpt")
    for path in place.input.rglob("last.ckpt"):
        os.utime(path, (10**9, 10**9))
    kaggle.Session().copy_earlier_version()
    copied = f"copied {place.input}/notebooks/alice/kit-3/out to out/ (the newest of 3"
    assert copied in capsys.readouterr().out
    assert sorted(path.name for path in (place.working / "out").iterdir()) == ["fold0", "fold1"]
    shutil.rmtree(place.working / "out")
    os.utime(place.input / "notebooks/alice/kit-2/out/fold1/last.ckpt", (2 * 10**9, 2 * 10**9))
    kaggle.Session().copy_earlier_version()
    assert "kit-2/out to out/" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
#  Results
# --------------------------------------------------------------------------------------------------


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_an_earlier_prediction_is_not_taken_for_this_one(place):
    kaggle.clear_predictions()
    stale = ("submission.csv", "submission.zip", "submission_kitti.zip")
    write(place.working, *stale, "predictions/masks/stale.png", "out/model.pt", "my.csv")
    kaggle.clear_predictions()
    assert sorted(path.name for path in place.working.iterdir()) == ["my.csv", "out"]


def test_a_submission_is_copied_to_where_kaggle_looks_and_leaves_few_files(place, capsys):
    images = [f"predictions/{folder}/{n}.png" for folder in ("masks", "bev") for n in range(3)]
    write(place.working, *images, "predictions/submission.csv", "predictions/metrics.json")
    assert kaggle.collect_submission("rle") == [Path("submission.csv")]
    assert (place.working / "submission.csv").read_text() == "predictions/submission.csv"
    assert "submission.csv: submit it" in capsys.readouterr().out
    left = {path.name for path in (place.working / "predictions").rglob("*")}
    assert left == {"masks.zip", "bev.zip", "submission.csv", "metrics.json"}
    with zipfile.ZipFile("predictions/masks.zip") as archive:
        assert sorted(archive.namelist()) == ["0.png", "1.png", "2.png"]


def test_without_a_submission_the_images_stay(place, capsys):
    write(place.working, "predictions/masks/a.png")
    assert kaggle.collect_submission("none") == []
    assert (place.working / "predictions" / "masks" / "a.png").exists()
    assert not capsys.readouterr().out
