"""Models elsewhere (--export, model.onnx) and loggers (--logger)."""

import dataclasses
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import run, succeed
from PIL import Image

from kit.config import Classes, ModelConfig, plane_settings
from kit.errors import UserError
from kit.extra import export
from kit.network import model, runtimes
from kit.results import predict

# --------------------------------------------------------------------------------------------------
#  model.onnx
# --------------------------------------------------------------------------------------------------


def make_model(**settings):
    """An untrained model whose probabilities are spread out."""
    torch.manual_seed(0)
    settings = {"encoder": "resnet18", "height": 64, "width": 96, "precision": "32"} | settings
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
    with pytest.raises(UserError, match=r"--export onnx: Unet resnet18 cannot be written \("):
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
