"""The Kaggle notebook: build it from notebook.py and the kit's files, push it, pull it back.

    python tools/kernel.py build               # build/kernel.ipynb and kernel-metadata.json
    python tools/kernel.py push                # builds and pushes it: a new version runs on Kaggle
    python tools/kernel.py pull OWNER/SLUG     # changes made on the site, back into the files here

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
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import jupytext
import nbformat
from requests.exceptions import RequestException

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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["build", "push", "pull"])
    parser.add_argument("kernel", nargs="?", help="pull: OWNER/SLUG or address of the notebook")
    parser.add_argument("--owner", help="Kaggle user name; default: who is logged in")
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder to build in")
    parser.add_argument("--yes", action="store_true", help="pull: write without asking")
    options = parser.parse_args()
    kernel = name_of(options.kernel or "")
    if options.action == "pull" and not kernel:
        fail("pull takes the notebook's name or address: python tools/kernel.py pull OWNER/SLUG")
    if options.action == "build" and options.owner:
        build(options.out, options.owner)
        return
    api = log_in()
    if options.action != "build" and not api:
        remedy = f"make a token at {TOKEN} and save it as ~/.kaggle/access_token"
        fail(f"no Kaggle credentials: {remedy}, or run: kaggle auth login")
    if options.action == "pull":
        pull(api, kernel, options.yes)
        return
    metadata = build(options.out, options.owner or (user_of(api) if api else ""))
    if options.action == "push":
        push(api, options.out, metadata)


if __name__ == "__main__":
    main()
