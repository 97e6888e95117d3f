"""Models elsewhere (--export, model.onnx) and loggers (--logger)."""

import dataclasses
import json
import shutil
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import models
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import ENCODER, TINY, run, succeed
from PIL import Image

import train
from kit.config import Classes, ModelConfig, plane_settings
from kit.errors import UserError
from kit.extra import export
from kit.network import model, runtimes
from kit.results import predict
from kit.training import loggers

# --------------------------------------------------------------------------------------------------
#  model.onnx
# --------------------------------------------------------------------------------------------------


def make_model(**settings):
    """An untrained model whose probabilities are spread out."""
    torch.manual_seed(0)
    settings = {"encoder": ENCODER, "height": 64, "width": 96, "precision": "32"} | settings
    names, exclusive = (
        settings.get("class_names", ("foreground",)),
        settings.get("exclusive", False),
    )
    config = ModelConfig(**settings, **plane_settings(Classes(names, names, exclusive)))
    network = model.build_network(config).eval().requires_grad_(False)
    noise = torch.randn(4, config.channels, config.height, config.width)
    model.reestimate_batch_norm(network, [noise])
    return model.TrainedModel(network, config, {"folds": 10, "seed": 0, "group": ""}, {}, ["a"])


def write(trained, path):
    """Its model.onnx, compared on noise."""
    noise = export.compared_images(trained.config, None)
    return export.write_onnx(trained, noise, path)


