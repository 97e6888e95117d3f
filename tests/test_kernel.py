"""The notebook is the kit; it runs where nothing else is; what Kaggle refuses is a failure."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from conftest import KIT

FILES = ("utils.py", "train.py", "infer.py")
TAKEN = {
    "ref": "/code/alice/road-segmentation-kit",
    "url": "https://www.kaggle.com/code/alice/road-segmentation-kit",
    "versionNumber": 3,
    "error": "",
}


def kernel(*flags, kit=KIT, env=None):
    command = [sys.executable, str(kit / "kernel.py"), *map(str, flags)]
    return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("build")
    done = kernel("build", "--owner", "alice", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def cell(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def test_the_cells_are_the_files(built):
    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    written = [cell for cell in notebook.cells if cell.source.startswith("%%writefile")]
    assert [c.source for c in written] == [f"%%writefile {n}\n{(KIT / n).read_text()}" for n in FILES]
    names = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    assert names == ["settings", "setup", "utils", "train", "infer", "run-train", "run-infer", "look"]
    settings = cell(notebook, "settings")
    assert not settings.metadata
    assert all("  # " in line for line in settings.source.splitlines()), "every setting says what it is for"


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


# ---------------------------------------------------------------------------------------------------------------------
#  the real CLI against a server on loopback that answers as Kaggle does


@pytest.fixture
def site(tmp_path):
    """A stand-in for the site: `answer` is what it says, `asked` what it got; `env` leads the CLI to it."""

    class Site(BaseHTTPRequestHandler):
        asked, answer, status = [], dict(TAKEN), 200

        def do_POST(self):
            Site.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
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
    proxy = f"http://127.0.0.1:{server.server_port}"
    Site.env = {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "KAGGLE_USERNAME": "alice", "KAGGLE_KEY": "dummy",
                "http_proxy": proxy, "no_proxy": "", "KAGGLE_CONFIG_DIR": str(tmp_path / "config")}  # fmt: skip
    yield Site
    server.shutdown()


def test_push_sends_the_notebook_and_says_what_comes_next(site, tmp_path):
    done = kernel("push", "--out", tmp_path / "build", env=site.env)
    assert done.returncode == 0, done.stdout + done.stderr
    [(_, sent)] = [(path, body) for path, body in site.asked if path.endswith("SaveKernel")]
    assert json.loads(sent["text"]) == json.loads((tmp_path / "build" / "kernel.ipynb").read_text())
    assert sent["slug"] == "alice/road-segmentation-kit"
    assert sent["machineShape"] == "NvidiaTeslaT4"
    assert sent["enableGpu"]
    for part in (TAKEN["url"], "version 3", "kernels status alice/road", "kernels output alice/road", "-v 3 -f "):
        assert part in done.stdout


@pytest.mark.parametrize(
    "no",
    [
        {"error": "Maximum batch GPU session count of 2 reached."},
        {"invalidDatasetSources": ["sakshaymahna/kittiroadsegmentation"]},
        {"invalidCompetitionSources": ["titanic"]},
        {"invalidKernelSources": ["alice/earlier"]},
        {"invalidTags": ["nonsense"]},
        {"status": 403},
        {"status": 500},
    ],
    ids=lambda no: next(iter(no)) + str(no.get("status", "")),
)
def test_push_fails_when_kaggle_says_no(site, tmp_path, no):
    site.status = no.get("status", 200)
    site.answer = TAKEN | no
    done = kernel("push", "--out", tmp_path / "build", env=site.env)
    assert done.returncode == 1
    assert "error" in done.stderr
    assert "next:" not in done.stdout


def test_push_without_credentials_is_one_line(tmp_path):
    nobody = {"KAGGLE_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path), "KAGGLE_USERNAME": "", "KAGGLE_KEY": "",
              "KAGGLE_API_TOKEN": ""}  # fmt: skip
    done = kernel("push", "--out", tmp_path / "build", env=nobody)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "https://www.kaggle.com/settings/api" in done.stderr
    assert not (tmp_path / "build").exists()


def test_pull_brings_back_what_was_changed_on_the_site(site, built, tmp_path):
    for name in ("kernel.py", "kernel-metadata.json", *FILES):
        shutil.copy(KIT / name, tmp_path)
    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    tweaked = cell(notebook, "train")
    tweaked.source = tweaked.source.replace("HorizontalFlip(p=0.5)", "HorizontalFlip(p=0.25)").rstrip("\n")
    notebook.cells.append(nbformat.v4.new_code_cell("%%writefile ../stray.py\nprint(1)"))
    blob = {"source": nbformat.writes(notebook), "language": "python", "kernelType": "notebook", "slug": "road-fork"}
    site.answer = {"blob": blob, "metadata": {"ref": "bob/road-fork"}}
    seen = kernel("pull", "bob/road-fork", kit=tmp_path, env=site.env)
    assert seen.returncode == 0, seen.stderr
    assert "+        A.HorizontalFlip(p=0.25)" in seen.stdout
    assert (tmp_path / "train.py").read_text() == (KIT / "train.py").read_text(), "asked first"
    assert kernel("pull", "bob/road-fork", "--yes", kit=tmp_path, env=site.env).returncode == 0
    assert (tmp_path / "train.py").read_text() == tweaked.source.partition("\n")[2] + "\n"
    for name in ("utils.py", "infer.py"):
        assert (tmp_path / name).read_bytes() == (KIT / name).read_bytes()
    assert not (tmp_path.parent / "stray.py").exists()


# ---------------------------------------------------------------------------------------------------------------------
#  the notebook run as Kaggle runs it: an empty folder, the input beside it

SMALL = {"EPOCHS": 3, "ENCODER": '"resnet18"', "ENCODER_WEIGHTS": '"none"', "HEIGHT": 64, "WIDTH": 192}


def execute(built, working, env=None, **settings):
    """Run the notebook in `working` with some settings changed; returns it with its outputs."""
    from nbclient import NotebookClient

    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    lines = cell(notebook, "settings").source.splitlines()
    for name, value in settings.items():
        [index] = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[index] = f"{name} = {value}"
    cell(notebook, "settings").source = "\n".join(lines)
    working.mkdir()
    environment = os.environ | {"PYTHONPATH": ""} | (env or {})
    environment.pop("PYTEST_CURRENT_TEST", None)  # ipykernel shows no process's output where it finds this
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(working)}}).execute(env=environment)
    return notebook


def contents(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def first_version(built, roads, tmp_path_factory):
    """The notebook's first run, with the data mounted as Kaggle does it now; its /kaggle."""
    root = tmp_path_factory.mktemp("kaggle")
    mount = root / "input" / "datasets" / "sakshaymahna" / "kittiroadsegmentation"
    shutil.copytree(roads, mount)
    before = contents(root / "input")
    notebook = execute(built, root / "working", **SMALL)
    assert contents(root / "input") == before, "the input is read-only"
    return root, notebook


