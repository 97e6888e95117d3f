"""Any encoder and architecture of smp: the trial step, weights as people have them, decoders."""

import argparse
import copy
import json
import re

import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from conftest import TINY, run, succeed
from PIL import Image
from safetensors.torch import save_file

from kit.config import ModelConfig
from kit.errors import UserError
from kit.network import encoders, model
from kit.training import trial
from train import Config

AUTO, GIVEN = (True, True), (False, False)


def attempt(config, free=GIVEN, batch_size=4, images=9, processes=1, **settings):
    """What the trial step makes of the settings, and of those of the model."""
    resolved = Config(grow=True, batch_size=batch_size, devices=processes, **settings)
    samples = pd.DataFrame(index=range(images))
    return trial.try_network(resolved, config, samples, free, [0.5, 0.75])


def settle(arch, encoder, size, free=AUTO, **numbers):
    """Height, width, and whether progressive resizing stays on."""
    config = ModelConfig(arch=arch, encoder=encoder, height=size[0], width=size[1])
    resolved, config = attempt(config, free, **numbers)
    assert (resolved.height, resolved.width) == (config.height, config.width)
    return config.height, config.width, resolved.grow


# --------------------------------------------------------------------------------------------------
#  The trial step
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "encoder", "expected"),
    [
        ("Unet", "resnet18", (96, 320, True)),
        ("FPN", "resnet18", (96, 320, True)),
        ("PAN", "resnet18", (128, 384, False)),
        ("Unet", "tu-hrnet_w18_small", (96, 320, False)),
        ("Unet", "tu-swin_tiny_patch4_window7_224", (224, 224, False)),
        ("Unet", "tu-maxvit_nano_rw_256", (256, 256, False)),
        ("DPT", "tu-vit_tiny_patch16_224", (224, 224, False)),
    ],
)
def test_automatic_size_is_one_that_the_network_takes(arch, encoder, expected, capsys):
    assert settle(arch, encoder, (96, 320)) == expected
    printed = capsys.readouterr().out
    assert ("--grow: " in printed) is not expected[2]
    assert (f"takes {expected[0]}x{expected[1]}" in printed) is (expected[:2] != (96, 320))


def test_the_decoder_of_unet_is_lighter_next_to_a_light_encoder():
    """Under 512 channels at its deepest; what is given stays, and other architectures."""

    def decoder(given, **names):
        config = ModelConfig(height=64, width=64, decoder_channels=given, **names)
        resolved, config = attempt(config)
        assert resolved.decoder_channels == config.decoder_channels
        return config.decoder_channels

    light = "timm-tf_efficientnet_lite0"
    assert decoder("auto", encoder=light) == "128,64,32,16,16"
    assert decoder("auto", encoder="resnet18") == "1"
    assert decoder("auto", encoder=light, arch="FPN") == "1"
    assert decoder("1", encoder=light) == "1"


def test_a_refused_size_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"--height 64 --width 64.*PAN.*--height 128 --width 128$"):
        settle("PAN", "resnet18", (64, 64), GIVEN)
    with pytest.raises(UserError, match=r"take --height 224 --width 224$"):
        settle("DPT", "tu-vit_tiny_patch16_224", (96, 320), GIVEN)
    with pytest.raises(UserError, match=r"--width 100: FPN.*take 96 or 128$"):
        settle("FPN", "resnet18", (96, 100), GIVEN)


@pytest.mark.parametrize("free", [AUTO, GIVEN])
def test_a_pair_that_takes_no_size_is_named_as_such(free):
    """smp's DPT takes ViTs with patches of 8, 16 and 32; multiples of 14 do not help."""
    for size in ((96, 320), (518, 518)):
        with pytest.raises(UserError) as refused:
            settle("DPT", "tu-vit_small_patch14_dinov2", size, free)
        assert str(refused.value).startswith("--arch DPT --encoder tu-vit_small_patch14_dinov2: ")
        assert "--height" not in str(refused.value)


@pytest.mark.parametrize("arch", ["DeepLabV3Plus", "UPerNet"])
def test_a_batch_of_one_names_the_flag(arch):
    with pytest.raises(UserError, match=r"^--batch_size 1: .*take --batch_size 2 or more"):
        settle(arch, "resnet18", (64, 96), GIVEN, batch_size=1)
    with pytest.raises(UserError, match=r"^--batch_size 2 in each of 2 processes.*--batch_size 4"):
        settle(arch, "resnet18", (64, 96), GIVEN, batch_size=2, processes=2)
    with pytest.raises(UserError, match="^--data: one training image: .*add images"):
        settle(arch, "resnet18", (64, 96), AUTO, images=1)


