"""The notebook is the kit; it runs where nothing else is; what Kaggle rejects is a failure."""

import ast
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kernel
import nbformat
import numpy as np
import pytest
from conftest import ENCODER, KIT, build_once, succeed
from PIL import Image
from requests.exceptions import ConnectionError, HTTPError
from test_kaggle import contents_of, settings

from kit import kaggle

FILES = (  # in the order of their cells
    "train.py", "kit/results/predict.py", "infer.py", "utils.py",
    "kit/data/samples.py", "kit/data/extras.py", "kit/data/cache.py", "kit/data/blocks.py",
    "kit/data/folds.py", "kit/data/folders.py",
    "kit/data/names.py", "kit/data/bands.py", "kit/data/csvs.py", "kit/data/annotations.py",
    "kit/data/volumes.py",
    "kit/data/kitti.py", "kit/data/masks.py", "kit/data/values.py", "kit/data/classes.py",
    "kit/data/rle.py", "kit/data/images.py", "kit/data/readers.py", "kit/data/photos.py",
    "kit/data/slides.py", "kit/data/tiffs.py", "kit/data/arrays.py", "kit/data/rasters.py",
    "kit/network/model.py", "kit/network/encoders.py", "kit/network/runtimes.py",
    "kit/training/resolve.py", "kit/training/trial.py", "kit/training/loaders.py",
    "kit/training/losses.py", "kit/training/callbacks.py", "kit/training/resume.py",
    "kit/training/loggers.py",
    "kit/results/oof.py", "kit/results/tuning.py", "kit/results/metric_file.py",
    "kit/results/metrics.py",
    "kit/results/visualize.py", "kit/results/submissions.py",
    "kit/results/mosaics.py", "kit/results/pace.py", "kit/extra/runs.py",
    "kit/extra/blends.py", "kit/extra/polygons.py", "kit/extra/report.py", "kit/extra/viewer.py",
    "kit/extra/export.py",
    "kit/config.py", "kit/errors.py", "kit/cli.py", "kit/files.py", "kit/kaggle.py",
)  # fmt: skip
OPEN = ("train.py", "kit/results/predict.py")
ANSWER = {
    "ref": "/code/alice/road-segmentation-kit",
    "url": "https://www.kaggle.com/code/alice/road-segmentation-kit",
    "versionNumber": 3,
    "error": "",
}
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"PIP_NO_INDEX": "1"}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("build")
    kernel.build(out, "alice")
    return out