def outputs(notebook, name):
    return "".join(output.get("text", "") for output in cell(notebook, name).outputs)


def test_the_notebook_runs_in_an_empty_folder(first_version):
    root, notebook = first_version
    for name in FILES:
        assert (root / "working" / name).read_bytes() == (KIT / name).read_bytes()
    for path in ("out/model.pt", "out/last.ckpt", "out/validation.jpg", "predictions/masks", "predictions/comparisons"):
        assert (root / "working" / path).exists()
    assert len(list((root / "working" / "predictions" / "masks").iterdir())) == 3
    assert "validation: MaxF" in outputs(notebook, "run-train"), "the output streams into the cell"
    shown = [output for output in cell(notebook, "look").outputs if "image/jpeg" in output.get("data", {})]
    assert len(shown) == 4, "validation and three comparisons"
    assert any("MaxF" in output.get("data", {}).get("text/html", "") for output in cell(notebook, "look").outputs)


def test_an_attached_version_is_gone_on_with(first_version, built, roads, tmp_path):
    """The older mount, one folder deeper; the first version attached as its own source."""
    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation" / "data_road")
    attached = tmp_path / "input" / "notebooks" / "alice" / "road-segmentation-kit"
    shutil.copytree(first_version[0] / "working" / "out", attached / "out")
    notebook = execute(built, tmp_path / "working", **SMALL | {"EPOCHS": 5})
    assert "going on from out/last.ckpt, after epoch 3" in outputs(notebook, "run-train")