def test_one_small_image_is_enough_for_a_unet():
    """BatchNorm cannot learn from one image whose features are 1x1."""
    assert settle("Unet", "resnet18", (32, 32), images=1) == (64, 64, False)
    assert settle("Unet", "resnet18", (32, 32), images=2) == (32, 32, True)
    with pytest.raises(UserError, match="one training image.*--height 64 --width 64"):
        settle("Unet", "resnet18", (32, 32), GIVEN, images=1)


def test_two_small_images_simply_work(tmp_path):
    for number in (1, 2):
        pixels = np.full((24, 40), 99 * number, np.uint8)
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels > 99 if folder == "masks" else pixels).save(
                tmp_path / folder / f"{number}.png"
            )
    flags = ("--data", tmp_path, "--out", tmp_path / "out", "--encoder_weights", "none")
    small = ("--encoder", "resnet18", "--decoder_channels", "0.25", "--epochs", 2)
    printed = succeed("train.py", *flags, *small)
    assert "input 64x" in printed
    trained = model.load_model(tmp_path / "out" / "model.pt", "cpu")
    assert trained.config.decoder_channels == "0.25"


def test_full_memory_leaves_no_batch_that_the_network_refuses():
    config = ModelConfig(arch="DeepLabV3", encoder="resnet18", height=64, width=64)
    network = model.build_network(config)
    trial.check_batch(network, config, 2)
    with pytest.raises(UserError, match="memory: cannot hold 2 images.*smaller --height"):
        trial.check_batch(network, config, 1)


def test_the_trial_step_changes_nothing():
    network = model.build_network(ModelConfig(encoder="resnet18")).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    assert trial.trial_step(network, 2, (64, 64), backward=True) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