def cell(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def cell_id(file):
    return file.removesuffix(".py").replace("/", "-")


def read(built):
    return nbformat.read(built / "kernel.ipynb", as_version=4)


def sources(built):
    """{id: source} of the code cells."""
    return {cell.id: cell.source for cell in read(built).cells if cell.cell_type == "code"}


def is_one_line(text):
    return len(text.strip().splitlines()) == 1


# --------------------------------------------------------------------------------------------------
#  build
# --------------------------------------------------------------------------------------------------


def test_the_cells_are_the_files(built):
    notebook = read(built)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    written = [one.source for one in notebook.cells if one.source.startswith("%%writefile")]
    assert written == [f"%%writefile {name}\n{(KIT / name).read_text()}" for name in FILES]
    names = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    files = [cell_id(name) for name in FILES[1:]]
    steps = ["setup", "look-data", "run-train", "scores", "run-infer", "look", "submission"]
    assert names == ["settings", "train", "folders", *files, *steps]
    assert sorted(path.name for path in built.iterdir()) == ["kernel-metadata.json", "kernel.ipynb"]


def test_every_file_that_the_scripts_need_has_a_cell():
    needed, pending = set(), ["train.py", "infer.py", "utils.py", "kit/kaggle.py"]
    while pending:
        file = pending.pop()
        if file not in needed and (KIT / file).exists():
            needed.add(file)
            for node in ast.walk(ast.parse((KIT / file).read_text())):
                if isinstance(node, ast.ImportFrom):
                    modules = [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
                    pending += [f"{module.replace('.', '/')}.py" for module in modules]
    assert needed == set(FILES)


def test_what_forks_change_is_open_and_every_other_file_is_introduced(built):
    notebook = read(built)
    folded = {cell.id for cell in notebook.cells if cell.metadata.get("_kg_hide-input")}
    assert folded == {cell_id(name) for name in FILES if name not in OPEN}
    introduced = 0
    for before, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        if after.id in folded:
            first, _, text = after.source.partition("\n")
            docstring = ast.get_docstring(ast.parse(text))
            assert before.source == f"**{first.split()[1]}**: {docstring.splitlines()[0]}"
            introduced += 1
    assert introduced == len(FILES) - len(OPEN)


def test_the_notebooks_own_code_is_short(built):
    own = sources(built)
    lines = [
        line
        for name, source in own.items()
        if name != "settings" and not source.startswith("%%writefile")
        for line in source.splitlines()
    ]
    assert len(lines) <= 160


def test_the_notebook_begins_with_three_lines_an_image_and_the_settings(built):
    notebook = read(built)
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
    own = [line for line in lines if line and not line.startswith("# ")]
    assert all(re.fullmatch(r"[A-Z_]+ = \S+  # .+", line) for line in own)
    promised = (
        "DATA SUBMISSION METRIC ARCH ENCODER ENCODER_WEIGHTS HEIGHT WIDTH INIT TRAIN CONFIG EPOCHS "
        "MAX_MINUTES SESSION_MINUTES BATCH_SIZE LR LOSS AUGMENT FLIPS MASKS EXTRA CLASSES FOLDS "
        "FOLD SEED DEVICES RESUME PREDICT MODELS THRESHOLD TTA PREDICT_MINUTES"
    )
    assert [line.split(" = ")[0] for line in own] == promised.split()
    assert len(lines) <= 45  # one screen


def test_equal_input_gives_equal_bytes(built, tmp_path):
    command = [sys.executable, KIT / "tools" / "kernel.py", "build", "--owner", "alice"]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([*command, "--out", tmp_path], env=environment, check=True, timeout=120)
    for path in built.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_cells_cannot_be_imported_by_accident():
    """Jupyter has a package of the same name, which some programs try to import."""
    done = subprocess.run(
        [sys.executable, "-c", "import notebook"], cwd=KIT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert not done.stdout


# --------------------------------------------------------------------------------------------------
#  The command line, with a stand-in for Kaggle's client
# --------------------------------------------------------------------------------------------------


class Client:
    """`answer` is what Kaggle says, `blob` a notebook there; `asked` what it was asked for."""

    CONFIG_NAME_USER = "username"

    def __init__(self):
        self.user, self.asked, self.blob = "alice", [], ""
        self.say()

    def say(self, **changes):
        """Change the answer to a push."""
        answer = {"ref": ANSWER["ref"], "url": ANSWER["url"], "version_number": 3, "error": ""}
        self.answer = types.SimpleNamespace(**answer | changes)

    def get_config_value(self, name):
        return {"username": self.user}[name]

    def kernels_push(self, folder):
        self.asked.append(folder)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def kernels_pull(self, name, folder):
        self.asked.append(name)
        if isinstance(self.answer, Exception):
            raise self.answer
        path = Path(folder, "road-fork.ipynb")
        path.write_text(self.blob)
        return str(path)


@pytest.fixture
def client(monkeypatch):
    """The stand-in for Kaggle's client, logged in."""
    client = Client()
    monkeypatch.setattr(kernel, "log_in", lambda: client)
    return client


@pytest.fixture
def command(monkeypatch, capsys):
    """`kernel.py` with flags; answers what it would print, and the exit status."""

    def run(*flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["kernel.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        status = 0
        try:
            kernel.main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return types.SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return run


def test_metadata_says_everything_and_takes_the_owner_from_the_login(client, command, tmp_path):
    client.user = "carol"
    assert command("build", "--out", tmp_path).returncode == 0
    metadata = json.loads((tmp_path / "kernel-metadata.json").read_text())
    assert metadata["id"] == "carol/road-segmentation-kit"
    assert (tmp_path / metadata["code_file"]).exists()
    flags = {"is_private": True, "enable_gpu": True, "enable_tpu": False, "enable_internet": True}
    assert {flag: metadata[flag] for flag in flags} == flags
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["dataset_sources"] == ["sakshaymahna/kittiroadsegmentation"]


def test_a_notebook_is_built_without_a_login(command, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "log_in", lambda: None)
    assert command("build", "--out", tmp_path / "build").returncode == 0
    assert (tmp_path / "build" / "kernel.ipynb").exists()


def test_the_next_steps_name_the_notebook_as_kaggle_answered(client, command, tmp_path):
    client.say(ref="/code/alice/another-name")
    done = command("push", "--out", tmp_path / "build")
    assert done.returncode == 0
    assert client.asked == [str(tmp_path / "build")]
    assert "kernels status alice/another-name\n" in done.stdout
    assert "-k alice/another-name -v 3" in done.stdout
    assert "road-segmentation-kit" not in done.stdout.partition("next:")[2]


@pytest.fixture
def already_built(monkeypatch):
    """`kernel.build` that does nothing: half a second of each push whose answer alone is tested."""
    monkeypatch.setattr(kernel, "build", lambda folder, owner: {"id": f"{owner}/kit"})


@pytest.mark.usefixtures("already_built")
@pytest.mark.parametrize(
    "no",
    [
        {"error": "Maximum batch GPU session count of 2 reached."},
        {"invalid_dataset_sources": ["sakshaymahna/kittiroadsegmentation"]},
        {"invalid_competition_sources": ["titanic"]},
        {"invalid_kernel_sources": ["alice/earlier"]},
        {"invalid_model_sources": ["alice/model"]},
        {"invalid_tags": ["nonsense"]},
        {"status": "403 Client Error: Forbidden"},
        {"status": "500 Server Error"},
    ],
    ids=lambda no: next(iter(no)) + str(no.get("status", ""))[:3],
)
def test_push_fails_when_kaggle_says_no(client, command, tmp_path, no):
    client.say(**no)
    if "status" in no:
        client.answer = HTTPError(no["status"])
    done = command("push", "--out", tmp_path / "build")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Kaggle rejects the push: ")
    assert is_one_line(done.stderr)
    assert "next:" not in done.stdout
    [reason] = no.values()
    assert str(reason[0] if isinstance(reason, list) else reason).rstrip(".") in done.stderr


@pytest.mark.usefixtures("already_built")
def test_a_quota_that_is_used_up_is_said_as_such(client, command, tmp_path):
    client.say(error="Maximum weekly GPU quota of 30.00 hours reached.")
    done = command("push", "--out", tmp_path / "build")
    assert done.returncode == 1
    assert "your GPU quota is used up" in done.stderr
    assert "kernel-metadata.json" not in done.stderr


@pytest.mark.usefixtures("already_built")
def test_metadata_that_cannot_be_pushed_is_one_line(client, command, tmp_path):
    client.answer = ValueError("Title must be at\nleast five characters")
    done = command("push", "--out", tmp_path / "build")
    assert done.returncode == 2
    assert done.stderr == "error: kernel-metadata.json: Title must be at least five characters\n"


@pytest.mark.parametrize(
    ("end", "status"),
    [(None, 0), (SystemExit(1), 0), (ConnectionError("no route"), 1)],
    ids=["logged in", "no credentials", "no network"],
)
def test_the_client_logs_in_without_a_word(monkeypatch, capsys, end, status):
    class KaggleApi(Client):
        def authenticate(self):
            print("a page of help")
            if end:
                raise end

    for name in ("kaggle", "kaggle.api", "kaggle.api.kaggle_api_extended"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["kaggle.api.kaggle_api_extended"].KaggleApi = KaggleApi
    if status:
        with pytest.raises(SystemExit) as failure:
            kernel.log_in()
        assert failure.value.code == status
        assert capsys.readouterr().err == "error: Kaggle cannot be reached: no route\n"
    else:
        assert (kernel.log_in() is None) == bool(end)
    assert not capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
#  Kaggle's own client, and a server on loopback that answers as Kaggle does
# --------------------------------------------------------------------------------------------------


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
    server.server_close()


def run_kernel(*flags, env):
    line = [sys.executable, str(KIT / "tools" / "kernel.py"), *map(str, flags)]
    return subprocess.run(line, env=os.environ | env, capture_output=True, text=True, timeout=120)


def test_push_sends_the_notebook_and_says_what_comes_next(site, tmp_path):
    done = run_kernel("push", "--out", tmp_path / "build", env=site.env)
    assert done.returncode == 0, done.stdout + done.stderr
    [(_, sent)] = [(path, body) for path, body in site.asked if path.endswith("SaveKernel")]
    assert json.loads(sent["text"]) == json.loads((tmp_path / "build/kernel.ipynb").read_text())
    assert sent["slug"] == "alice/road-segmentation-kit"
    assert sent["machineShape"] == "NvidiaTeslaT4"
    assert sent["enableGpu"]
    next_steps = ("kernels status alice/road", "kernels output alice/road", "-v 3 -f ")
    for words in (ANSWER["url"], "version 3", *next_steps):
        assert words in done.stdout


def test_pull_asks_for_the_notebook(site, built):
    source = (built / "kernel.ipynb").read_text()
    blob = {"source": source, "language": "python", "kernelType": "notebook", "slug": "road-fork"}
    site.answer = {"blob": blob, "metadata": {"ref": "bob/road-fork"}}
    done = run_kernel("pull", "https://www.kaggle.com/code/bob/road-fork", env=site.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no file differs\n"
    [(_, sent)] = [(path, body) for path, body in site.asked if path.endswith("GetKernel")]
    assert (sent["userName"], sent["kernelSlug"]) == ("bob", "road-fork")


def test_push_without_credentials_is_one_line(command, monkeypatch, tmp_path):
    nobody = {"KAGGLE_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}
    nobody |= dict.fromkeys(("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN"), "")
    monkeypatch.setattr(kernel, "log_in", lambda: None)
    for done in (
        run_kernel("push", "--out", tmp_path / "build", env=nobody),
        command("push", "--out", tmp_path / "build"),
        command("pull", "bob/road-fork", "--out", tmp_path / "build"),
    ):
        assert done.returncode == 2
        assert is_one_line(done.stderr)
        assert "https://www.kaggle.com/settings/api" in done.stderr
        assert not (tmp_path / "build").exists()


# --------------------------------------------------------------------------------------------------
#  pull
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def fork(client, command, built, tmp_path, monkeypatch):
    """A copy of the kit and the notebook on the site: `pull(*flags)`, `save()` after a change."""

    class Fork:
        kit = tmp_path / "kit"
        notebook = read(built)

        @staticmethod
        def save(text=""):
            client.blob = text or nbformat.writes(Fork.notebook)

        @staticmethod
        def pull(*flags, name="bob/road-fork"):
            return command("pull", name, *flags)

        @staticmethod
        def build():
            return command("build", "--owner", "bob", "--out", Fork.kit / "build")

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

    for name in ("kernel-metadata.json", "notebook.py", "docs/demo.jpg", *FILES):
        (Fork.kit / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(KIT / name, Fork.kit / name)
    monkeypatch.setattr(kernel, "HERE", Fork.kit)
    return Fork


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("from kit import extra", "kit/extra.py"),
        ("from kit.extra import more", "kit/extra.py"),
        ("import kit.extra", "kit/extra.py"),
        ("import extra", "extra.py"),
    ],
)
def test_a_file_without_a_cell_is_noticed(fork, line, file):
    (fork.kit / file).write_text('"""More."""\n\nmore = 1\n')
    assert fork.build().returncode == 0, "nothing imports it"
    text = (fork.kit / "kit/results/metrics.py").read_text()
    assert "import json\n" in text
    text = text.replace("import json\n", f"import json\n{line}\n")
    (fork.kit / "kit/results/metrics.py").write_text(text)
    done = fork.build()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: kit/results/metrics.py imports {file}")
    assert is_one_line(done.stderr)


def test_pull_brings_back_what_was_changed_on_the_site(fork):
    tweaked = cell(fork.notebook, "train")
    assert "HorizontalFlip(p=0.5)" in tweaked.source
    tweaked.source = tweaked.source.replace("HorizontalFlip(p=0.5)", "HorizontalFlip(p=0.25)")
    fork.notebook.cells.append(nbformat.v4.new_code_cell("%%writefile ../stray.py\nprint(1)"))
    fork.save()
    seen = fork.pull()
    assert seen.returncode == 0, seen.stderr
    assert re.search(r"^\+ .*A\.HorizontalFlip\(p=0\.25\)", seen.stdout, re.MULTILINE)
    assert "NOT brought back" in seen.stdout
    assert "%%writefile ../stray.py" in seen.stdout
    assert "nothing written; --yes writes without asking" in seen.stdout
    assert not fork.changed(), "asked first"
    assert fork.pull("--yes").returncode == 0
    assert (fork.kit / "train.py").read_text() == tweaked.source.partition("\n")[2]
    assert fork.changed() == ["train.py"]
    assert not (fork.kit.parent / "stray.py").exists()


@pytest.mark.parametrize("ids", [True, False], ids=["with ids", "without ids"])
def test_pull_names_every_cell_that_differs(fork, ids):
    """Settings, a step, a text, a file with a comment above its magic: each is brought back."""
    own, step = cell(fork.notebook, "settings"), cell(fork.notebook, "run-train")
    own.source = own.source.replace("EPOCHS = 0", "EPOCHS = 80")
    step.source += "\n!nvidia-smi\n    # indented"
    cell(fork.notebook, "next").source += "\n- Sleep."
    metrics = cell(fork.notebook, "kit-results-metrics")
    metrics.source = "# my measures\n\n" + metrics.source
    fork.notebook.cells.append(nbformat.v4.new_code_cell("print('appended')"))
    fork.notebook.cells.append(nbformat.v4.new_code_cell(""))
    if not ids:
        fork.drop_ids()
    fork.save()
    done = fork.pull("--yes")
    assert done.returncode == 0, done.stderr
    named = re.findall("^differs: (.*)$", done.stdout, re.MULTILINE)
    file = "kit/results/metrics.py"
    assert named == ["the cell settings", file, "the cell run-train", "the cell next"]
    assert done.stdout.count("NOT brought back") == 1
    assert "print('appended')" in done.stdout
    assert fork.changed() == ["notebook.py", file]
    assert (fork.kit / file).read_text() == f"# my measures\n{(KIT / file).read_text()}"
    text = (fork.kit / "notebook.py").read_text()
    ast.parse(text)
    assert "EPOCHS = 80" in text
    assert "\n# !nvidia-smi\n" in text
    assert fork.build().returncode == 0
    rebuilt = sources(fork.kit / "build")
    assert rebuilt["settings"] == own.source
    assert rebuilt["run-train"] == step.source


def test_pull_says_what_cannot_be_brought_back(fork):
    cell(fork.notebook, "about-kit-data-rle").source = "my own words"
    fork.notebook.cells.remove(cell(fork.notebook, "scores"))
    fork.save()
    done = fork.pull("--yes")
    assert done.returncode == 0
    assert "NOT brought back: the cell scores" in done.stdout
    assert "NOT brought back: the cell about-kit-data-rle" in done.stdout
    assert "my own words" in done.stdout
    assert not fork.changed()
    cell(fork.notebook, "look").source += "\n# %% another\nprint(1)"
    fork.save()
    done = fork.pull("--yes")
    assert done.returncode == 2
    assert "# %%" in done.stderr
    assert not fork.changed()


def test_pull_takes_a_name_or_an_address(fork, client):
    names = (
        "bob/road-fork",
        "https://www.kaggle.com/code/bob/road-fork",
        "https://www.kaggle.com/code/bob/road-fork/edit/run/123",
        "kaggle.com/bob/road-fork?scriptVersionId=1#Settings",
        "/code/bob/road-fork",
    )
    assert {kernel.name_of(name) for name in names} == {"bob/road-fork"}
    fork.save()
    for name in names[2:4]:
        done = fork.pull(name=name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "no file differs\n"
    assert client.asked == ["bob/road-fork"] * 2


def test_what_cannot_be_pulled_is_one_line(fork, client):
    for name in ("road-fork", "https://example.com/code/bob/road-fork", ""):
        done = fork.pull(name=name)
        assert (done.returncode, is_one_line(done.stderr)) == (2, True)
        assert done.stderr.startswith("error: ")
    fork.save(text="print(1)\n")
    done = fork.pull()
    assert (done.returncode, is_one_line(done.stderr)) == (1, True)
    assert "script" in done.stderr
    client.answer = HTTPError("404 Client Error: Not Found")
    done = fork.pull()
    assert (done.returncode, is_one_line(done.stderr)) == (1, True)
    assert "404" in done.stderr
    assert not fork.changed()


@pytest.mark.parametrize(("answer", "writes"), [("y", True), ("Y", True), ("", False)])
def test_pull_asks_on_a_terminal(monkeypatch, answer, writes):
    questions = []
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", lambda text: questions.append(text) or answer)
    assert kernel.confirmed("write a?", yes=False) == writes
    assert questions == ["write a? [y/N] "]


EARLIER = {
    "train.py": "import data\n\nprint('earlier')\n",
    "infer.py": '"""Predict."""\n',
    "data.py": "import masks\n",
    "masks.py": '"""Masks."""\n\nTEXT = """\n%%writefile\n"""\n',
    "losses.py": "def dice():\n    return 1\n",
    "utils.py": "\n\nx = 1\n",
}


def test_a_notebook_of_an_earlier_version_is_kept_apart(fork, tmp_path):
    """In a folder of its own, and nothing outside of it is touched."""
    cells = [nbformat.v4.new_markdown_cell("# Image segmentation kit")]
    cells.append(nbformat.v4.new_code_cell('# Yours\nDATA = "auto"\nTRAIN = True\nEPOCHS = 80'))
    texts = EARLIER | {"../stray.py": "print(1)\n", str(tmp_path / "absolute.py"): "print(1)\n"}
    for name, text in texts.items():
        source = f"%%writefile {name}\n{text}"
        cells.append(nbformat.v4.new_code_cell(source.removesuffix("\n")))
    cells.append(nbformat.v4.new_code_cell('run("train.py")'))
    fork.notebook = nbformat.v4.new_notebook(cells=cells)
    fork.save()
    folder = fork.kit / "build" / "road-fork"
    seen = fork.pull()
    assert seen.returncode == 0, seen.stderr
    assert "bob/road-fork was built by another version of the kit: its 7 files" in seen.stdout
    assert "nothing written; --yes writes without asking" in seen.stdout
    assert not folder.exists()
    assert not fork.changed()
    done = fork.pull("--yes")
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder}" in done.stdout
    assert "differs" not in done.stdout
    written = {path.name: path.read_text() for path in folder.iterdir()}
    own = '# Yours\nDATA = "auto"\nTRAIN = True\nEPOCHS = 80\n'
    assert written == EARLIER | {"settings.py": own}
    assert not fork.changed(), "the kit's own files are left alone"
    assert not list(tmp_path.rglob("stray.py"))
    assert not (tmp_path / "absolute.py").exists()


# --------------------------------------------------------------------------------------------------
#  The notebook run as Kaggle runs it: in an empty folder next to the input
# --------------------------------------------------------------------------------------------------

SMALL = {"EPOCHS": 2, "ENCODER": ENCODER, "ENCODER_WEIGHTS": "none"}
SMALL |= {"HEIGHT": 64, "WIDTH": 192}


def with_settings(source, changes):
    """The settings cell with some lines changed, and others appended."""
    for name, value in changes.items():
        line = f"{name} = {value!r}"
        pattern = rf"^{name} = .*$"
        known = re.search(pattern, source, re.MULTILINE)
        source = re.sub(pattern, line, source, flags=re.MULTILINE) if known else f"{source}\n{line}"
    return source


def execute(built, working, env=None, leave_out=(), body="", **changes):
    """Run the notebook in `working` with some settings changed; returns it with its outputs.

    `leave_out`: ids of cells; `body`: what both scripts do in this test, instead of their work.
    """
    from nbclient import NotebookClient

    notebook = read(built)
    own = cell(notebook, "settings")
    own.source = with_settings(own.source, changes)
    for script in ("train", "infer") if body else ():
        head, _, _ = cell(notebook, script).source.partition('\nif __name__ == "__main__"')
        cell(notebook, script).source = f"{head}\n\nimport sys\n\n{body}"
    notebook.cells = [one for one in notebook.cells if one.id not in leave_out]
    working.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": "", "TMPDIR": str(working.parent)} | (env or {})
    environment["IPYTHONDIR"] = str(working.parent / "ipython")
    environment.pop("PYTEST_CURRENT_TEST", None)  # with it ipykernel hides a process's output
    resources = {"metadata": {"path": str(working)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute(env=environment)
    return notebook


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


def attach(first_version, folder):
    """The first version's out/, attached as the notebook's own source."""
    attached = folder / "input" / "notebooks" / "alice" / "road-segmentation-kit" / "out"
    return shutil.copytree(first_version[0] / "working" / "out", attached)


def test_an_attached_version_is_resumed(first_version, roads, tmp_path, monkeypatch, capsys):
    """By its own files, with the older mount, one folder deeper."""
    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation" / "data_road")
    attached = attach(first_version, tmp_path)
    results = shutil.ignore_patterns("out", "predictions", "data_check", "__pycache__")
    working = tmp_path / "working"
    shutil.copytree(first_version[0] / "working", working, ignore=results)
    monkeypatch.chdir(working)
    monkeypatch.setattr(kaggle, "MOUNTS", ("../input",))
    monkeypatch.setattr(kaggle, "is_online", lambda: False)
    session = kaggle.Session()
    session.copy_earlier_version()
    assert f"copied {attached} to out/" in capsys.readouterr().out
    own = settings(**SMALL | {"EPOCHS": 3})
    flags = kaggle.flags("train.py", own, data=session.data_folder("auto", "none"), out="out")
    printed = succeed("train.py", *flags, kit=working, cwd=working, env={"KIT_NOTEBOOK": "1"})
    assert re.search(r"out/last\.ckpt.* after epoch 2", printed)
    assert "epoch 3 of 3" in printed
    assert not (working / "out-1").exists()


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


def test_a_competition_next_to_kitti_from_the_settings_to_its_submission(
    first_version, built, roads, tmp_path
):
    """Taken by itself, with the reason; few files; the head of submission.csv is shown.

    An attached version that was trained on other data is not resumed, and kept.
    """
    shutil.copytree(roads, tmp_path / "input" / "datasets" / "sakshaymahna" / "kitti")
    write_competition(tmp_path / "input" / "competitions" / "discs")
    attached = attach(first_version, tmp_path)
    working, changes = tmp_path / "working", SMALL | {"EPOCHS": 1, "HEIGHT": 0, "WIDTH": 0}
    notebook = execute(built, working, leave_out=["look-data"], SUBMISSION="rle", **changes)
    for step in ("run-train", "run-infer"):
        assert "DATA: discs, because SUBMISSION is rle" in outputs(notebook, step)
    printed = outputs(notebook, "run-train")
    assert "12 pairs" in printed
    assert f"copied {attached} to out/" in printed
    assert "12 images were added: train0" in printed
    assert "epoch 1 of 1" in printed
    assert "RESUME out-1/last.ckpt" in printed, "in the notebook's words"
    for folder in ("out", "out-1"):
        assert (working / folder / "model.pt").exists()
    rows = list(csv.reader((working / "submission.csv").open()))
    assert [row[0] for row in rows] == ["id", "test0", "test1", "test2"]
    [head] = tables(notebook, "submission")
    assert "rle_mask" in head
    assert "test2" in head
    left = {path.name for path in (working / "predictions").rglob("[!.]*")}
    assert left == {"masks.zip", "comparisons.zip", "submission.csv", "report.html"}
    with zipfile.ZipFile(working / "predictions" / "masks.zip") as archive:
        assert sorted(archive.namelist()) == ["test0.png", "test1.png", "test2.png"]
    assert "Dice" in tables(notebook, "scores")[0]


# --------------------------------------------------------------------------------------------------
#  The notebook's steps, with scripts that only say what they were given
# --------------------------------------------------------------------------------------------------


def test_each_step_passes_on_what_the_settings_say(built, tmp_path):
    write_competition(tmp_path / "input" / "competitions" / "discs")
    shown = tmp_path / "working" / "data_check"
    shown.mkdir(parents=True)
    for name in ("examples.jpg", "augmented.jpg"):
        shutil.copy(KIT / "docs" / "demo.jpg", shown / name)
    own = {"SUBMISSION": "rle", "SEED": 7, "ENCODER_WEIGHTS": "none", "MASKS": "labels"}
    notebook = execute(built, tmp_path / "working", NOWHERE, body="print('WORKS')", **own)
    data = tmp_path / "input" / "competitions" / "discs"
    flags = "--encoder_weights none --session_minutes 660 --masks labels --seed 7"
    own_flags, rest = "--submission rle --batch_size 0", flags.partition("none ")[2]
    for step, line in {
        "look-data": f"train.py --out data_check --check true --data {data} {flags}",
        "run-train": f"train.py --encoder_weights none --data {data} {rest}",
        "run-infer": f"infer.py --model out --data {data} {own_flags}",
    }.items():
        printed = outputs(notebook, step).splitlines()
        assert printed[0].startswith("DATA: discs, because SUBMISSION is rle")
        assert printed[1:3] == [f"$ python {line}", "WORKS"]
    assert "internet: off" in outputs(notebook, "setup")
    assert len(images(notebook, "look-data")) == 2


def test_without_training_the_attached_models_predict_on_both_gpus(built, tmp_path):
    """Two processes, no word about encoder weights, and nothing of an earlier prediction."""
    working = tmp_path / "working"
    (tmp_path / "input" / "kittiroadsegmentation").mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / "input" / name / "out").mkdir(parents=True)
        with zipfile.ZipFile(tmp_path / "input" / name / "out" / "model.pt", "w") as archive:
            archive.writestr("archive/data.pkl", "encoder_weights min_pixels")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Tesla T4\necho Tesla T4\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (working / "predictions" / "masks").mkdir(parents=True)
    (working / "predictions" / "masks" / "stale.png").touch()
    (working / "submission.csv").touch()
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"} | NOWHERE
    notebook = execute(built, working, env, body="print('WORKS')", TRAIN=False, DEVICES=2)
    printed = outputs(notebook, "run-infer")
    assert "torch.distributed.run --nproc_per_node 2 infer.py" in printed
    assert printed.count("WORKS") == 2
    for name in ("one", "two"):
        assert str(tmp_path / "input" / name / "out" / "model.pt") in printed
    steps = ("setup", "run-train", "run-infer")
    assert not any("weights" in outputs(notebook, step) for step in steps)
    assert not outputs(notebook, "run-train")
    assert not (working / "out").exists()
    assert not (working / "predictions").exists()
    assert not (working / "submission.csv").exists()


def test_a_step_that_fails_fails_the_notebook(built, tmp_path):
    from nbclient.exceptions import CellExecutionError

    (tmp_path / "input").mkdir()
    message = "error: --encoder resnet99: unknown; did you mean resnet50?"
    body = f"print({message!r}, file=sys.stderr)\nsys.exit(2)"
    with pytest.raises(CellExecutionError) as failure:
        execute(built, tmp_path / "working", NOWHERE, ["look-data"], body, ENCODER_WEIGHTS="none")
    last = str(failure.value).strip().splitlines()[-1]
    assert last == "error: ENCODER resnet99: unknown; did you mean resnet50?"
    assert "CalledProcessError" not in str(failure.value)
    assert "Traceback" not in str(failure.value)


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
    changes = SMALL | {"ENCODER": "resnet18", "ENCODER_WEIGHTS": "imagenet"}
    left_out = ["look-data"]
    notebook = execute(built, tmp_path / "working", NOWHERE, left_out, **changes)
    assert "installed from" in outputs(notebook, "setup")
    assert "resnet18-made.pth" in outputs(notebook, "run-train")
    assert (tmp_path / "working" / "predictions" / "masks").exists()
    torch_after = subprocess.run([*pip, "show", "torch"], capture_output=True, text=True).stdout
    assert torch_after == torch_before
