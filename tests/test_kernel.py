"""The notebook is the kit; it runs where nothing else is; what Kaggle rejects is a failure."""

import ast
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import nbformat
import numpy as np
import pytest
from conftest import KIT, build_once
from PIL import Image

FILES = (
    "train.py", "infer.py", "data.py", "tables.py", "losses.py", "loaders.py", "predict.py",
    "evaluate.py", "class_metrics.py", "metrics.py", "visualize.py", "submissions.py",
    "colours.py", "kitti.py", "class_folders.py", "layouts.py", "folders.py",
    "rle.py", "callbacks.py", "resume.py", "masks.py", "labels.py", "images.py",
    "classes.py", "trial.py", "model.py", "encoders.py", "utils.py",
)  # fmt: skip
ANSWER = {
    "ref": "/code/alice/road-segmentation-kit",
    "url": "https://www.kaggle.com/code/alice/road-segmentation-kit",
    "versionNumber": 3,
    "error": "",
}


def kernel(*flags, kit=KIT, env=None):
    command = [sys.executable, str(kit / "kernel.py"), *map(str, flags)]
    environment = os.environ | (env or {})
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("build")
    done = kernel("build", "--owner", "alice", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def cell(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def sources(built):
    """{id: source} of the code cells."""
    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}


# --------------------------------------------------------------------------------------------------
#  build


def test_the_cells_are_the_files(built):
    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    written = [one.source for one in notebook.cells if one.source.startswith("%%writefile")]
    assert written == [f"%%writefile {name}\n{(KIT / name).read_text()}" for name in FILES]
    names = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    files = [Path(name).stem for name in FILES]
    steps = ["look-data", "run-train", "scores", "run-infer", "look", "submission"]
    assert names == ["settings", "scripts", "inputs", "setup", *files, *steps]
    assert sorted(path.name for path in built.iterdir()) == ["kernel-metadata.json", "kernel.ipynb"]


def test_only_the_training_script_is_open_and_every_other_file_is_introduced(built):
    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    folded = {cell.id for cell in notebook.cells if cell.metadata.get("_kg_hide-input")}
    assert folded == {"scripts", "inputs", "setup", *(Path(name).stem for name in FILES[1:])}
    for before, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        if after.source.startswith("%%writefile") and after.id in folded:
            docstring = ast.get_docstring(ast.parse(after.source.partition("\n")[2]))
            assert before.source == f"**{after.id}.py**: {docstring.splitlines()[0]}"


def test_the_notebook_begins_with_three_lines_an_image_and_the_settings(built):
    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    introduction = notebook.cells[0]
    lines = [line for line in introduction.source.splitlines() if line and line[0] not in "#!"]
    assert len(lines) == 3
    [(name, content)] = introduction.attachments.items()
    assert f"(attachment:{name})" in introduction.source
    assert len(content["image/jpeg"]) > 1000
    assert next(cell for cell in notebook.cells if cell.cell_type == "code").id == "settings"


def test_every_setting_says_what_it_is_for(built):
    lines = sources(built)["settings"].splitlines()
    assert lines[0] == "# Your competition"
    assert [line.split(" = ")[0] for line in lines[1:4]] == ["DATA", "SUBMISSION", "METRIC"]
    assert not lines[4]
    settings = [line for line in lines if line and not line.startswith("# ")]
    assert all(re.fullmatch(r"[A-Z_]+ = \S+  # .+", line) for line in settings)
    promised = (
        "DATA SUBMISSION METRIC ARCH ENCODER ENCODER_WEIGHTS HEIGHT WIDTH TRAIN EPOCHS MAX_MINUTES "
        "SESSION_MINUTES BATCH_SIZE LR DICE AUGMENT MASKS CLASSES FOLDS FOLD SEED DEVICES RESUME "
        "PREDICT MODELS THRESHOLD TTA"
    )
    assert [line.split(" = ")[0] for line in settings] == promised.split()


def test_equal_input_gives_equal_bytes(built, tmp_path):
    assert kernel("build", "--owner", "alice", "--out", tmp_path).returncode == 0
    for path in built.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_metadata_says_everything_and_takes_the_owner_from_the_login(tmp_path):
    login = {"KAGGLE_USERNAME": "carol", "KAGGLE_KEY": "k", "KAGGLE_CONFIG_DIR": str(tmp_path)}
    assert kernel("build", "--out", tmp_path, env=login).returncode == 0
    metadata = json.loads((tmp_path / "kernel-metadata.json").read_text())
    assert metadata["id"] == "carol/road-segmentation-kit"
    assert (tmp_path / metadata["code_file"]).exists()
    flags = {"is_private": True, "enable_gpu": True, "enable_tpu": False, "enable_internet": True}
    assert {flag: metadata[flag] for flag in flags} == flags
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["dataset_sources"] == ["sakshaymahna/kittiroadsegmentation"]


def test_the_cells_cannot_be_imported_by_accident():
    """Jupyter has a package of the same name, which some programs try to import."""
    done = subprocess.run(
        [sys.executable, "-c", "import notebook"], cwd=KIT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert not done.stdout


def test_a_file_without_a_cell_is_noticed(fork):
    (fork.kit / "extra.py").write_text('"""More."""\n')
    assert fork.build().returncode == 0, "nothing imports it"
    text = (
        (fork.kit / "metrics.py")
        .read_text()
        .replace("import json\n", "import extra\nimport json\n")
    )
    (fork.kit / "metrics.py").write_text(text)
    done = fork.build()
    assert done.returncode == 2
    assert done.stderr.startswith("error: metrics.py imports extra.py")


# --------------------------------------------------------------------------------------------------
#  push and pull: Kaggle's own client, and a server on loopback that answers as Kaggle does


@pytest.fixture
def site(tmp_path):
    """A stand-in for Kaggle: `answer` is what it says, `asked` what it got; `env` leads to it."""

    class Site(BaseHTTPRequestHandler):
        asked, answer, status = [], dict(ANSWER), 200

        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            Site.asked.append((self.path, json.loads(content)))
            body = json.dumps(Site.answer).encode()
            self.send_response(Site.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "config").mkdir()
    Site.env = {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_USERNAME": "alice",
        "KAGGLE_KEY": "dummy",
        "http_proxy": f"http://127.0.0.1:{server.server_port}",
        "no_proxy": "",
        "KAGGLE_CONFIG_DIR": str(tmp_path / "config"),
    }
    yield Site
    server.shutdown()


def test_push_sends_the_notebook_and_says_what_comes_next(site, tmp_path):
    done = kernel("push", "--out", tmp_path / "build", env=site.env)
    assert done.returncode == 0, done.stdout + done.stderr
    [(_, sent)] = [(path, body) for path, body in site.asked if path.endswith("SaveKernel")]
    assert json.loads(sent["text"]) == json.loads((tmp_path / "build/kernel.ipynb").read_text())
    assert sent["slug"] == "alice/road-segmentation-kit"
    assert sent["machineShape"] == "NvidiaTeslaT4"
    assert sent["enableGpu"]
    next_steps = ("kernels status alice/road", "kernels output alice/road", "-v 3 -f ")
    for words in (ANSWER["url"], "version 3", *next_steps):
        assert words in done.stdout


def test_the_next_steps_name_the_notebook_as_kaggle_answered(site, tmp_path):
    site.answer = ANSWER | {"ref": "/code/alice/another-name"}
    done = kernel("push", "--out", tmp_path / "build", env=site.env)
    assert "kernels status alice/another-name\n" in done.stdout
    assert "-k alice/another-name -v 3" in done.stdout
    assert "road-segmentation-kit" not in done.stdout.partition("next:")[2]


@pytest.mark.parametrize(
    "no",
    [
        {"error": "Maximum batch GPU session count of 2 reached."},
        {"invalidDatasetSources": ["sakshaymahna/kittiroadsegmentation"]},
        {"invalidCompetitionSources": ["titanic"]},
        {"invalidKernelSources": ["alice/earlier"]},
        {"invalidModelSources": ["alice/model"]},
        {"invalidTags": ["nonsense"]},
        {"status": 403},
        {"status": 500},
    ],
    ids=lambda no: next(iter(no)) + str(no.get("status", "")),
)
def test_push_fails_when_kaggle_says_no(site, tmp_path, no):
    site.status = no.get("status", 200)
    site.answer = ANSWER | no
    done = kernel("push", "--out", tmp_path / "build", env=site.env)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Kaggle rejects the push: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "next:" not in done.stdout
    [reason] = no.values()
    assert str(reason[0] if isinstance(reason, list) else reason).rstrip(".") in done.stderr


def test_a_quota_that_is_used_up_is_said_as_such(site, tmp_path):
    site.answer = ANSWER | {"error": "Maximum weekly GPU quota of 30.00 hours reached."}
    done = kernel("push", "--out", tmp_path / "build", env=site.env)
    assert done.returncode == 1
    assert "your GPU quota is used up" in done.stderr
    assert "kernel-metadata.json" not in done.stderr


def test_metadata_that_cannot_be_pushed_is_one_line(fork, site):
    path = fork.kit / "kernel-metadata.json"
    path.write_text(path.read_text().replace("Road segmentation kit", "Kit"))
    done = kernel("push", "--out", fork.kit / "build", kit=fork.kit, env=site.env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: kernel-metadata.json: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not site.asked


def test_push_without_credentials_is_one_line(tmp_path):
    nobody = {"KAGGLE_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}
    nobody |= dict.fromkeys(("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN"), "")
    for action in (["push"], ["pull", "bob/road-fork"]):
        done = kernel(*action, "--out", tmp_path / "build", env=nobody)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert "https://www.kaggle.com/settings/api" in done.stderr
        assert not (tmp_path / "build").exists()


@pytest.fixture
def fork(site, built, tmp_path):
    """A copy of the kit and the notebook on the site: `pull(*flags)`, `save()` after a change."""

    class Fork:
        kit = tmp_path / "kit"
        notebook = nbformat.read(built / "kernel.ipynb", as_version=4)

        @staticmethod
        def save(language="python", kind="notebook", text=""):
            source = text or nbformat.writes(Fork.notebook)
            blob = {"source": source, "language": language, "kernelType": kind, "slug": "road-fork"}
            site.answer = {"blob": blob, "metadata": {"ref": "bob/road-fork"}}

        @staticmethod
        def pull(*flags, name="bob/road-fork"):
            return kernel("pull", name, *flags, kit=Fork.kit, env=site.env)

        @staticmethod
        def build():
            return kernel("build", "--owner", "bob", "--out", Fork.kit / "build", kit=Fork.kit)

        @staticmethod
        def drop_ids():
            """What a site may do: it saves an older format, which has no ids."""
            Fork.notebook.nbformat_minor = 4
            for one in Fork.notebook.cells:
                del one["id"]

        @staticmethod
        def changed():
            names = ("notebook.py", *FILES)
            return [n for n in names if (Fork.kit / n).read_bytes() != (KIT / n).read_bytes()]

    (Fork.kit / "docs").mkdir(parents=True)
    for name in ("kernel.py", "kernel-metadata.json", "notebook.py", "docs/demo.jpg", *FILES):
        shutil.copy(KIT / name, Fork.kit / name)
    return Fork


def test_pull_brings_back_what_was_changed_on_the_site(fork):
    tweaked = cell(fork.notebook, "train")
    assert "HorizontalFlip(p=0.5)" in tweaked.source
    tweaked.source = tweaked.source.replace("HorizontalFlip(p=0.5)", "HorizontalFlip(p=0.25)")
    fork.notebook.cells.append(nbformat.v4.new_code_cell("%%writefile ../stray.py\nprint(1)"))
    fork.save()
    seen = fork.pull()
    assert seen.returncode == 0, seen.stderr
    assert re.search(r"^\+ +A\.HorizontalFlip\(p=0\.25\)", seen.stdout, re.MULTILINE)
    assert "NOT brought back" in seen.stdout
    assert "%%writefile ../stray.py" in seen.stdout
    assert not fork.changed(), "asked first"
    assert fork.pull("--yes").returncode == 0
    assert (fork.kit / "train.py").read_text() == tweaked.source.partition("\n")[2]
    assert fork.changed() == ["train.py"]
    assert not (fork.kit.parent / "stray.py").exists()


@pytest.mark.parametrize("ids", [True, False], ids=["with ids", "without ids"])
def test_pull_names_every_cell_that_differs(fork, ids):
    """Settings, a step, a text, a file with a comment above its magic: each is brought back."""
    settings, step = cell(fork.notebook, "settings"), cell(fork.notebook, "run-train")
    settings.source = settings.source.replace("EPOCHS = 40", "EPOCHS = 80")
    step.source += "\n!nvidia-smi\n    # indented"
    cell(fork.notebook, "next").source += "\n- Sleep."
    metrics = cell(fork.notebook, "metrics")
    metrics.source = "# my measures\n\n" + metrics.source
    fork.notebook.cells.append(nbformat.v4.new_code_cell("print('appended')"))
    fork.notebook.cells.append(nbformat.v4.new_code_cell(""))
    if not ids:
        fork.drop_ids()
    fork.save()
    done = fork.pull("--yes")
    assert done.returncode == 0, done.stderr
    named = re.findall("^differs: (.*)$", done.stdout, re.MULTILINE)
    assert named == ["the cell settings", "metrics.py", "the cell run-train", "the cell next"]
    assert done.stdout.count("NOT brought back") == 1
    assert "print('appended')" in done.stdout
    assert fork.changed() == ["notebook.py", "metrics.py"]
    ours = (KIT / "metrics.py").read_text()
    assert (fork.kit / "metrics.py").read_text() == f"# my measures\n{ours}"
    text = (fork.kit / "notebook.py").read_text()
    ast.parse(text)
    assert "EPOCHS = 80" in text
    assert "\n# !nvidia-smi\n" in text
    assert fork.build().returncode == 0
    rebuilt = sources(fork.kit / "build")
    assert rebuilt["settings"] == settings.source
    assert rebuilt["run-train"] == step.source


def test_pull_says_what_cannot_be_brought_back(fork):
    cell(fork.notebook, "about-rle").source = "my own words"
    fork.notebook.cells.remove(cell(fork.notebook, "scores"))
    fork.save()
    done = fork.pull("--yes")
    assert done.returncode == 0
    assert "NOT brought back: the cell scores" in done.stdout
    assert "NOT brought back: the cell about-rle" in done.stdout
    assert "my own words" in done.stdout
    assert not fork.changed()
    cell(fork.notebook, "look").source += "\n# %% another\nprint(1)"
    fork.save()
    done = fork.pull("--yes")
    assert done.returncode == 2
    assert "# %%" in done.stderr
    assert not fork.changed()


@pytest.mark.parametrize(
    "name",
    [
        "bob/road-fork",
        "https://www.kaggle.com/code/bob/road-fork",
        "https://www.kaggle.com/code/bob/road-fork/edit/run/123",
        "kaggle.com/bob/road-fork?scriptVersionId=1#Settings",
        "/code/bob/road-fork",
    ],
)
def test_pull_takes_a_name_or_an_address(fork, site, name):
    fork.save()
    done = fork.pull(name=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no file differs\n"
    [(_, sent)] = [(path, body) for path, body in site.asked if path.endswith("GetKernel")]
    assert (sent["userName"], sent["kernelSlug"]) == ("bob", "road-fork")


def test_what_cannot_be_pulled_is_one_line(fork, site):
    for name in ("road-fork", "https://example.com/code/bob/road-fork", ""):
        done = fork.pull(name=name)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    fork.save(kind="script", text="print(1)\n")
    done = fork.pull()
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1)
    assert "script" in done.stderr
    site.status = 404
    done = fork.pull()
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1)
    assert not fork.changed()


# --------------------------------------------------------------------------------------------------
#  the set-up, in an IPython of its own

SHELL = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="NoColor")
for source in json.loads(sys.argv[1]):
    if not shell.run_cell(source, store_history=True).success:
        sys.exit(1)
"""
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"PIP_NO_INDEX": "1"}


def with_settings(source, settings):
    """The settings cell with some lines changed, and others appended."""
    for name, value in settings.items():
        line = f"{name} = {value!r}"
        pattern = rf"^{name} = .*$"
        known = re.search(pattern, source, re.MULTILINE)
        source = re.sub(pattern, line, source, flags=re.MULTILINE) if known else f"{source}\n{line}"
    return source


@pytest.fixture
def session(built, tmp_path):
    """A Kaggle session without a network: call it with code that runs after the set-up."""
    (tmp_path / "input").mkdir()
    (tmp_path / "working").mkdir()
    (tmp_path / "bin").mkdir()
    own = sources(built)
    root = tmp_path

    class Session:
        input, working = root / "input", root / "working"

        def start(self, code, before="", env=None, **settings):
            cells = [with_settings(own["settings"], settings)]
            cells += [own["scripts"], before or "0", own["inputs"], own["setup"], code]
            path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
            environment = os.environ | NOWHERE | {"TMPDIR": str(root), "PATH": path} | (env or {})
            environment |= {"IPYTHONDIR": str(root / "ipython"), "PYTHONPATH": ""}
            return subprocess.Popen(
                [sys.executable, "-c", SHELL, json.dumps(cells)],
                cwd=self.working,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

        def __call__(self, code, status=0, **options):
            process = self.start(code, **options)
            output, errors = process.communicate(timeout=120)
            assert process.returncode == status, output + errors
            return output

        def fails(self, code, **options):
            """The last line of a session that must fail."""
            output = self(code, status=1, **options)
            assert "Traceback" not in output
            return output.strip().splitlines()[-1]

        def attach(self, *names, content=""):
            for name in names:
                path = self.input / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
            return path

        def saved(self, name, words="encoder_weights min_pixels"):
            """A file as torch saves it."""
            path = self.attach(name)
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", words)
            return path

        def gpus(self, *names):
            """An nvidia-smi that knows these."""
            tool = root / "bin" / "nvidia-smi"
            tool.write_text("#!/bin/sh\n" + "".join(f"echo '{name}'\n" for name in names))
            tool.chmod(0o755)

    return Session()


def write_scripts(folder, body="print(sys.argv[1:])", field=""):
    """Small stand-ins for the two scripts."""
    for name, title in (("train.py", "Config"), ("infer.py", "Options")):
        text = f"import sys, time, signal, os\nclass {title}:\n    data: str\n    out: str\n"
        fields = "    epochs: int\n    resume: str\n" if name == "train.py" else "    model: list\n"
        (folder / name).write_text(f"{text}{fields}    tta: bool\n{field}\n{body}\n")


def test_the_set_up_shows_what_there_is(session):
    session.attach("competitions/tgs-salt/train/images/a.png", "datasets/bob/wheels/x.whl")
    session.attach("old-mount/one.txt")
    session.attach(*(f"notebooks/carol/earlier/{number}.txt" for number in range(7)))
    session.gpus("Tesla T4", "Tesla T4")
    printed = session("0")
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
    (session.working.parent / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
    printed = session("0", env={"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert "GPU: none" in printed
    assert "*** NO GPU" in printed


def test_the_walk_is_fast_enough(session):
    for folder in range(30):
        (session.input / f"images{folder}").mkdir()
        for number in range(300):
            (session.input / f"images{folder}" / f"{number}.png").touch()
    code = "start = time.perf_counter(); walk(); print(len(files), time.perf_counter() - start)"
    count, seconds = session(code).splitlines()[-1].split()
    assert int(count) == 9000
    assert float(seconds) < 0.5


def test_a_script_gets_each_setting_that_it_has_a_field_for(session):
    names = "metric arch encoder encoder_weights height width max_minutes session_minutes seed lr"
    names += (
        " batch_size dice augment masks classes folds fold devices threshold submission pos_weight"
    )
    fields = "".join(f"    {name}: str\n" for name in names.split())
    write_scripts(session.working, field=fields)
    code = "print(flags('train.py', data='X')); print(flags('infer.py', model=['a', 'b']))"
    train, infer = map(ast.literal_eval, session(code, POS_WEIGHT=2.0, TTA=False).splitlines()[-2:])
    for words in (train, infer):
        assert words[words.index("--pos_weight") + 1] == 2.0
        assert words[words.index("--tta") + 1] == "false"
        assert "--train" not in words
    assert train[:2] == ["--data", "X"]
    assert train.count("--data") == 1
    assert infer[:3] == ["--model", "a", "b"]
    assert "--epochs" in train
    assert "--epochs" not in infer
    last = session.fails("flags('train.py')", POS_WEIHGT=2.0)
    assert last.startswith("error: POS_WEIHGT: ")
    assert last.endswith("did you mean POS_WEIGHT?")
    assert "function loss" in session.fails("flags('train.py')", LOSS="focal")
    assert session.fails("flags('train.py')", OUT="elsewhere").startswith("error: OUT: ")


def test_settings_are_those_of_the_cell_as_it_was_last_run(session):
    """A line that was mistyped, and one that was deleted, do not survive in the session."""
    write_scripts(session.working)
    code = """
def cell(*lines):
    get_ipython().run_cell("\\n".join(lines), store_history=True)
cell("DATA = 'a'", "TRAIN = True", "EPOCHS = 3", "EPOSCH = 5")
cell("DATA = 'b'", "WIDTH, TRAIN = 5, False", "EPOCHS: int = 4")
cell("TRAIN = DATA = (")
print("SETTINGS", sorted(settings().items()))
"""
    lines = session(code).splitlines()
    assert lines[-1] == "SETTINGS [('DATA', 'b'), ('EPOCHS', 4), ('TRAIN', False), ('WIDTH', 5)]"


def test_a_failing_script_ends_the_cell_with_its_own_message(session):
    printed = "print('hello'); print('error: --resume x: gone; or --unknown', file=sys.stderr)"
    write_scripts(session.working, f"{printed}; sys.exit(2)")
    last = session.fails("run('train.py')")
    assert last == "error: RESUME x: gone; or --unknown", "in the notebook's words"
    output = session("run('train.py', '--out', 'a b')", status=1)
    assert "$ python train.py --out 'a b'\nhello\n" in output
    write_scripts(session.working, "print('--data', os.environ['KIT_NOTEBOOK'])")
    assert session("run('train.py')").splitlines()[-1] == "DATA 1"
    write_scripts(session.working, "os.kill(os.getpid(), 9)")
    assert session.fails("run('train.py')") == "error: it ended with status -9, see above"


PATIENT = """
from pathlib import Path
def interrupted(*_):
    Path('signals').write_text(Path('signals').read_text() + 'x')
Path('signals').write_text('')
signal.signal(signal.SIGINT, interrupted)
print('ready', flush=True)
time.sleep(2) or time.sleep(2)
print('exported', flush=True)
"""


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("group", [True, False], ids=["the group", "the kernel"])
def test_a_stop_reaches_the_script_once_and_waits_for_it(session, group):
    """Jupyter signals the kernel's whole group; subprocess.run would kill the script soon after."""
    write_scripts(session.working, PATIENT)
    process = session.start("run('train.py')\nprint('not reached')")
    wait_for(lambda: (session.working / "signals").exists())
    time.sleep(0.5)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.strip().splitlines()[-2:] == ["exported", "error: stopped"]
    assert (session.working / "signals").read_text() == "x"
    assert "not reached" not in output


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's PR_SET_PDEATHSIG")
def test_a_kernel_that_is_killed_leaves_no_training_behind(session):
    body = "open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    write_scripts(session.working, body)
    process = session.start("run('train.py')")
    wait_for(lambda: (session.working / "pid").exists() and (session.working / "pid").read_text())
    number = int((session.working / "pid").read_text())
    process.kill()
    process.communicate(timeout=60)
    state = Path(f"/proc/{number}/stat")
    wait_for(lambda: not state.exists() or state.read_text().split()[2] == "Z", 10)


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
def test_data_takes_a_bare_slug(session, mount, name):
    session.attach(f"{mount}/image.png")
    printed = session("print(data_folder())", DATA=name)
    folder = session.input / mount
    while name != "tgs-salt/train" and folder.name.lower() != Path(name).name.lower():
        folder = folder.parent
    assert printed.splitlines()[-1] == str(folder)


def test_a_slug_that_is_not_attached_or_not_clear_is_an_error(session):
    session.attach("datasets/bob/images/a.png", "datasets/carol/images/a.png")
    output = session("data_folder()", status=1, DATA="tgs-salt")
    assert "  datasets/bob/images: a.png" in output
    assert output.strip().splitlines()[-1].startswith("error: DATA: tgs-salt is not attached")
    last = session.fails("data_folder()", DATA="images")
    assert "bob/images" in last
    assert "carol/images" in last


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
def test_auto_with_a_submission_takes_the_only_competition(session, attached, taken):
    session.attach(*attached)
    if taken:
        lines = session("print(data_folder())", SUBMISSION="rle").splitlines()
        assert lines[-1] == str(session.input / taken)
        assert "SUBMISSION is rle" in lines[-2]
    else:
        output = session("data_folder()", status=1, SUBMISSION="rle")
        last = output.strip().splitlines()[-1]
        assert last.startswith("error: DATA: ")
        several = len(attached) > 1
        assert ("salt" in last and "nuclei" in last) if several else "no competition" in last
        assert f"  {attached[0].split('/')[0]}" in output, "what is attached is listed"


def test_without_a_submission_auto_is_kitti_and_the_competition_is_named(session):
    session.attach(KITTI, "competitions/salt/train/a.png")
    lines = session("print(data_folder())").splitlines()
    assert lines[-1] == "auto"
    assert "salt" in lines[-2]


def test_zips_of_a_competition_are_unpacked_outside_the_working_folder(session):
    mount = session.attach("competitions/salt/train.csv", content="id,rle\n").parent
    session.attach("competitions/salt/more/a.txt", "competitions/salt/done/b.txt")
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
    before = contents_of(session.input)
    code = "print(data_folder()); folder = data_folder(); print(folder)"
    first, second = session(code, DATA="salt").splitlines()[-3::2]
    folder = Path(first)
    assert first == second
    assert session.working not in folder.parents
    assert not list(session.working.iterdir())
    for name in ("train/a.png", "train/b.png", "test/images/c.png", "test/d.png"):
        assert (folder / name).read_text() == name.removeprefix("test/")
    assert time.localtime((folder / "train/a.png").stat().st_mtime)[:4] == (2020, 1, 2, 3)
    assert (folder / "sample_submission.csv").is_file()
    assert (folder / "train.csv").read_text() == "id,rle\n"
    assert (folder / "more" / "a.txt").exists()
    assert (folder / "done" / "b.txt").exists()
    assert contents_of(session.input) == before


WITHOUT_SMP = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if "segmentation_models" in name else find(name)
"""


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


def test_the_newest_attached_wheel_is_installed(session, tmp_path):
    target = {"PIP_TARGET": str(tmp_path / "site")}
    make_wheel(session.input / "datasets" / "bob" / "wheels" / "deep", "0.10.0")
    make_wheel(session.input / "z-old", "0.9.1")
    make_wheel(session.input / "z-older", "0.5.0")
    printed = session("0", before=WITHOUT_SMP, env=target)
    assert "0.10.0-py3-none-any.whl" in printed
    installed = tmp_path / "site" / "segmentation_models_pytorch" / "__init__.py"
    assert "0.10.0" in installed.read_text()
    assert "pip" not in session("0"), "it is there"


def test_without_internet_and_wheel_there_is_one_sentence(session):
    make_wheel(session.input / "too-old", "0.5.0")
    last = session.fails("0", before=WITHOUT_SMP)
    assert "turn the internet on" in last
    assert "wheel, 0.6 or newer" in last


def test_a_source_archive_is_taken_too(session):
    session.attach("smp/segmentation_models_pytorch-0.7.0.tar.gz", "smp/other-9.tar.gz")
    code = "def run(*words): print('RUN', *words)"
    printed = session("install_smp()", before=f"{WITHOUT_SMP}\n{code}")
    [command] = {line for line in printed.splitlines() if line.startswith("RUN")}
    assert command.endswith("smp/segmentation_models_pytorch-0.7.0.tar.gz")
    assert "--no-index" in command
    assert "--no-deps" in command


def test_encoder_weights_come_from_what_is_attached(session):
    code = "print(encoder_weights(), os.environ.get('HF_HUB_CACHE'))"
    session.attach("cache/hub/models--smp-hub--resnet50.imagenet/snapshots/1/model.safetensors")
    assert session(code).splitlines()[-1] == "imagenet None", "another encoder's"
    folder = session.input / "models/bob/hub/pytorch/1/models--smp-hub--resnet34.imagenet"
    folder.mkdir(parents=True)
    assert session(code).splitlines()[-1] == f"imagenet {folder.parent}"
    for name in ("se_resnet34-1.pth", "resnet34-1.txt", "xresnet34.pth"):
        session.attach(f"weights/{name}")
    assert session(code).splitlines()[-1] == f"imagenet {folder.parent}"
    file = session.attach("models/torch/nets/resnet34/weights/1/resnet34-b627a593.pth")
    assert session(code).splitlines()[-1] == f"{file} None", "a file comes before a cache"
    assert session(code, ENCODER_WEIGHTS="none").splitlines()[-1] == "none None"
    lite = session.attach("lite/tf_efficientnet_lite0-0aa007d2.pth")
    printed = session(code, ENCODER="timm-tf_efficientnet_lite0")
    assert printed.splitlines()[-1] == f"{lite} None"


def test_foreign_models_are_skipped_by_name(session):
    code = "print(model_files())"
    assert "no model.pt of this kit" in session.fails(code, TRAIN=False)
    foreign = session.attach("datasets/bob/yolo/model.pt", content="foreign")
    other = session.saved("datasets/bob/other/model.pt", "state_dict encoder_weights")
    assert "no model.pt of this kit" in session.fails(code, TRAIN=False)
    own = session.saved("notebooks/alice/kit/out/fold0/model.pt")
    session.saved("notebooks/alice/kit/out-1/fold0/model.pt")  # set aside: a run started over
    lines = session(code, TRAIN=False).splitlines()
    assert lines[-1] == f"[{own!r}]"
    skipped = [line.split()[1] for line in lines if line.startswith("skipped")]
    assert skipped == [str(foreign), str(other)]
    assert session(code, TRAIN=True).splitlines()[-1] == "['out']"
    named = session(code, TRAIN=False, MODELS=["yolo/model.pt", "kit"]).splitlines()[-1]
    assert named == f"[{foreign!r}, {session.input / 'notebooks/alice/kit'!r}]"


RUN = ("model.pt", "config.json", "metrics.csv", "metrics.json", "curves.png", "validation.jpg")


def test_only_the_kits_own_files_of_an_earlier_version_are_copied(session):
    code = "copy_earlier_version()"
    for name in ("folds-ckpt/last.ckpt", "datasets/bob/images/last.ckpt"):
        session.attach(name, content="foreign")
    session.saved("datasets/bob/lightning/last.ckpt", "pytorch-lightning_version encoder_weights")
    assert "copied" not in session(code)
    assert not (session.working / "out").exists()
    run = "notebooks/alice/kit/out"
    session.saved(f"{run}/last.ckpt")
    session.saved(f"{run}-1/last.ckpt")  # set aside by a run that started over
    session.attach(*(f"{run}/{name}" for name in RUN), f"{run}/huge.bin", f"{run}/sub/model.pt")
    printed = session(code)
    assert f"copied {session.input / run} to out/: resumed if it fits" in printed
    assert {path.name for path in (session.working / "out").rglob("*")} == {*RUN, "last.ckpt"}
    assert [path.name for path in session.working.iterdir()] == ["out"]


def test_of_several_versions_the_newest_is_copied(session):
    for number in (1, 2, 3):
        session.saved(f"notebooks/alice/kit-{number}/out/fold0/last.ckpt")
        session.saved(f"notebooks/alice/kit-{number}/out/fold1/last.ckpt")
    for path in session.input.rglob("last.ckpt"):
        os.utime(path, (10**9, 10**9))
    printed = session("copy_earlier_version()")
    assert f"copied {session.input}/notebooks/alice/kit-3/out to out/ (the newest of 3" in printed
    assert sorted(path.name for path in (session.working / "out").iterdir()) == ["fold0", "fold1"]
    shutil.rmtree(session.working / "out")
    os.utime(session.input / "notebooks/alice/kit-2/out/fold1/last.ckpt", (2 * 10**9, 2 * 10**9))
    assert "kit-2/out to out/" in session("copy_earlier_version()")


def test_no_more_processes_than_gpus(session):
    assert session("print(processes())").splitlines()[-1] == "1"
    session.gpus("Tesla T4")
    lines = session("print(processes())", DEVICES=2).splitlines()
    assert lines[-2:] == ["DEVICES: 1 instead of 2; GPUs of this session: 1", "1"]
    session.gpus("Tesla T4", "Tesla T4")
    assert session("print(processes())", DEVICES=2).splitlines()[-1] == "2"


# --------------------------------------------------------------------------------------------------
#  the notebook run as Kaggle runs it: in an empty folder next to the input

SMALL = {"EPOCHS": 2, "ENCODER": "timm-mobilenetv3_small_minimal_100", "ENCODER_WEIGHTS": "none"}
SMALL |= {"HEIGHT": 64, "WIDTH": 192}


def execute(built, working, env=None, leave_out=(), more=(), **settings):
    """Run the notebook in `working` with some settings changed; returns it with its outputs.

    `leave_out`: ids of cells; `more`: (id, source) of code cells at the end.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    own = cell(notebook, "settings")
    own.source = with_settings(own.source, settings)
    notebook.cells = [one for one in notebook.cells if one.id not in leave_out]
    notebook.cells += [nbformat.v4.new_code_cell(source, id=name) for name, source in more]
    working.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": "", "TMPDIR": str(working.parent)} | (env or {})
    environment.pop("PYTEST_CURRENT_TEST", None)  # with it ipykernel hides a process's output
    resources = {"metadata": {"path": str(working)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute(env=environment)
    return notebook


def contents_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def outputs(notebook, name):
    return "".join(output.get("text", "") for output in cell(notebook, name).outputs)


def tables(notebook, name):
    shown = [output.get("data", {}) for output in cell(notebook, name).outputs]
    return [data["text/html"] for data in shown if "text/html" in data]


def images(notebook, name, kind="image/jpeg"):
    return [one for one in cell(notebook, name).outputs if kind in one.get("data", {})]


def take_smp_away():
    """It is not on Kaggle's image; the notebook's set-up installs it."""
    command = [sys.executable, "-m", "pip", "uninstall", "--yes", "segmentation-models-pytorch"]
    subprocess.run(command, check=True)


@pytest.fixture(scope="session")
def first_version(built, roads, tmp_path_factory):
    """The notebook's first run, with the data mounted as Kaggle does it now; its /kaggle."""

    def build(root):
        if "KAGGLE_IMAGE" in os.environ:
            take_smp_away()
        mount = root / "input" / "datasets" / "sakshaymahna" / "kittiroadsegmentation"
        shutil.copytree(roads, mount)
        before = contents_of(root / "input")
        notebook = execute(built, root / "working", **SMALL)
        assert contents_of(root / "input") == before, "the input is read-only"
        nbformat.write(notebook, root / "executed.ipynb")

    root = build_once(tmp_path_factory, "kaggle", build)
    return root, nbformat.read(root / "executed.ipynb", as_version=4)


def test_the_notebook_runs_in_an_empty_folder(first_version):
    root, notebook = first_version
    for name in FILES:
        assert (root / "working" / name).read_bytes() == (KIT / name).read_bytes()
    written = ("out/model.pt", "out/last.ckpt", "predictions/masks", "predictions/comparisons")
    for path in written:
        assert (root / "working" / path).exists()
    assert len(list((root / "working" / "predictions" / "masks").iterdir())) == 3
    assert "validation: MaxF" in outputs(notebook, "run-train"), "the output streams into the cell"
    assert "24 pairs" in outputs(notebook, "look-data")
    assert len(images(notebook, "look-data", "image/jpeg")) == 2
    assert len(images(notebook, "scores", "image/png")) == 1, "the curves"
    assert len(images(notebook, "scores")) == 1, "validation.jpg"
    assert len(images(notebook, "look")) == 3, "the comparisons"
    mean, pooled = tables(notebook, "scores")[:2]
    assert "Dice" in mean, "what competitions count comes first"
    assert "MaxF" in pooled


def test_an_attached_version_is_resumed_and_an_edit_starts_over(
    first_version, built, roads, tmp_path
):
    """The older mount, one folder deeper; the first version attached as its own source.

    In the same session the loss is edited then, and both cells are run again.
    """
    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation" / "data_road")
    attached = tmp_path / "input" / "notebooks" / "alice" / "road-segmentation-kit"
    shutil.copytree(first_version[0] / "working" / "out", attached / "out")
    own = sources(built)
    [line] = re.findall(r"^    return bce \+ .*$", own["train"], re.MULTILINE)
    edited = own["train"].replace(line, f"{line} + 0.1")
    later = ("look-data", "scores", "run-infer", "look", "submission")
    notebook = execute(
        built,
        tmp_path / "working",
        leave_out=later,
        more=[("edited", edited), ("run-edited", own["run-train"])],
        **SMALL | {"EPOCHS": 3},
    )
    printed = outputs(notebook, "run-train")
    assert f"copied {attached / 'out'} to out/" in printed
    assert re.search(r"out/last\.ckpt.* after epoch 2", printed)
    printed = outputs(notebook, "run-edited")
    assert "train.py differs: loss" in printed
    assert "epoch 1 of 3" in printed
    assert "RESUME out-1/last.ckpt" in printed, "in the notebook's words"
    for folder in ("out", "out-1"):
        assert (tmp_path / "working" / folder / "model.pt").exists()


def test_without_training_the_attached_models_predict_on_both_gpus(
    first_version, built, roads, tmp_path
):
    """Two processes, no word about encoder weights, and nothing of an earlier prediction."""
    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation")
    for name in ("one", "two"):
        shutil.copytree(first_version[0] / "working" / "out", tmp_path / "input" / name / "out")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Tesla T4\necho Tesla T4\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    stale = tmp_path / "working" / "predictions" / "masks" / "stale.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    (tmp_path / "working" / "submission.csv").touch()
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    notebook = execute(built, tmp_path / "working", env, TRAIN=False, DEVICES=2)
    printed = outputs(notebook, "run-infer")
    assert "torch.distributed.run --nproc_per_node 2 infer.py" in printed
    for name in ("one", "two"):
        assert str(tmp_path / "input" / name / "out" / "model.pt") in printed
    steps = ("setup", "run-train", "run-infer")
    assert not any("weights" in outputs(notebook, step) for step in steps)
    places = [root / "working" / "predictions" / "masks" for root in (tmp_path, first_version[0])]
    masks = [{path.name: cv2.imread(str(path), 0) for path in place.iterdir()} for place in places]
    assert masks[0].keys() == masks[1].keys()
    for name, mask in masks[0].items():  # batches of another size are rounded differently
        differs = (mask != masks[1][name]).mean()
        assert differs < 1e-3, f"twice the same model is that model, but for {name}: {differs}"
    assert not (tmp_path / "working" / "out").exists()
    assert not (tmp_path / "working" / "submission.csv").exists()


def test_a_step_that_fails_fails_the_notebook(built, roads, tmp_path):
    from nbclient.exceptions import CellExecutionError

    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation")
    settings = {"ENCODER": "resnet99", "ENCODER_WEIGHTS": "none"}
    with pytest.raises(CellExecutionError) as failure:
        execute(built, tmp_path / "working", leave_out=["look-data"], **settings)
    last = str(failure.value).strip().splitlines()[-1]
    assert last.startswith("error: ENCODER resnet99")
    assert "CalledProcessError" not in str(failure.value)
    assert "Traceback" not in str(failure.value)


def test_data_that_cannot_be_trained_on_is_one_line_before_the_training(session, built):
    for name in FILES:
        shutil.copy(KIT / name, session.working)
    Image.new("RGB", (8, 8)).save(session.attach("datasets/bob/cells/images/a.png"))
    Image.new("RGB", (8, 8)).save(session.attach("datasets/bob/cells/images/b.png"))
    Image.new("L", (8, 8)).save(session.attach("datasets/bob/cells/masks/a.png"))
    last = session.fails(sources(built)["look-data"], DATA="cells")
    assert last.startswith("error: DATA ")
    assert "name them with MASKS" in last


def write_competition(folder):
    """train/, train.csv of RLE masks, test/ and the sample: a white disc each, on noise."""
    rng = np.random.default_rng(0)
    tables = {"train": [["id", "rle_mask"]], "test": [["id", "rle_mask"]]}
    for name, count in (("train", 12), ("test", 3)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            y, x = np.ogrid[:64, :64]
            cy, cx = rng.integers(16, 48, 2)
            disc = (y - cy) ** 2 + (x - cx) ** 2 < 150
            pixels = (rng.integers(0, 90, (64, 64)) + 150 * disc).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{number}.png")
            edges = np.flatnonzero(np.diff(disc.T.ravel().astype(int))) + 2
            runs = " ".join(f"{a} {b - a}" for a, b in edges.reshape(-1, 2))
            tables[name].append([f"{name}{number}", runs if name == "train" else "1 1"])
    for name, path in (("train", "train.csv"), ("test", "sample_submission.csv")):
        with (folder / path).open("w", newline="") as file:
            csv.writer(file).writerows(tables[name])


def test_a_competition_next_to_kitti_from_the_settings_to_its_submission(built, roads, tmp_path):
    """Taken by itself, with the reason; few files; the head of submission.csv is shown."""
    shutil.copytree(roads, tmp_path / "input" / "datasets" / "sakshaymahna" / "kitti")
    write_competition(tmp_path / "input" / "competitions" / "discs")
    small = {
        "ENCODER": "timm-mobilenetv3_small_minimal_100",
        "ENCODER_WEIGHTS": "none",
        "EPOCHS": 1,
    }
    notebook = execute(built, tmp_path / "working", SUBMISSION="rle", **small)
    for step in ("look-data", "run-train", "run-infer"):
        assert "DATA: discs, because SUBMISSION is rle" in outputs(notebook, step)
    assert "12 pairs" in outputs(notebook, "look-data")
    rows = list(csv.reader((tmp_path / "working" / "submission.csv").open()))
    assert [row[0] for row in rows] == ["id", "test0", "test1", "test2"]
    [head] = tables(notebook, "submission")
    assert "rle_mask" in head
    assert "test2" in head
    left = {path.name for path in (tmp_path / "working" / "predictions").rglob("[!.]*")}
    assert left == {"masks.zip", "comparisons.zip", "submission.csv"}
    with zipfile.ZipFile(tmp_path / "working" / "predictions" / "masks.zip") as archive:
        assert sorted(archive.namelist()) == ["test0.png", "test1.png", "test2.png"]
    assert "Dice" in tables(notebook, "scores")[0]


@pytest.mark.skipif("KAGGLE_IMAGE" not in os.environ, reason="make kaggle-test: needs its own venv")
def test_the_image_without_internet(built, roads, tmp_path):
    """smp taken away again; a wheel and encoder weights attached; every address unreachable."""
    import segmentation_models_pytorch as smp
    import torch

    pip = [sys.executable, "-m", "pip"]
    torch_before = subprocess.run([*pip, "show", "torch"], capture_output=True, text=True).stdout
    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation")
    shutil.copytree(Path(sys.prefix) / "wheels", tmp_path / "input" / "smp-wheel")
    (tmp_path / "input" / "weights").mkdir()
    state = smp.encoders.get_encoder("resnet18", weights=None).state_dict()
    torch.save(state, tmp_path / "input" / "weights" / "resnet18-made.pth")
    take_smp_away()
    settings = SMALL | {"ENCODER": "resnet18", "ENCODER_WEIGHTS": "imagenet"}
    left_out = ["look-data"]
    notebook = execute(built, tmp_path / "working", NOWHERE, left_out, **settings)
    assert "installed from" in outputs(notebook, "setup")
    assert "resnet18-made.pth" in outputs(notebook, "run-train")
    assert (tmp_path / "working" / "predictions" / "masks").exists()
    torch_after = subprocess.run([*pip, "show", "torch"], capture_output=True, text=True).stdout
    assert torch_after == torch_before
