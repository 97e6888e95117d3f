"""The Kaggle notebook: build it from notebook.py and the kit's files, push it, pull it back.

    python tools/kernel.py build               # build/kernel.ipynb and kernel-metadata.json
    python tools/kernel.py push                # builds and pushes it: a new version runs on Kaggle
    python tools/kernel.py pull OWNER/SLUG     # changes made on the site, back into the files here
    python tools/kernel.py bundle OWNER/SLUG   # a data set of what a notebook without network needs
    python tools/kernel.py rehearse --data FOLDER    # runs it as a code competition reruns it

pull also takes the notebook's address. What is attached, privacy, GPU: kernel-metadata.json.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import difflib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import jupytext
import nbformat
from requests.exceptions import HTTPError, RequestException

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import KaggleApi
    from nbformat import NotebookNode

HERE = Path(__file__).parents[1]
TOKEN = "https://www.kaggle.com/settings/api"
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


def fail(message: str, status: int = 2) -> NoReturn:
    """End with one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def write_file(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a file is always whole."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


# --------------------------------------------------------------------------------------------------
#  Build
# --------------------------------------------------------------------------------------------------


def read_cells() -> tuple[str, NotebookNode]:
    """The head of notebook.py, and its cells as a notebook; a cell's title is in its metadata."""
    text = (HERE / "notebook.py").read_text()
    start = text.index("\n# %%") + 1
    return text[:start], jupytext.reads(text[start:], fmt="py:percent")


def cell_id(file: str) -> str:
    """The id of the cell that writes a file."""
    return file.removesuffix(".py").replace("/", "-")


def make_cells() -> list[NotebookNode]:
    """The notebook's cells in order. Their ids are fixed: the same input gives the same bytes."""
    cells = []
    for own in read_cells()[1].cells:
        title, source = own.metadata["title"], own.source
        name = cell_id(title)
        if own.cell_type == "markdown":
            cells.append(nbformat.v4.new_markdown_cell(source, id=name))
            continue
        metadata = {"_kg_hide-input": True} if own.metadata.get("_kg_hide-input") else {}
        if title.endswith(".py"):
            text = (HERE / title).read_text()
            source = f"%%writefile {title}\n{text}"
            if metadata:
                what = ast.get_docstring(ast.parse(text)).split("\n")[0]
                line = f"**{title}**: {what}"
                cells.append(nbformat.v4.new_markdown_cell(line, id=f"about-{name}"))
        cells.append(nbformat.v4.new_code_cell(source, id=name, metadata=metadata))
    return cells


def check_imports(cells: list[NotebookNode]) -> None:
    """End where a file of the notebook imports a file that has no cell in it."""
    written = set(filter(None, map(name_of_file, cells)))
    for file in sorted(written):
        for node in ast.walk(ast.parse((HERE / file).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for other in (f"{name.replace('.', '/')}.py" for name in names):
                if other not in written and (HERE / other).exists():
                    fail(f"{file} imports {other}: add its cell to notebook.py: # %% {other}")


def attach_images(cell: NotebookNode) -> None:
    """Put the images of docs/ that a markdown cell shows into the cell itself."""
    for name in re.findall(r"\(attachment:([\w.]+)\)", cell.source):
        content = base64.b64encode((HERE / "docs" / name).read_bytes()).decode()
        cell.setdefault("attachments", {})[name] = {"image/jpeg": content}


def build(folder: Path, owner: str) -> dict:
    """Write kernel.ipynb and kernel-metadata.json into the folder. Returns the metadata."""
    metadata = json.loads((HERE / "kernel-metadata.json").read_text())
    if owner:
        metadata["id"] = f"{owner}/{metadata['id'].split('/')[-1]}"
    cells = make_cells()
    check_imports(cells)
    for cell in cells:
        if cell.cell_type == "markdown":
            attach_images(cell)
    about = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=about)
    nbformat.validate(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / metadata["code_file"], json.dumps(notebook, indent=1) + "\n")
    write_file(folder / "kernel-metadata.json", json.dumps(metadata, indent=2) + "\n")
    print(f"built {folder / metadata['code_file']} for {metadata['id']}")
    return metadata


# --------------------------------------------------------------------------------------------------
#  Push
# --------------------------------------------------------------------------------------------------


def log_in() -> KaggleApi | None:
    """Kaggle's own client, logged in; None without credentials."""
    output = io.StringIO()  # its import logs in, too, and prints a page of help where it cannot
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.authenticate()
    except SystemExit:  # its answer to missing credentials
        return None
    except RequestException as error:
        fail(f"Kaggle cannot be reached: {error}", 1)
    return api if user_of(api) else None


def user_of(api: KaggleApi) -> str:
    """The name of the user who is logged in."""
    return api.get_config_value(api.CONFIG_NAME_USER) or ""


INVALID = (
    "invalid_tags",
    "invalid_dataset_sources",
    "invalid_competition_sources",
    "invalid_kernel_sources",
    "invalid_model_sources",
)  # of Kaggle's answer: what it left out of the version that it took


def reject(reason: str) -> NoReturn:
    """End with Kaggle's reason for rejecting a push, and the remedy where it is known."""
    remedy = "fix kernel-metadata.json and push again"
    if re.search("quota", reason, re.IGNORECASE):
        remedy = "your GPU quota is used up: `kaggle quota` shows when it is renewed"
    if re.search("session count", reason, re.IGNORECASE):
        remedy = "wait for one of your running notebooks, or stop one on the site"
    fail(f"Kaggle rejects the push: {reason.rstrip('.')}; {remedy}", 1)


def push(api: KaggleApi, folder: Path, metadata: dict) -> None:
    """Push the built folder and print what comes next. Ends where Kaggle rejects any of it."""
    try:
        answer = api.kernels_push(str(folder))
    except RequestException as error:
        reject(str(error))
    except ValueError as error:  # found by the client, before it asks
        fail(f"kernel-metadata.json: {error}")
    if answer.error:
        reject(answer.error)
    for field in INVALID:
        if getattr(answer, field, None):
            reject(f"{field.replace('_', ' ')}: {', '.join(getattr(answer, field))}")
    kernel = name_of(answer.ref or "") or name_of(answer.url or "") or metadata["id"]
    version = answer.version_number
    submission = f'-k {kernel} -v {version} -f submission.csv -m "version {version}"'
    print(f"pushed version {version}: {answer.url}\n\nnext:")
    print(f"  kaggle kernels status {kernel}")
    print(f"  kaggle kernels output {kernel} -p output")
    print(f"  kaggle competitions submit COMPETITION {submission}")


def name_of(address: str) -> str:
    """OWNER/SLUG in a notebook's address, or in OWNER/SLUG itself; "" in anything else."""
    site = r"((https?://)?(www\.)?kaggle\.com/|/)?(code/)?"
    match = re.fullmatch(site + r"(?P<name>[\w-]+/[\w-]+)([/?#].*)?", address.strip())
    return match["name"] if match else ""


# --------------------------------------------------------------------------------------------------
#  Pull
# --------------------------------------------------------------------------------------------------

# A cell that writes a file: (1) comments above the magic, with which it would not run; (2) the name
WRITEFILE = re.compile(r"((?:[ \t]*(?:#.*)?\n)*)%%writefile +(\S+)[ \t]*\n?")


def download(api: KaggleApi, kernel: str) -> list[NotebookNode]:
    """The cells of a notebook on the site, without the empty ones."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.kernels_pull(kernel, folder)
            cells = nbformat.read(path, as_version=4).cells
        except RequestException as error:
            fail(f"{kernel}: cannot be pulled: {error}", 1)
        except nbformat.reader.NotJSONError:
            fail(f"{kernel}: is a script, not a notebook", 1)
    return [cell for cell in cells if cell.source.strip()]


def name_of_file(cell: NotebookNode) -> str:
    """The file that a cell writes; "" where it writes none."""
    match = WRITEFILE.match(cell.source)
    return match[2] if match else ""


def pair_cells(theirs: list[NotebookNode], ours: list[NotebookNode]) -> dict[str, int]:
    """{id of our cell: index of its cell on the site}.

    By the file that it writes, by equal text, by id (the site may drop it), by similar text.
    """
    kinds = {cell.id: cell.cell_type for cell in ours}
    texts = {cell.source.rstrip(): cell.id for cell in ours}
    pairs: dict[str, int] = {}
    rest = []
    for index, cell in enumerate(theirs):
        name = texts.get(cell.source.rstrip(), cell.get("id"))
        file = name_of_file(cell)
        if file:
            name = cell_id(file)
        if kinds.get(name) == cell.cell_type and name not in pairs:
            pairs[name] = index
        elif not file:
            rest.append(index)
    similar = []
    for our in ours:
        for index in rest:
            if our.id not in pairs and our.cell_type == theirs[index].cell_type:
                matcher = difflib.SequenceMatcher(None, our.source, theirs[index].source)
                similar.append((matcher.ratio(), our.id, index))
    for ratio, name, index in sorted(similar, reverse=True):
        if ratio > 0.5 and name not in pairs and index not in pairs.values():
            pairs[name] = index
    return pairs


def new_text(name: str, source: str) -> str | None:
    """A file's text from the cell that writes it, comments above the magic first; else None."""
    match = WRITEFILE.match(source)
    if not match or match[2] != name:
        return None
    comment = match[1].strip("\n")
    body = source[match.end() :].rstrip("\n")
    return f"{comment}\n{body}\n" if comment else f"{body}\n"


def changes(theirs: list[NotebookNode]) -> dict[str, str]:
    """{file: new text} for the cells that differ on the site. Prints them, and what is refused."""
    head, notebook = read_cells()
    own = {cell.metadata["title"]: cell for cell in notebook.cells}
    ours = make_cells()
    pairs = pair_cells(theirs, ours)
    changed = {}
    for cell in ours:
        if cell.id not in pairs:
            print(f"NOT brought back: the cell {cell.id} is missing on the site")
            continue
        source = theirs[pairs[cell.id]].source.rstrip()
        if source == cell.source.rstrip():
            continue
        file = name_of_file(cell)
        if file and new_text(file, source):
            print(f"differs: {file}")
            changed[file] = new_text(file, source)
        elif cell.id in own:
            print(f"differs: the cell {cell.id}")
            own[cell.id].source = source
            changed["notebook.py"] = head + jupytext.writes(notebook, fmt="py:percent")
        else:
            print(f"NOT brought back: the cell {cell.id}, made from the kit's files:\n{source}")
    for index, cell in enumerate(theirs):
        if index not in pairs.values():
            print(f"NOT brought back, copy it into notebook.py: a new cell:\n{cell.source}")
    if "notebook.py" in changed:
        again = jupytext.reads(changed["notebook.py"][len(head) :], fmt="py:percent")
        if [cell.source for cell in again.cells] != [cell.source for cell in notebook.cells]:
            fail("a changed cell has a line `# %%`, which would begin a new cell: remove it there")
    return changed


def is_another_version(theirs: list[NotebookNode]) -> bool:
    """Whether a notebook was built from a version of the kit with other files."""
    files = set(filter(None, map(name_of_file, theirs)))
    ours = set(filter(None, map(name_of_file, make_cells())))
    return "train.py" in files and len(ours & files) < len(ours) / 2


def write_another_version(theirs: list[NotebookNode], kernel: str, yes: bool) -> None:
    """Write the files of another version of the kit into a folder of their own, after a question.

    Its settings are written as settings.py, for those of notebook.py.
    """
    folder = HERE / "build" / kernel.split("/")[-1]
    texts = {file: new_text(file, c.source) for c in theirs if (file := name_of_file(c))}
    inside = {name for name in texts if not {"..", "/"} & set(Path(name).parts)}
    texts = {name: text for name, text in texts.items() if text and name in inside}
    settings = [cell.source for cell in theirs if re.search(r"^DATA = ", cell.source, re.MULTILINE)]
    if settings:
        texts["settings.py"] = f"{settings[0]}\n"
    print(
        f"{kernel} was built by another version of the kit: its {len(texts)} files are kept apart"
    )
    if confirmed(f"write them to {folder}?", yes):
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, text)
        print(f"wrote {folder}: it runs by itself; carry your changes over to the files here")


def confirmed(question: str, yes: bool) -> bool:
    """Whether to go on: `yes`, or the answer on a terminal."""
    if yes or (sys.stdin.isatty() and input(f"{question} [y/N] ").lower() == "y"):
        return True
    print("nothing written; --yes writes without asking")
    return False


def pull(api: KaggleApi, kernel: str, yes: bool) -> None:
    """Bring the cells that differ on the site back into the files here, after a question."""
    theirs = download(api, kernel)
    if is_another_version(theirs):
        write_another_version(theirs, kernel, yes)
        return
    changed = changes(theirs)
    if not changed:
        print("no file differs")  # what was not brought back is printed above
        return
    for name, text in changed.items():
        old = (HERE / name).read_text().splitlines(True)
        new = text.splitlines(True)
        sys.stdout.writelines(difflib.unified_diff(old, new, name, f"{kernel} {name}"))
    if confirmed(f"write {', '.join(changed)}?", yes):
        for name, text in changed.items():
            write_file(HERE / name, text)
        print(f"wrote {', '.join(changed)}")


# --------------------------------------------------------------------------------------------------
#  Bundle
# --------------------------------------------------------------------------------------------------

WHEEL = "segmentation-models-pytorch>=0.6"  # as kit/kaggle.py asks for


def notebook_settings() -> dict[str, object]:
    """{setting: value} of the settings cell of notebook.py."""
    [cell] = [one for one in read_cells()[1].cells if one.metadata["title"] == "settings"]
    nodes = (node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}


def fill_bundle(folder: Path, name: str, files: list[Path]) -> None:
    """Make a folder of smp's wheel, the encoder's weights and, where there is one, model.pt.

    `files`: own ones, by their suffixes; what they do not give is downloaded, or taken from out/.
    """
    absent = [str(path) for path in files if not path.is_file()]
    if absent:
        fail(f"--files {' '.join(absent)}: no such file")
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    settings = notebook_settings()
    weights = [str(path) for path in files if path.suffix in (".pth", ".safetensors")]
    if settings["TRAIN"] and settings["ENCODER_WEIGHTS"] == "imagenet":
        weights = weights or ["imagenet"]
    for source in weights:
        save_weights(unfinished, str(settings["ARCH"]), str(settings["ENCODER"]), source)
    given = {path: path.name for path in files if str(path) not in weights}
    if "model.pt" not in given.values():
        models = (HERE / "out").glob("**/model.pt")
        given |= {path: str(path.relative_to(HERE / "out")) for path in models}
    for path, target in given.items():
        (unfinished / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, unfinished / target)
    if not any(path.suffix in (".whl", ".gz") for path in files):
        download_wheel(unfinished)
    about = {"title": name.split("/")[1], "id": name, "licenses": [{"name": "other"}]}
    write_file(unfinished / "dataset-metadata.json", json.dumps(about, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    print(f"built {folder}:")
    for path in sorted(folder.rglob("*.*")):
        print(f"  {path.relative_to(folder)}, {path.stat().st_size / 1e6:.1f} MB")


def download_wheel(folder: Path) -> None:
    """Download smp's wheel without its requirements, which Kaggle's image has."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    done = subprocess.run([*command, WHEEL], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        fail(f"the wheel of {WHEEL} cannot be downloaded ({reason}); name one: --files FILE.whl")


def save_weights(folder: Path, arch: str, encoder: str, source: str) -> None:
    """Write an encoder's weights with their mean and deviation, where the notebook finds them.

    `source`: imagenet, from the Hub or its cache, or a file. Below `folder`, in a folder of the
    encoder's name.
    """
    sys.path.insert(0, str(HERE))
    from safetensors.torch import save_file

    from kit.errors import UserError
    from kit.network import encoders

    try:
        network = encoders.build(arch, encoder, 1)
        encoders.load_weights(network, arch, encoder, source)
        statistics = encoders.normalisation(arch, encoder, source)
    except UserError as error:
        remedy = 'or set ENCODER_WEIGHTS = "none" in notebook.py'
        fail(f"{error.where}: {error.problem}; go online, name a file: --files FILE.pth, {remedy}")
    (folder / encoder).mkdir()
    state = {name: tensor.contiguous() for name, tensor in network.encoder.state_dict().items()}
    save_file(state, folder / encoder / "model.safetensors")
    about = json.dumps({"pretrained_cfg": statistics})
    write_file(folder / encoder / "config.json", about + "\n")


def attach(name: str) -> None:
    """Attach a data set to the notebook, in kernel-metadata.json."""
    path = HERE / "kernel-metadata.json"
    metadata = json.loads(path.read_text())
    if name not in metadata["dataset_sources"]:
        metadata["dataset_sources"].append(name)
        write_file(path, json.dumps(metadata, indent=2) + "\n")
        print(f"attached it to the notebook: dataset_sources in {path.name}")


def upload(api: KaggleApi, folder: Path, name: str) -> None:
    """Upload a folder as a data set, or as its next version. Ends where Kaggle rejects it."""
    try:
        api.dataset_status(name)
        is_new = False
    except HTTPError:
        is_new = True
    except RequestException as error:
        fail(f"Kaggle cannot be reached: {error}", 1)
    try:
        if is_new:
            answer = api.dataset_create_new(str(folder), quiet=True, dir_mode="zip")
        else:
            answer = api.dataset_create_version(str(folder), "new", quiet=True, dir_mode="zip")
    except RequestException as error:
        fail(f"Kaggle rejects the data set: {error}", 1)
    except ValueError as error:  # found by the client, before it asks
        fail(f"{name}: {error}")
    if not answer or answer.error or (answer.status or "").lower() != "ok":
        reason = getattr(answer, "error", "") or getattr(answer, "status", "") or "no reason given"
        fail(f"Kaggle rejects the data set: {reason}", 1)
    attach(name)
    print(f"uploaded {'' if is_new else 'a new version: '}{answer.url}\n\nnext:")
    print(f"  kaggle datasets status {name}    # push when it is ready")
    print("  python tools/kernel.py push")


# --------------------------------------------------------------------------------------------------
#  Rehearse
# --------------------------------------------------------------------------------------------------


def run_rehearsal(options: argparse.Namespace) -> None:
    """Run the built notebook, or another one, as a code competition reruns it; see rehearse.py."""
    if not options.data:
        fail("rehearse takes the competition's folder: --data FOLDER")
    try:
        sys.path.insert(0, str(HERE))
        import nbclient  # noqa: F401
        import rehearse
    except ImportError as error:
        fail(f"rehearse needs {error.name}: pip install -r requirements-dev.txt")
    path = Path(options.kernel or options.out / "kernel.ipynb")
    if not options.kernel:
        build(options.out, options.owner or "")
    pairs = [text.partition("=") for text in options.settings]
    bad = [name for name, equals, _ in pairs if not (equals and name.isupper())]
    if bad:
        fail(f"--settings {bad[0]}: write NAME=VALUE, such as EPOCHS=1")
    if options.images < 1 or options.hours <= 0:
        fail("--images and --hours: larger than 0")
    bundle = [folder for folder in [options.out / "bundle"] if folder.exists()]
    try:
        verdict = rehearse.rehearse(
            nbformat.read(path, as_version=4),
            options.data,
            options.out / "rehearsal",
            options.hours,
            options.images,
            tuple(bundle if options.attach is None else options.attach),
            {name: rehearse.value_of(value) for name, _, value in pairs},
            (options.memory, options.disk),
        )
    except rehearse.UserError as error:
        fail(str(error))
    except (OSError, nbformat.reader.NotJSONError) as error:
        fail(f"{path}: {error}")
    metadata = json.loads((HERE / "kernel-metadata.json").read_text())
    if metadata["enable_internet"] and not options.kernel:
        print('before you submit: set "enable_internet": false in kernel-metadata.json')
    sys.exit(verdict.name != rehearse.OK)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = ["build", "push", "pull", "bundle", "rehearse"]
    parser.add_argument("action", choices=actions)
    parser.add_argument(
        "kernel", nargs="?", help="OWNER/SLUG; pull: or address; rehearse: another notebook.ipynb"
    )
    parser.add_argument("--owner", help="Kaggle user name; default: who is logged in")
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder to build in")
    parser.add_argument("--yes", action="store_true", help="pull: write without asking")
    own = parser.add_argument_group("bundle")
    own.add_argument(
        "--files", type=Path, nargs="*", default=[], help="own wheel, weights, model.pt to put in"
    )
    own = parser.add_argument_group("rehearse")
    own.add_argument("--data", type=Path, help="folder of the competition, unzipped")
    own.add_argument("--hours", type=float, default=9, help="that a rerun may take")
    own.add_argument("--images", type=int, default=1000, help="in the hidden test set")
    own.add_argument("--memory", type=float, default=29, help="GB that a rerun has")
    own.add_argument("--disk", type=float, default=20, help="GB that /kaggle/working has")
    own.add_argument(
        "--attach", type=Path, nargs="*", help="folders of data sets; default: build/bundle"
    )
    own.add_argument(
        "--settings", nargs="*", default=[], help="for this run alone, such as EPOCHS=1"
    )
    return parser.parse_args()


def main() -> None:
    """Do what the command line asks for."""
    options = read_options()
    if options.action == "rehearse":
        run_rehearsal(options)
        return
    kernel = name_of(options.kernel or "")
    if options.action in ("pull", "bundle") and not kernel:
        of = "notebook's name or address" if options.action == "pull" else "data set's name"
        fail(f"{options.action} takes the {of}: python tools/kernel.py {options.action} OWNER/SLUG")
    if options.action == "build" and options.owner:
        build(options.out, options.owner)
        return
    if options.action == "bundle":
        fill_bundle(options.out / "bundle", kernel, options.files)
    api = log_in()
    if options.action != "build" and not api:
        remedy = f"make a token at {TOKEN} and save it as ~/.kaggle/access_token"
        fail(f"no Kaggle credentials: {remedy}, or run: kaggle auth login")
    if options.action == "pull":
        pull(api, kernel, options.yes)
        return
    if options.action == "bundle":
        upload(api, options.out / "bundle", kernel)
        return
    metadata = build(options.out, options.owner or (user_of(api) if api else ""))
    if options.action == "push":
        push(api, options.out, metadata)


if __name__ == "__main__":
    main()