def test_without_training_the_attached_models_predict(first_version, built, roads, tmp_path):
    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation")
    for name in ("one", "two"):
        shutil.copytree(first_version[0] / "working" / "out", tmp_path / "input" / name / "out")
    notebook = execute(built, tmp_path / "working", TRAIN=False, ENCODER='"resnet18"')
    assert "2 model(s)" in outputs(notebook, "run-infer")
    masks = [{p.name: p.read_bytes() for p in (root / "working" / "predictions" / "masks").iterdir()}
             for root in (tmp_path, first_version[0])]  # fmt: skip
    assert masks[0] == masks[1], "twice the same model is that model"
    assert not (tmp_path / "working" / "out").exists()


def test_a_step_that_fails_fails_the_notebook(built, roads, tmp_path):
    from nbclient.exceptions import CellExecutionError

    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation")
    with pytest.raises(CellExecutionError, match="CalledProcessError"):
        execute(built, tmp_path / "working", ENCODER='"resnet99"', ENCODER_WEIGHTS='"none"')


WITHOUT_SMP = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "segmentation_models_pytorch" else find(name)
"""


def test_set_up_without_internet_takes_what_is_attached(built, tmp_path):
    """smp from an attached wheel (a made one), encoder weights from an attached file and from a Hub cache."""
    import zipfile

    notebook = nbformat.read(built / "kernel.ipynb", as_version=4)
    settings, setup = cell(notebook, "settings").source, cell(notebook, "setup").source
    wheels = tmp_path / "input" / "smp-wheel"
    wheels.mkdir(parents=True)
    info = "segmentation_models_pytorch-9.9.dist-info"
    with zipfile.ZipFile(wheels / "segmentation_models_pytorch-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("segmentation_models_pytorch/__init__.py", "")
        about = "Metadata-Version: 2.1\nName: segmentation-models-pytorch\nVersion: 9.9\n"
        wheel.writestr(f"{info}/METADATA", about + "Requires-Dist: torch<1\n")  # --no-deps: not asked for
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    weights = tmp_path / "input" / "weights" / "resnet34-b627a593.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"")
    (weights.parent / "se_resnet34-1.pth").write_bytes(b"")
    (tmp_path / "working").mkdir()

    def set_up(before=""):
        code = f"{before}\n{settings}\n{setup}\nprint('WEIGHTS', ENCODER_WEIGHTS, os.environ.get('HF_HUB_CACHE'))"
        environment = os.environ | {"PIP_TARGET": str(tmp_path / "site")}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "working", env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = set_up(WITHOUT_SMP)
    assert (tmp_path / "site" / "segmentation_models_pytorch" / "__init__.py").exists()
    assert "installed from" in printed
    assert f"WEIGHTS {weights} None" in printed
    assert ": there" in set_up()
    cache = tmp_path / "input" / "hub" / "models--smp-hub--resnet34.imagenet"
    cache.mkdir(parents=True)
    assert f"WEIGHTS imagenet {cache.parent}" in set_up()


@pytest.mark.skipif("KAGGLE_IMAGE" not in os.environ, reason="make kaggle-test: needs an environment without smp")
def test_the_image_without_internet(built, roads, tmp_path):
    """smp taken away again; a wheel and encoder weights attached; every address unreachable."""
    from test_kit import encoder_file

    pip = [sys.executable, "-m", "pip"]
    torch_before = subprocess.run([*pip, "show", "torch"], capture_output=True, text=True).stdout
    shutil.copytree(roads, tmp_path / "input" / "kittiroadsegmentation")
    shutil.copytree(Path(sys.prefix) / "wheels", tmp_path / "input" / "smp-wheel")
    (tmp_path / "input" / "weights").mkdir()
    encoder_file(tmp_path / "input" / "weights", "resnet18-made.pth")
    subprocess.run([*pip, "uninstall", "--yes", "segmentation-models-pytorch"], check=True)
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"PIP_NO_INDEX": "1"}
    settings = SMALL | {"ENCODER_WEIGHTS": '"imagenet"'}
    notebook = execute(built, tmp_path / "working", env=nowhere, **settings)
    assert "installed from" in outputs(notebook, "setup")
    assert "weights" in outputs(notebook, "run-train")
    assert (tmp_path / "working" / "predictions" / "masks").exists()
    assert subprocess.run([*pip, "show", "torch"], capture_output=True, text=True).stdout == torch_before
