"""Images of any number of channels: what the readers give, what the network gets."""

import dataclasses

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import tifffile
import torch
from conftest import TINY, run, succeed
from PIL import Image

from kit.config import ModelConfig
from kit.data import images, rasters, readers
from kit.data.masks import MaskFile, Planes
from kit.data.rasters import Layer
from kit.errors import UserError
from kit.network import encoders, model

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 4000, (40, 60, 6)).astype(np.uint16)
MODEL = ModelConfig(
    "Unet", "resnet18", height=32, width=32, channels=6, mean=(0.5,) * 6, std=(0.2,) * 6
)


def write_image(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, values)
    elif path.suffix == ".tif":
        options = options or {"planarconfig": "contig"}
        tifffile.imwrite(path, values, photometric="minisblack", **options)
    else:
        Image.fromarray(values).save(path, **options)
    return path


def folder_of(root, bands, count=8, suffix=".npy"):
    """Images whose foreground is an ellipse in their last band, and its masks."""
    y, x = np.mgrid[:40, :60]
    for number in range(count):
        mask = ((y - 20) / 9) ** 2 + ((x - 20 - 2 * number) / 12) ** 2 < 1
        values = np.random.default_rng(number).integers(0, 999, (40, 60, bands), np.uint16)
        values[..., -1] += 500 * mask.astype(np.uint16)
        write_image(root / "images" / f"p{number}x{suffix}", values)
        write_image(root / "masks" / f"p{number}x.png", 255 * mask.astype(np.uint8))
    return root


# --------------------------------------------------------------------------------------------------
#  Files to values
# --------------------------------------------------------------------------------------------------

PLANAR = {"planarconfig": "separate"}
CONTIGUOUS = {"planarconfig": "contig"}


@pytest.mark.parametrize(
    ("name", "values", "options", "expected"),
    [
        ("a.npy", BANDS, {}, BANDS),
        ("a.npz", BANDS, {}, BANDS),
        ("a.npy", BANDS.transpose(2, 0, 1), {}, BANDS),
        ("a.npy", BANDS[..., 0].astype(np.float32), {}, BANDS[..., :1]),
        ("a.npy", BANDS[..., 0] > 2000, {}, 255 * (BANDS[..., :1] > 2000)),
        ("a.tif", BANDS, CONTIGUOUS, BANDS),
        ("a.tif", BANDS.transpose(2, 0, 1), PLANAR, BANDS),
        ("a.tif", BANDS[..., :2], CONTIGUOUS, BANDS[..., :2]),
        ("a.tif", BANDS[..., :3].astype(np.float32), CONTIGUOUS, BANDS[..., :3]),
        ("a.tif", BANDS.transpose(2, 0, 1), {"metadata": None}, BANDS),  # pages
    ],
)
def test_a_reader_gives_the_values_that_were_written(tmp_path, name, values, options, expected):
    path = write_image(tmp_path / name, values, **options)
    [raster] = readers.open_layers(path)
    assert (raster.size, raster.bands) == ((40, 60), expected.shape[2])
    assert raster.floats == (values.dtype.kind == "f")
    assert (raster.read() == expected).all()
    assert readers.read_header(path).channels == {1: 3}.get(raster.bands, raster.bands)


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 3), ("RGBA", 3), ("P", 3)])
@pytest.mark.parametrize("wanted", [1, 3, 4])
def test_photographs_have_as_many_channels_as_asked(tmp_path, mode, channels, wanted):
    photo = Image.fromarray(RNG.integers(0, 255, (20, 30, 3), np.uint8)).convert(mode)
    photo.save(tmp_path / "a.png")
    assert readers.read_header(tmp_path / "a.png").channels == channels
    if wanted == 4 and mode in ("RGB", "P"):
        with pytest.raises(UserError, match=r"a\.png: has 3 channels, 4 are needed"):
            readers.read_image(tmp_path / "a.png", wanted)
        return
    pixels = readers.read_image(tmp_path / "a.png", wanted)
    assert pixels.shape == (20, 30, wanted)
    if wanted == 3:
        assert (pixels == np.asarray(photo.convert("RGB"))).all()
    if wanted == 4 and mode == "RGBA":
        assert (pixels == np.asarray(photo)).all()