class Numbers(torch.nn.Module):
    """A layer that computes with its numbers, which meta tensors have not."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 1, 1)
        self.unused = torch.nn.Conv2d(3, 1, 1)

    def forward(self, images):
        return self.layer(images) * (1 + images.sum().item())


def test_a_network_that_wants_numbers_gets_them():
    unused = trial.trial_step(Numbers(), 4, (8, 8), backward=True)
    assert unused == ["unused.weight", "unused.bias"]


@pytest.mark.parametrize(
    ("arch", "encoder", "frozen"),
    [
        ("Unet", "timm-tf_efficientnet_lite0", "encoder.conv_head.weight"),
        ("Unet", "efficientnet-b0", "encoder._conv_head.weight"),
        ("PSPNet", "resnet18", "encoder.layer4.0.conv1.weight"),
        ("Unet", "resnet18", None),
    ],
)
def test_what_gets_no_gradient_is_frozen(arch, encoder, frozen):
    """Several processes would wait for its gradient."""
    config = ModelConfig(arch=arch, encoder=encoder, height=64, width=64)
    network = model.build_network(config)
    trial.freeze_unused(network, config)
    still = {name for name, weight in network.named_parameters() if not weight.requires_grad}
    assert (frozen in still) if frozen else not still
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    missing = {name for name, weight in network.named_parameters() if weight.grad is None}
    assert missing == still


@pytest.mark.parametrize(
    ("encoder", "fast"), [("resnet18", True), ("mobileone_s0", False), ("tu-repvgg_a0", False)]
)
def test_channels_last_is_left_out_where_it_crashes(encoder, fast):
    network = model.build_network(ModelConfig(encoder=encoder))
    model.set_memory_format(network, "cpu")
    formats = []
    first = next(part for part in network.modules() if isinstance(part, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: formats.append(inputs[0].stride()))
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    network.train()(images).sum().backward()  # a crash would end pytest
    assert (formats[0] == images.stride()) is fast
    model.set_memory_format(network, "cuda")
    assert first.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_conv3d_keeps_its_format_and_learns_in_float32(monkeypatch):
    """Of lambda_resnet26t; bf16 on a CPU gives it random gradients."""
    monkeypatch.setattr(model, "best_device", lambda: "cpu")
    network = model.prepare_training(
        model.build_network(ModelConfig(encoder="tu-lambda_resnet26t"))
    )
    first = next(part for part in network.modules() if isinstance(part, torch.nn.Conv2d))
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.train()(torch.randn(4, 3, 64, 64))
    logits.float().square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())


def test_depthwise_convolutions_that_bf16_makes_slow_train_in_float32(monkeypatch):
    monkeypatch.setattr(model, "best_device", lambda: "cpu")
    config = ModelConfig(encoder="timm-tf_efficientnet_lite0")
    prepared = model.prepare_training(model.build_network(config))
    network = copy.deepcopy(prepared).train()  # as for the EMA
    for weight in prepared.parameters():
        weight.data.zero_()  # the copy does not compute with them
    dtypes = {True: set(), False: set()}

    def remember(conv, inputs, output):
        slow = conv.groups > 1 and (conv.stride != (1, 1) or conv.kernel_size > (3, 3))
        assert output.dtype == torch.bfloat16, "as the next layers expect"
        assert output.requires_grad
        dtypes[slow].add(type(output.grad_fn.next_functions[0][0]).__name__)

    convs = [part for part in network.modules() if isinstance(part, torch.nn.Conv2d)]
    handles = [conv.register_forward_hook(remember) for conv in convs]
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    logits.float().mean().backward()
    assert dtypes[True] == {"ConvolutionBackward0"}, "of float32, then rounded to bf16"
    assert "ConvolutionBackward0" not in dtypes[False]
    for handle in handles:
        handle.remove()
    plain = model.build_network(config).eval()
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.allclose(network.eval()(images), plain(images), atol=1e-4)


# --------------------------------------------------------------------------------------------------
#  Names
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "encoder", "words"),
    [
        ("Unett", "resnet18", "--arch Unett.*Unet"),
        ("Unet", "resnet35", "--encoder resnet35.*resnet34"),
        ("Unet", "convnext_tiny", "--encoder convnext_tiny.*tu-convnext_tiny"),
        ("Unet", "tu-convnextt_tiny", "tu-convnext_tiny"),
        ("Unet", "tu-convnext_tiny.fb_in1", r"tu-convnext_tiny\.fb_in1k"),
        ("Unet", "timm-nothing", "--encoder timm-nothing: unknown"),
        ("Unet", "tu-vit_tiny_patch16_224", "do not fit together.*Unet takes resnet34"),
        ("DPT", "resnet18", "do not fit together.*DPT takes the ViTs of timm"),
    ],
)
def test_names_that_do_not_fit(arch, encoder, words):
    with pytest.raises(UserError, match=words) as refused:
        encoders.build(arch, encoder, 1)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


# --------------------------------------------------------------------------------------------------
#  Weights and normalisation
# --------------------------------------------------------------------------------------------------


def timm_state(name):
    """The state dict of timm's whole model, from random weights."""
    torch.manual_seed(7)
    return timm.create_model(name, pretrained=False).state_dict()


def write(folder, state, kind):
    """A file as people have them; returns its path."""
    path = folder / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, str(path))
    elif kind == "checkpoint of timm":
        settings = argparse.Namespace(model="this")
        torch.save({"epoch": 3, "args": settings, "state_dict": state}, path)
    else:
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    return str(path)


@pytest.mark.parametrize("kind", ["safetensors", "checkpoint of timm", "prefixed"])
def test_a_file_of_timm_fits_its_encoder(tmp_path, kind):
    """timm's `features_only` renames stages.0 to stages_0."""
    state = timm_state("convnext_atto")
    path = write(tmp_path, state, kind)
    network = model.build_network(ModelConfig(encoder="tu-convnext_atto"), path)
    own = network.encoder.state_dict()
    assert torch.equal(own["model.stages_0.blocks.0.mlp.fc1.weight"],
                       state["stages.0.blocks.0.mlp.fc1.weight"])  # fmt: skip
    plain = {encoders.plain_name(key): value for key, value in state.items()}
    assert all(torch.equal(own[key], plain[encoders.plain_name(key)]) for key in own)