@pytest.fixture(scope="module")
def exported(roads, trained, tmp_path_factory):
    """The --out of an export of the small training, and what was printed."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    out = tmp_path_factory.mktemp("exported")
    flags = ("--data", roads / "training", "--out", out, "--export", "onnx")
    return out, succeed("infer.py", "--model", trained, *flags)


def test_an_export_gives_the_kits_probabilities_of_real_images(exported):
    out, printed = exported
    assert [path.name for path in out.iterdir()] == ["model.onnx"]
    last = printed.splitlines()[-1]
    assert f"wrote {out / 'model.onnx'}: any number of images of any size; compared" in last
    assert "on 12 images by onnxruntime" in last
    assert float(last.rpartition(" is ")[2]) < 1e-4


def test_an_export_works_without_the_kit(exported, roads, trained):
    """Its metadata says how an image becomes the input."""
    import onnxruntime

    session = onnxruntime.InferenceSession(exported[0] / "model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    about = {name: json.loads(text) for name, text in about.items()}
    steps, own = about["preprocessing"], model.load_model(trained / "model.pt", "cpu")
    assert about["postprocessing"]["thresholds"] == list(own.config.thresholds)
    assert about["symmetries of test-time augmentation"] == list(own.config.symmetries)
    path = sorted((roads / "training" / "image_2").glob("*.png"))[0]
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    pixels = pixels[round(steps["cut off this share of the height at the top"] * len(pixels)) :]
    size = steps["resize to width"], steps["resize to height"]
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    images = np.moveaxis(pixels, -1, 0)[None].astype(np.float32)
    (probabilities,) = session.run(None, {"image": images})
    exact = own._replace(config=dataclasses.replace(own.config, precision="32"))
    expected = predict.predict_inputs(exact, torch.from_numpy(images))
    assert np.abs(probabilities - expected.numpy()).max() < 1e-4
    assert np.ptp(probabilities) > 0.3
    (three,) = session.run(None, {"image": np.zeros((3, 3, 32, 64), np.float32)})
    assert three.shape == (3, 1, 32, 64)


def test_infer_predicts_with_an_export_as_with_the_model(exported, roads, trained, tmp_path):
    """With test-time augmentation, scores and all; of a folder, too."""
    shutil.copy(trained / "model.pt", tmp_path / "model.pt")
    for name, source in (("own", tmp_path / "model.pt"), ("onnx", exported[0])):
        flags = ("--data", roads / "training", "--out", tmp_path / name, "--save_probs", "true")
        succeed("infer.py", "--model", source, *flags, "--comparisons", "false")
    own, other = (sorted((tmp_path / name / "probs").glob("*.png")) for name in ("own", "onnx"))
    assert [path.name for path in own] == [path.name for path in other]
    assert len(own) == 24
    pairs = zip(own, other, strict=True)
    pairs = [[np.asarray(Image.open(p)).astype(int) for p in pair] for pair in pairs]
    # the model itself predicts in bf16 where a CPU has that
    assert np.mean([np.abs(one - two).mean() for one, two in pairs]) < 1
    scores = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("own", "onnx")]
    mean = [block["mean"]["Dice"] for block in scores]
    assert mean[0] == pytest.approx(mean[1], abs=0.5)
    seen = [json.loads((tmp_path / n / "probs.json").read_text()) for n in ("own", "onnx")]
    assert seen[0] == seen[1], "what the model was trained on stays known"


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
@pytest.mark.parametrize(
    "settings",
    [
        {"presence": 1.0, "class_names": ("a", "b"), "class_values": ("1", "2")},
        {"exclusive": True, "class_names": ("a", "b", "c"), "class_values": ("0", "1", "2")},
        {"channels": 5, "mean": (0.4,) * 5, "std": (0.2,) * 5, "temperature": 1.5},
    ],
    ids=["presence", "exclusive", "channels"],
)
def test_an_export_in_the_place_of_the_network(tmp_path, monkeypatch, runtime, settings):
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    monkeypatch.setattr(runtimes, "installed", lambda: [runtime])
    trained = make_model(**settings)
    loaded = model.load_model(write(trained, tmp_path / "model.onnx"), "cpu")
    same = dataclasses.asdict(trained.config) | {"mean": loaded.config.mean}
    assert dataclasses.asdict(loaded.config) == same | {"std": loaded.config.std}
    assert (loaded.settings, loaded.seen) == (trained.settings, trained.seen)
    images = 255 * torch.rand(3, trained.config.channels, 64, 96)
    for symmetries in ((), ("h", "v")):
        expected = predict.predict_inputs(trained, images, symmetries)
        got = predict.predict_inputs(loaded, images, symmetries)
        assert (got - expected).abs().max() < 1e-4
        assert expected.max() - expected.min() > 0.1
    predict.check_agreement([trained.config, loaded.config])  # an ensemble of both
    with ThreadPoolExecutor(2) as pool:  # as `predict` calls it; OpenVINO used to hang
        calls = [pool.submit(predict.predict_inputs, loaded, images, ("h", "v")) for _ in range(16)]
    assert all(torch.equal(call.result(), calls[0].result()) for call in calls)


def test_a_network_of_one_size_is_exported_at_that_size(tmp_path, capsys):
    """PSPNet pools 12 x 10 features to 6 x 6, which torch's exporter does not know."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    trained = make_model(arch="PSPNet", height=96, width=80)
    loaded = model.load_model(write(trained, tmp_path / "model.onnx"), "cpu")
    printed = capsys.readouterr().out
    assert "any number of images of 96x80;" in printed
    assert printed.count("\n") == 1, "and not the graph that torch prints"
    images = 255 * torch.rand(3, 3, 96, 80)
    expected = predict.predict_inputs(trained, images)
    assert (predict.predict_inputs(loaded, images) - expected).abs().max() < 1e-4