def test_files_of_bands_are_joined_in_their_order(tmp_path):
    layers = tuple(
        Layer(write_image(tmp_path / f"b{band}.tif", BANDS[..., band])) for band in range(6)
    )
    assert readers.read_header(layers).channels == 6
    assert (readers.read_values(layers[::-1], 6) == BANDS[..., ::-1]).all()
    rgb = Layer(write_image(tmp_path / "rgb.png", BANDS[..., :3].astype(np.uint8)))
    mixed = readers.read_values((rgb, layers[5]), 4)
    assert (mixed == np.dstack([BANDS[..., :3].astype(np.uint8), BANDS[..., 5]])).all()
    small = Layer(write_image(tmp_path / "small.tif", BANDS[:9, :9, 0]))
    with pytest.raises(UserError, match=r"small\.tif: is 9x9, but .*b0\.tif is 60x40; replace one"):
        readers.read_header((layers[0], small))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{}, []], object), "holds objects, not numbers; save one array of numbers"),
        (np.zeros(9), r"an array of shape \(9,\); an image has"),
        (np.zeros((2, 9, 9, 3)), r"an array of shape \(2, 9, 9, 3\); an image has"),
        (np.array(["a"]), "not numbers"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=message):
        readers.read_header(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.tif"])
def test_a_damaged_file_is_refused(tmp_path, name):
    path = write_image(tmp_path / name, np.dstack([BANDS] * 2))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=rf"{name}: .*; "):
        readers.read_image(path, 12, (0.0, 4000.0))


# --------------------------------------------------------------------------------------------------
#  Values to pixels
# --------------------------------------------------------------------------------------------------


def test_each_channel_has_its_own_black_and_white(tmp_path, capsys):
    values = BANDS * np.array([1, 2, 1, 1, 1, 10], np.uint16)
    path = write_image(tmp_path / "a.npy", values)
    limits = readers.find_value_range([path], "0,100", 6)
    assert limits[::2] == tuple(values.min((0, 1)))
    assert limits[1::2] == tuple(values.max((0, 1)))
    pixels = readers.read_image(path, 6, limits)
    assert pixels.dtype == np.uint16
    assert (pixels.min((0, 1)) == 0).all()
    assert (pixels.max((0, 1)) == 65535).all()
    assert "of the first of 6 channels" in capsys.readouterr().out


def test_16_bits_reach_the_network(tmp_path):
    """Levels that 8 bits would make one stay apart."""
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    path = write_image(tmp_path / "a.npy", values)
    pixels = readers.read_image(path, 1, (0.0, 60000.0))
    tensor = images.to_tensor(pixels)
    assert tensor.dtype == torch.float32
    assert len(tensor.unique()) == 600
    assert tensor.max() == pytest.approx(255 * 599 / 60000, abs=0.01)
    assert (images.from_tensor(tensor) == pixels).all()
    assert np.allclose(images.to_unit(pixels) * 255, np.moveaxis(tensor.numpy(), 0, 2))
    assert (images.to_tensor(images.to_unit(pixels)) == tensor).all(), "as augmented ones are"


def test_pixels_without_data_are_ignored(tmp_path):
    values = BANDS.astype(np.float32)
    values[:4, :, 2] = np.nan
    values[-1, 3, 0] = np.inf
    path = write_image(tmp_path / "a.npy", values)
    missing = readers.no_data(path)
    assert missing.sum() == 4 * 60 + 1
    write_image(tmp_path / "m.png", np.full((40, 60), 255, np.uint8))
    mask = Planes((MaskFile(tmp_path / "m.png"),))
    ignoring = dataclasses.replace(mask, image=(Layer(path),)).read((40, 60))
    assert ((ignoring == 255) == missing).all()
    assert not (mask.read((40, 60)) == 255).any()
    write_image(path, np.full((40, 60, 6), np.nan, np.float32))
    with pytest.raises(UserError, match="every pixel is NaN or infinity"):
        readers.no_data(path)