@pytest.mark.parametrize(
    ("arch", "encoder", "name"),
    [
        ("DPT", "tu-vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("PSPNet", "tu-resnet18", "resnet18"),
        ("DeepLabV3", "tu-mobilenetv3_small_050", "mobilenetv3_small_050"),
        ("Unet", "timm-regnetx_002", "regnetx_002"),
        ("Unet", "tu-hrnet_w18_small", "hrnet_w18_small"),
    ],
)
def test_weights_fit_the_encoder_as_the_architecture_builds_it(tmp_path, arch, encoder, name):
    state = timm_state(name)
    for key in [key for key in state if key.startswith("head.")]:
        state[key] = state[key][:3]  # of three classes
    path = write(tmp_path, state, "safetensors")
    network = model.build_network(ModelConfig(arch=arch, encoder=encoder), path)
    plain = {encoders.plain_name(key): value for key, value in state.items()}
    loaded = network.encoder.state_dict().items()
    same = [torch.equal(value, plain[encoders.plain_name(key)]) for key, value in loaded
            if ".head." not in key]  # fmt: skip
    assert all(same)
    assert len(same) > 40


def test_a_model_of_the_kit_gives_its_encoder(tmp_path):
    config = ModelConfig(encoder="resnet18")
    first = model.build_network(config)
    model.save_model(tmp_path / "model.pt", model.TrainedModel(first, config, {}, {}))
    second = model.build_network(config, str(tmp_path / "model.pt"))
    key = "encoder.layer4.1.conv2.weight"
    assert torch.equal(first.state_dict()[key], second.state_dict()[key])


PREFIXES = ("_orig_mod.", "backbone.", "net.", "unet.", "module._orig_mod.unet.encoder.")
WRAPPERS = (("model_state_dict",), ("ema",), ("teacher",), ("ema", "model"), ("model_ema",))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_other_libraries_are_taken_off(tmp_path, prefix):
    encoder = model.build_network(ModelConfig(encoder="resnet18")).encoder.state_dict()
    file = tmp_path / "w.pth"
    torch.save({f"{prefix}{key}": tensor for key, tensor in encoder.items()}, file)
    loaded = model.build_network(ModelConfig(encoder="resnet18"), str(file)).encoder.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in encoder.items())


@pytest.mark.parametrize("names", WRAPPERS, ids=".".join)
def test_weights_lie_under_names_of_other_libraries(tmp_path, names):
    encoder = model.build_network(ModelConfig(encoder="resnet18")).encoder.state_dict()
    content, file = encoder, tmp_path / "w.pth"
    for name in reversed(names):
        content = {name: content, "epoch": torch.tensor(3), "optimizer": {"state": {}}}
    torch.save(content, file)
    loaded = model.build_network(ModelConfig(encoder="resnet18"), str(file)).encoder.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in encoder.items())


def test_names_that_become_one_are_refused(tmp_path):
    encoder = model.build_network(ModelConfig(encoder="resnet18")).encoder.state_dict()
    file = str(tmp_path / "w.pth")
    same = {f"{prefix}{key}": tensor for prefix in ("", "net.") for key, tensor in encoder.items()}
    torch.save(same, file)
    model.build_network(ModelConfig(encoder="resnet18"), file)  # of the same content
    torch.save(same | {"net.conv1.weight": 2 * encoder["conv1.weight"]}, file)
    with pytest.raises(UserError, match="conv1.weight and net.conv1.weight .* differ"):
        model.build_network(ModelConfig(encoder="resnet18"), file)
    torch.save(same | {"net.fc.weight": torch.ones(2), "fc.weight": torch.zeros(2)}, file)
    model.build_network(ModelConfig(encoder="resnet18"), file)  # nothing uses it


def test_messages_have_no_escapes_of_a_file(tmp_path):
    file, key = str(tmp_path / "w.pth"), "net.\x1b[31m\nconv1.weight"
    other = key.replace("net.", "")
    problem = UserError(file, f"holds {key} and {other}")
    assert str(problem).isprintable()
    assert "\\x1b[31m\\nconv1" in str(problem)
    assert str(UserError("--data", "größe 漢字")) == "--data: größe 漢字"