def test_the_size_is_free_in_the_networks_steps(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    loaded = model.load_model(write(make_model(arch="FPN"), tmp_path / "model.onnx"), "cpu")
    assert "of any size, in steps of 32;" in capsys.readouterr().out
    assert model.size_step(loaded.network) == 32


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    trained, graph_bytes = make_model(), export.graph_bytes
    other = make_model(temperature=1.0)
    monkeypatch.setattr(export, "check_shapes", lambda *_: None)
    monkeypatch.setattr(export, "graph_bytes", lambda _, axes: graph_bytes(other, axes))
    with pytest.raises(UserError, match="is wrong: compared .* on 2 images by onnxruntime"):
        write(trained, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_an_export_says_that_it_is_not_compared(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx", reason="onnx is not installed")
    monkeypatch.setattr(runtimes, "installed", list)
    path = write(make_model(), tmp_path / "model.onnx")
    printed = capsys.readouterr().out
    assert "any number of images of 64x96; NOT COMPARED" in printed
    assert "pip install onnxruntime" in printed
    with pytest.raises(UserError, match="pip install openvino, or pip install onnxruntime"):
        model.load_model(path, "cpu")


def test_what_cannot_be_exported_is_one_line(tmp_path, trained, monkeypatch):
    flags = ("--out", tmp_path / "out", "--export")
    done = run("infer.py", "--model", trained, trained / "model.pt", *flags, "onnx")
    assert done.returncode == 2
    assert "error: --export onnx: takes one model, --model names 2;" in done.stderr
    tiles = make_model(tiles=True, height=64, width=64)
    model.save_model(tmp_path / "model.pt", tiles)
    for kind in ("onnx", "smp"):
        done = run("infer.py", "--model", tmp_path / "model.pt", *flags, kind)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "tiles of 64x64 that overlap by a quarter" in line
        assert line.endswith("predict with infer.py, or train with --tiles false")
    (tmp_path / "model.onnx").write_bytes(b"no")
    done = run("infer.py", "--model", tmp_path / "model.onnx", "--data", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "model.onnx: " in line and "; " in line
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="--export onnx: needs onnx, .*; pip install onnx$"):
        write(make_model(), tmp_path / "other.onnx")


def test_a_network_that_torch_cannot_export_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="onnx is not installed")
    trained = make_model()
    monkeypatch.setattr(trained.network.encoder, "forward", lambda x: [x.logdet()] * 6)
    with pytest.raises(UserError, match=rf"--export onnx: Unet {ENCODER} cannot be written \("):
        write(trained, tmp_path / "model.onnx")


# --------------------------------------------------------------------------------------------------
#  smp and the Hub
# --------------------------------------------------------------------------------------------------


def test_smp_reads_its_folder(trained, tmp_path):
    printed = succeed("infer.py", "--model", trained, "--out", tmp_path, "--export", "smp")
    folder = tmp_path / "smp"
    assert f"wrote {folder}" in printed
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    own = model.load_model(trained / "model.pt", "cpu")
    images = torch.randn(2, 3, 64, 192)
    with torch.inference_mode():
        expected = own.network(images)
        assert torch.allclose(smp.from_pretrained(folder).eval()(images), expected, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: segmentation-models-pytorch\n")
    assert f"- resize to width: {own.config.width}\n" in card


def test_smp_reads_the_folder_of_a_model_with_a_head_for_presence(tmp_path):
    trained = make_model(arch="Segformer", encoder="mit_b0", presence=0.5)
    export.export("smp", [trained], None, str(tmp_path))
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        outputs = smp.from_pretrained(tmp_path / "smp").eval()(images), trained.network(images)
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(*outputs, strict=True))
    assert "* sigmoid(presence)" in (tmp_path / "smp" / "README.md").read_text()


# --------------------------------------------------------------------------------------------------
#  Loggers
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Four pairs."""
    root = tmp_path_factory.mktemp("few")
    models.draw_pairs(root)
    return root


def events_of(folder):
    """{tag: [(step, value)]} of TensorBoard's scalars in a folder, and its pictures' tags."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    rows = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return rows, set(tags["images"])


def test_tensorboard_is_told_what_metrics_csv_says_and_changes_nothing(few, tmp_path):
    """Also after a resume; the weights are the same bit for bit. A fold has a log of its own."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    flags = ("--data", few, *TINY, "--folds", 2, "--fold", "all")
    for name in ("none", "tensorboard"):
        out = ("--out", tmp_path / name, "--logger", name)
        succeed("train.py", *flags, "--epochs", 1, *out)
    for fold in ("fold0", "fold1"):
        plain, logged = (tmp_path / name / fold for name in ("none", "tensorboard"))
        one, two = (model.load_model(f / "model.pt", "cpu").network for f in (plain, logged))
        pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        added = {path.name for path in logged.iterdir()} - {path.name for path in plain.iterdir()}
        assert added == {"tensorboard"}
    succeed("train.py", *flags, "--epochs", 2, *out)
    for fold in ("fold0", "fold1"):
        logged = tmp_path / "tensorboard" / fold
        rows, pictures = events_of(logged / "tensorboard")
        table = pd.read_csv(logged / "metrics.csv")
        assert table.epoch.tolist() == [1, 2]
        for name in set(table) - {"epoch"}:
            steps, values = zip(*rows[name], strict=True)
            assert steps == (1, 2)
            assert values == pytest.approx(table[name].tolist(), rel=1e-5), name
        scores = json.loads((logged / "metrics.json").read_text())["mean"]
        assert rows["final/Dice"][-1] == (2, pytest.approx(scores["Dice"], rel=1e-5))
        assert pictures == {"examples", "augmented", "validation", "curves"}
        assert f"encoder: {ENCODER}" in (logged / "tensorboard" / "hparams.yaml").read_text()


def test_a_logger_that_is_not_installed_is_one_line_before_the_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    config = train.Config(data=str(tmp_path / "absent"), out=str(tmp_path / "out"), logger="wandb")
    with pytest.raises(UserError, match="^--logger wandb: is not installed; pip install wandb$"):
        train.train(config)


@pytest.mark.parametrize("key", ["", "variable", "netrc"])
def test_wandb_is_offline_without_a_key(tmp_path, monkeypatch, key):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "k" if key == "variable" else "")
    if key == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    assert loggers.has_wandb_key() is bool(key)


class Faulty:
    """A logger whose second row fails."""

    version = "v1"

    def __init__(self, out, data, version):
        self.rows, self.continued, self.settings = [], version, None

    def log_hyperparams(self, settings):
        self.settings = settings

    def log_metrics(self, scores, step):
        if self.rows:
            raise OSError("no such server")
        self.rows.append((step, scores))

    def finalize(self, status):
        raise AssertionError("nothing is asked of it any more")


def test_a_logger_that_fails_ends_the_log_and_not_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Faulty)
    settings = {"logger": "wandb", "data": "few", "lr": 0.1}
    log = loggers.RunLog(tmp_path, settings, None)
    for epoch in (1, 2, 3):
        log.add({"epoch": epoch, "MaxF": 50.0})
    log.close(3)
    assert log.logger.rows == [(1, {"MaxF": 50.0})]
    assert capsys.readouterr().out == "--logger wandb: ENDS HERE (no such server)\n"
    assert (log.version, log.logger.settings) == (["wandb", "v1"], settings)
    again = loggers.RunLog(tmp_path, settings, log.version)
    assert (again.logger.continued, again.logger.settings) == ("v1", None)
    other = loggers.RunLog(tmp_path, settings, ["mlflow", "v1"])
    assert other.logger.continued is None


def test_a_logger_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"^--logger wandb: cannot start \(division by zero\)"):
        loggers.RunLog(tmp_path, {"logger": "wandb", "data": "few"}, None)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_wandb_and_mlflow_write_below_the_run(few, tmp_path, name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    (tmp_path / "home").mkdir()
    env = {"HOME": str(tmp_path / "home"), "WANDB_API_KEY": "", "NETRC": "", "MPLCONFIGDIR": "/tmp"}
    flags = ("--data", few, *TINY, "--folds", 2, "--out", tmp_path / "out", "--logger", name)
    for epochs in (1, 2):
        succeed("train.py", *flags, "--epochs", epochs, cwd=tmp_path, env=env)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "out"}
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    if name == "wandb":
        runs = (tmp_path / "out" / "wandb").glob("offline-run-*")
        assert len({path.name.rpartition("-")[2] for path in runs}) == 1, "resumed, not a new run"
    else:
        database = sqlite3.connect(tmp_path / "out" / "mlflow.db")
        steps = database.execute("select step from metrics where key = 'MaxF' order by step")
        assert steps.fetchall() == [(1,), (2,)]
        assert database.execute("select count(*) from runs").fetchall() == [(1,)]