def test_mean_and_deviation_are_those_of_the_pixels(tmp_path):
    paths = [write_image(tmp_path / f"{n}.npy", BANDS + 100 * n) for n in range(3)]
    measured = readers.measure_statistics(paths, 6, (0.0, 8000.0))
    values = np.stack([BANDS + 100 * n for n in range(3)]) / 8000
    assert np.allclose(measured["mean"], values.mean((0, 1, 2)), atol=1e-3)
    assert np.allclose(measured["std"], values.std((0, 1, 2)), atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("show", [(), (6, 1, 1)])
def test_a_picture_has_three_channels(channels, show):
    config = ModelConfig(
        channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels, show=show
    )
    picture = images.to_picture(BANDS[..., :channels], config)
    assert (picture.shape, picture.dtype) == ((40, 60, 3), np.uint8)
    assert picture.min() == 0
    assert picture.max() == 255
    first = BANDS[..., min(5, channels - 1) if show else 0]
    assert np.corrcoef(picture[..., 0].ravel(), first.ravel())[0, 1] > 0.99


# --------------------------------------------------------------------------------------------------
#  The network
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_the_first_convolution_is_widened_as_smp_does_it(channels):
    given = torch.randn(64, 3, 7, 7)
    own = torch.zeros(64, channels, 7, 7)
    network = smp.Unet("resnet18", encoder_weights=None)
    with torch.no_grad():
        network.encoder.conv1.weight.copy_(given)
    network.encoder.set_in_channels(channels, pretrained=True)
    assert torch.allclose(encoders.widen(given, own), network.encoder.conv1.weight)


def test_weights_of_rgb_fit_an_encoder_of_six_channels(tmp_path):
    three = dataclasses.replace(MODEL, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    weights = model.build_network(three).encoder.state_dict()
    torch.save(weights, tmp_path / "r.pth")
    network = model.build_network(MODEL, str(tmp_path / "r.pth"))
    assert network.encoder.conv1.weight.shape[1] == 6
    assert torch.equal(network.encoder.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    grey = torch.rand(1, 1, 32, 32)
    first = torch.nn.functional.conv2d(grey.repeat(1, 3, 1, 1), weights["conv1.weight"])
    again = torch.nn.functional.conv2d(grey.repeat(1, 6, 1, 1), network.encoder.conv1.weight)
    assert torch.allclose(first, again, atol=1e-4)


# --------------------------------------------------------------------------------------------------
#  The commands
# --------------------------------------------------------------------------------------------------


def test_six_bands_are_trained_and_predicted(tmp_path):
    data = folder_of(tmp_path / "data", 6, suffix=".tif")
    flags = ("--data", data, "--epochs", 1, "--show", "6,5,4", *TINY)
    printed = succeed("train.py", *flags, "--out", tmp_path / "out")
    assert "channels: 6 in each image" in printed
    assert "input 32x96 of 6 channels" in printed
    config = model.load_model(tmp_path / "out" / "model.pt", "cpu").config
    assert (config.channels, config.show, len(config.value_range)) == (6, (6, 5, 4), 12)
    predict = ("infer.py", "--model", tmp_path / "out", "--out", tmp_path / "predictions")
    succeed(*predict, "--data", data, "--show", "1,2,3")
    assert len(list((tmp_path / "predictions" / "masks").iterdir())) == 8
    other = folder_of(tmp_path / "other", 3)
    refused = run(*predict, "--data", other / "images" / "p0x.npy")
    assert refused.returncode == 2
    assert "has 3 channels, 6 are needed" in refused.stderr


@pytest.mark.parametrize("channels", ["1", "auto"])
def test_grey_images_have_three_equal_channels_unless_asked(tmp_path, channels):
    folder_of(tmp_path, 1)
    flags = ("--data", tmp_path, "--epochs", 1, "--channels", channels, *TINY)
    succeed("train.py", *flags, "--out", tmp_path / "out")
    config = model.load_model(tmp_path / "out" / "model.pt", "cpu").config
    assert config.channels == (1 if channels == "1" else 3)
    assert len(config.mean) == config.channels


def test_images_of_different_channels_are_refused(tmp_path):
    folder_of(tmp_path, 6)
    np.save(tmp_path / "images" / "p3x.npy", BANDS[..., :2])
    done = run("train.py", "--data", tmp_path, "--out", tmp_path / "out", *TINY)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "most images have 6 channels, 1 have 2: p3x.npy" in line


def test_more_channels_than_64_are_refused(tmp_path):
    folder_of(tmp_path, 3)
    done = run("train.py", "--data", tmp_path, "--out", tmp_path / "out", "--channels", 65, *TINY)
    assert done.returncode == 2
    assert "an image has from 1 to 64" in done.stderr


def test_a_layer_names_its_page():
    assert str(Layer("a.tif", 4)) == "a.tif (page 5)"
    assert rasters.layers_of("a.png")[0].page == -1