@pytest.mark.parametrize("kind", ["safetensors", "pth", "tag", "config.json", "model.pt"])
def test_normalisation_follows_the_weights_file(tmp_path, kind):
    """Where it says with which mean and std it was trained."""
    state, half = timm_state("resnet18"), {"mean": [0.5] * 3, "std": [0.25] * 3}
    file = tmp_path / ("w.pth" if kind in ("pth", "model.pt") else "w.safetensors")
    encoder, expected = "tu-resnet18", (0.5, 0.25)
    if kind == "pth":
        torch.save({"state_dict": state, "pretrained_cfg": half}, file)
    elif kind == "model.pt":
        config = ModelConfig(encoder="resnet18", mean=(0.5,) * 3, std=(0.25,) * 3)
        network = model.build_network(config)
        model.save_model(file, model.TrainedModel(network, config, {}, {}))
    elif kind == "tag":  # the name that timm gives it
        encoder, expected = "tu-tf_efficientnet_b0", (0.5, 0.5)
        file = tmp_path / "tf_efficientnet_b0.ap_in1k.safetensors"
        save_file(state, str(file))
    else:
        inside = {"pretrained_cfg": json.dumps(half)} if kind == "safetensors" else None
        save_file(state, str(file), inside)
        if not inside:
            (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": half}))
    found = encoders.normalisation("Unet", encoder, str(file))
    assert (found["mean"][0], found["std"][0]) == expected


def test_an_impossible_normalisation_of_a_file_is_refused(tmp_path):
    torch.save({"pretrained_cfg": {"mean": [0.5], "std": [0, 0, 0]}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: its mean and std are none"):
        encoders.normalisation("Unet", "resnet18", str(tmp_path / "w.pth"))


def test_weights_of_another_encoder_are_counted(tmp_path):
    path = write(tmp_path, timm_state("convnext_atto"), "safetensors")
    with pytest.raises(UserError, match="weights of resnet18: 0 of 100 tensors fit .absent: conv1"):
        model.build_network(ModelConfig(encoder="resnet18"), path)


def test_names_of_weights():
    encoders.check_weights("efficientnet-b0", "advprop")
    encoders.check_weights("dpn68b", "imagenet+5k")
    for encoder, weights, words in (
        ("resnet18", "advprop", "no such file; resnet18 has imagenet, ssl, swsl"),
        ("resnext101_32x16d", "imagenet", "has instagram, ssl, swsl"),
        ("tu-convnext_tiny", "in12k", "tu-NAME.TAG"),
        ("tu-resnet18", "nowhere.pth", "nowhere.pth: no such file"),
    ):
        with pytest.raises(UserError, match=words):
            encoders.check_weights(encoder, weights)


@pytest.mark.parametrize(
    ("encoder", "mean", "std"),
    [
        ("resnet34", 0.485, 0.229),
        ("timm-tf_efficientnet_lite0", 0.5, 0.5),
        ("tu-tf_efficientnetv2_s.in21k", 0.5, 0.5),
        ("tu-tf_efficientnet_lite0", 0.5, 0.5),
        ("inceptionv4", 0.5, 0.5),
        ("tu-convnext_tiny", 0.485, 0.229),
    ],
)
def test_normalisation_follows_the_encoder(tmp_path, encoder, mean, std):
    file = tmp_path / "w.pth"
    torch.save({}, file)
    found = encoders.normalisation("Unet", encoder, str(file))
    assert (found["mean"][0], found["std"][0]) == (mean, std)
    words = ModelConfig(encoder=encoder, **found).describe()
    assert f"mean {mean} " in words


# --------------------------------------------------------------------------------------------------
#  Decoders
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [arch for arch in encoders.ARCHS if arch != "linknet"])
def test_a_factor_makes_a_smaller_decoder(arch):
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else "resnet18"
    whole, half = (
        sum(weight.numel() for weight in encoders.build(arch, encoder, 1, channels).parameters())
        for channels in ("1", "0.5")
    )
    assert half < whole


def test_numbers_of_channels():
    options = encoders.decoder_options("Unet", "128,64,32,16,8")
    assert options == {"decoder_channels": (128, 64, 32, 16, 8)}
    assert encoders.decoder_options("Unet", "0.5") == options
    whole = {"decoder_channels": (256, 128, 64, 32, 16)}
    assert encoders.decoder_options("Unet", "1.0") == whole
    assert encoders.decoder_options("Linknet", "1") == {}
    assert encoders.decoder_options("UPerNet", "64") == {"decoder_channels": 64}
    network = model.build_network(ModelConfig(encoder="resnet18", decoder_channels="64,32,16,8,8"))
    assert network.segmentation_head[0].in_channels == 8
    for arch, text in (
        ("Unet", "64,32"), ("Unet", "many"), ("Unet", "0"), ("FPN", "64,33"), ("Linknet", "0.5"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--decoder_channels {text}: {arch} ?"):
            encoders.build(arch, "resnet18", 1, text)


def test_smp_builds_the_same_without_options():
    torch.manual_seed(3)
    ours = model.build_network(ModelConfig())
    torch.manual_seed(3)
    theirs = smp.create_model("Unet", "resnet34", encoder_weights=None, classes=1)
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------------------------
#  --init
# --------------------------------------------------------------------------------------------------

CITY = ("road", "car", "sky")


def network_of(names, seed, **changes):
    torch.manual_seed(seed)
    exclusive = {"exclusive": True, "thresholds": (), "areas": ()}
    config = ModelConfig(
        encoder="resnet18", class_names=names, class_values=names, **exclusive, **changes
    )
    return model.build_network(config), config


def test_a_start_from_a_model_takes_over_decoder_and_known_classes(tmp_path):
    trained, config = network_of(CITY, 0)
    model.save_model(tmp_path / "model.pt", model.TrainedModel(trained, config, {}, {}))
    fresh, other = network_of(("sky", "tree", "road"), 1)
    head = fresh.segmentation_head[0].weight.clone()
    file = model.weights_file(str(tmp_path))
    encoders.load_weights(fresh, other.arch, other.encoder, file)
    said = model.take_over(fresh, other, file)
    assert "60 of 60 tensors of the decoder, sky, road of the head" in said
    for key, value in trained.state_dict().items():
        if not key.startswith("segmentation_head"):
            assert torch.equal(fresh.state_dict()[key], value), key
    given = trained.segmentation_head[0].weight
    assert torch.equal(
        fresh.segmentation_head[0].weight, torch.stack([given[2], head[1], given[0]])
    )


def test_a_start_from_another_decoder_takes_the_encoder_alone(tmp_path):
    trained, config = network_of(CITY, 0)
    model.save_model(tmp_path / "model.pt", model.TrainedModel(trained, config, {}, {}))
    fresh, other = network_of(("a", "b"), 1, arch="FPN")
    assert "no class of the head" in model.take_over(fresh, other, str(tmp_path / "model.pt"))


def test_a_start_from_a_folder_of_smp(tmp_path):
    trained, _ = network_of(CITY, 0)
    trained.save_pretrained(tmp_path / "hub")
    fresh, other = network_of(CITY, 1)
    file = model.weights_file(str(tmp_path / "hub"))
    encoders.load_weights(fresh, other.arch, other.encoder, file)
    model.take_over(fresh, other, file)
    assert torch.equal(
        fresh.decoder.blocks[0].conv1[0].weight, trained.decoder.blocks[0].conv1[0].weight
    )


def test_a_start_from_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--init .*: no weights there; name a model\.pt"):
        model.weights_file(str(tmp_path))


def test_a_training_starts_from_a_model(roads, tmp_path):
    flags = ("--data", roads, "--epochs", 1, *TINY)
    succeed("train.py", *flags, "--out", tmp_path / "a")
    printed = succeed("train.py", *flags, "--init", tmp_path / "a", "--out", tmp_path / "b")
    assert "tensors of the decoder, foreground of the head" in printed
    rows = [pd.read_csv(tmp_path / name / "metrics.csv") for name in "ab"]
    assert rows[1].train_loss[0] < rows[0].train_loss[0]
    wrong = run(
        "train.py", *flags, "--init", tmp_path / "a", "--encoder", "resnet18", "--out", tmp_path
    )
    assert wrong.returncode == 2
    assert f"error: --init {tmp_path / 'a'}: not the weights of resnet18" in wrong.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.pt", b"no model", "cannot be read"),
        ("empty.safetensors", b"", "cannot be read"),
        ("nothing.pt", {}, "not the weights of .*: 0 of"),
        ("other.pt", {"model": {"layer.weight": torch.ones(2)}}, "not the weights of .*: 0 of"),
        ("numbers.pt", {"model": [1, 2]}, "not the weights of .*: 0 of"),
        ("statistics.pt", {"model": {"mean": (9, 9, 9), "std": (1, 1, 1)}}, "its mean and std"),
    ],
)
def test_a_start_of_which_nothing_fits_is_refused_by_the_flag_that_named_it(
    roads, tmp_path, name, content, message
):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    flags = ("--data", roads, "--epochs", 1, *TINY, "--out", tmp_path / "out")
    for flag in ("--init", "--encoder_weights"):
        done = run("train.py", *flags, flag, tmp_path / name)
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert re.match(f"error: {flag} {re.escape(str(tmp_path / name))}: {message}", last), last
        assert not (tmp_path / "out" / "model.pt").exists()
