"""Encoders and architectures, measured, trained and exported: bench.py writes docs/models.md.

Each command keeps what bench_NAME.json has: remove that to measure anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import HERE, load_report, seconds_of, write_report

if TYPE_CHECKING:
    import torch

ENCODERS = (  # one of each family of smp, and some of timm
    "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "timm-resnest14d",
    "timm-res2net50_26w_4s", "timm-regnetx_002", "timm-gernet_s", "se_resnet50",
    "timm-skresnet18", "densenet121", "inceptionresnetv2", "inceptionv4", "efficientnet-b0",
    "timm-efficientnet-b0", "timm-tf_efficientnet_lite0", "timm-mobilenetv3_small_100",
    "mobilenet_v2", "dpn68", "vgg11_bn", "xception", "mit_b0", "mobileone_s0",
    "tu-convnext_atto", "tu-convnextv2_atto", "tu-mobilenetv4_conv_small",
    "tu-tf_efficientnetv2_b0", "tu-swin_tiny_patch4_window7_224", "tu-swinv2_tiny_window8_256",
    "tu-maxvit_nano_rw_256", "tu-vit_tiny_patch16_224", "tu-vit_small_patch16_dinov3",
    "tu-hrnet_w18_small", "tu-fastvit_t8", "tu-mambaout_femto", "tu-repvgg_b0", "tu-hgnetv2_b0",
    "tu-edgenext_xx_small", "tu-pvt_v2_b0", "tu-poolformer_s12", "tu-rdnet_tiny", "tu-dla34",
    "tu-ghostnet_100", "tu-inception_next_atto",
)  # fmt: skip
SECONDS = 300  # a pair of the sweep may take


def archs() -> list[str]:
    """The names of smp's architectures."""
    from kit.network import encoders

    return [arch.__name__ for arch in encoders.ARCHS.values()]


def in_child(work: Callable[[], Any]) -> tuple[int, str]:
    """Call `work` in a child process; its exit status (minus a signal) and what it printed."""
    from kit.errors import one_line_errors

    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)  # ends it even within torch
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 1
            try:
                with one_line_errors():
                    work()
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode(errors="replace")


def draw_pairs(folder: Path) -> None:
    """Four small images, odd in height and width, whose lower half is the foreground."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    mask = np.zeros((70, 101), np.uint8)
    mask[35:] = 255
    for number in range(4):
        image = rng.integers(0, 255, (*mask.shape, 3), np.uint8)
        for name, pixels in (("images", image), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def train_and_predict(arch: str, encoder: str) -> None:
    """Two epochs on four images at automatic size, the export, and predictions with it."""
    import infer
    import train

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_pairs(root / "data")
        names = {"arch": arch, "encoder": encoder, "encoder_weights": "none"}
        paths = {"data": str(root / "data"), "out": str(root / "out")}
        train.train(train.Config(epochs=2, **names, **paths))
        options = {"model": [str(root / "out")], "data": str(root / "data" / "images")}
        infer.infer(infer.Options(out=str(root / "predictions"), **options))


def export_pair(arch: str, encoder: str) -> None:
    """model.onnx of an untrained network of the first size that it takes, and smp's folder.

    Compared with the network on noise.
    """
    import segmentation_models_pytorch as smp
    import torch

    from kit.config import ModelConfig
    from kit.data.images import normalise
    from kit.extra import export
    from kit.network import model
    from kit.training.trial import refusal

    network = model.build_network(ModelConfig(arch=arch, encoder=encoder))
    size = next(n for n in (96, 224, 256) if not refusal(network, 4, (n, n)))
    config = ModelConfig(arch=arch, encoder=encoder, height=size, width=size)
    noise = normalise(255 * torch.rand(4, 3, size, size), config)
    model.reestimate_batch_norm(network.eval(), [noise])  # else logits are 0, or 1e5
    network = model.set_memory_format(network.requires_grad_(False), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        models = [model.TrainedModel(network, config, {}, {})]
        export.export("smp", models, None, folder)
        difference = smp.from_pretrained(f"{folder}/smp").eval()(noise) - network(noise)
        assert difference.abs().max() < 1e-2
        export.export("onnx", models, None, folder)


def sweep(
    options: argparse.Namespace, name: str = "sweep", work: Callable = train_and_predict
) -> dict[str, str]:
    """{"Unet resnet18": "" where it runs, a refusal in one line, or how it failed}.

    Of `export` what model.onnx takes instead of "". Pairs that `sweep` refused are left out.
    """
    import infer  # once, before the children
    import train

    assert train and infer
    results = load_report(name).get("pairs", {})
    refused_before = load_report("sweep").get("pairs", {}) if name == "export" else {}
    for encoder in options.encoders.split(","):
        for arch in options.archs.split(",") if options.archs else archs():
            pair = f"{arch} {encoder}"
            if pair in results or refused_before.get(pair):
                continue
            status, text = in_child(functools.partial(work, arch, encoder))
            last = (text.strip().splitlines() or [""])[-1]
            refused = status == 2 and last.startswith("error: ")
            failed = f"FAILED with status {status}: {last}"
            done = last if name == "export" else ""
            results[pair] = done if status == 0 else last if refused else failed
            print(f"{pair}: {results[pair] or 'runs'}", flush=True)
            write_report(name, pairs=results)
    return results


def model_row(arch: str, encoder: str, options: argparse.Namespace) -> dict[str, Any]:
    """The measurements of one network, at the size that it takes."""
    import pandas as pd
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import train
    from kit.config import ModelConfig
    from kit.network import encoders, model
    from kit.training import trial

    device = model.best_device()
    settings = train.Config(encoder_weights="none", batch_size=options.batch, grow=True)
    size = {"height": options.size, "width": options.size}
    config = ModelConfig(arch=arch, encoder=encoder, tta=False, **size)
    images = pd.DataFrame(index=range(99))
    settings, config = trial.try_network(settings, config, images, (True, True), (0.5, 0.75))
    network = model.build_network(config)
    size = config.height, config.width
    unused = trial.trial_step(network, 2, size, backward=True)
    network = model.set_memory_format(network, device).to(device)
    batch = torch.randn(options.batch, 3, *size, device=device)
    batch = batch.to(memory_format=torch.channels_last)
    mask = torch.zeros(len(batch), 1, *size, device=device)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            network.eval()(batch[:1])
        network(batch)
        predicting = median_seconds(lambda: network(batch), device, options.rounds)
    network.train()
    learn = lambda: train.loss(network(batch), mask, settings).backward()  # noqa: E731
    learn()
    learning = median_seconds(learn, device, options.rounds)
    return {
        "M parameters": round(sum(w.numel() for w in network.parameters()) / 1e6, 1),
        "GMAC": round(counter.get_total_flops() / 2e9, 2),
        "ms training": round(1000 * learning / len(batch), 1),
        "ms inference": round(1000 * predicting / len(batch), 1),
        "peak GB": round(peak_memory(device), 2),
        "size": "{}x{}".format(*size),
        "sizes": sizes_in_words(network, size) + ("" if settings.grow else "; no --grow"),
        "frozen in two processes": len(unused),
        "weights": ", ".join(encoders.weights_names(encoder)) or "none",
    }


def peak_memory(device: str) -> float:
    """Of this process so far, in GiB: the GPU's, else the largest resident set."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def sizes_in_words(network: torch.nn.Module, size: tuple[int, int]) -> str:
    """The finest step of height and width at which the network takes the next size but one."""
    from kit.training.trial import refusal

    for step in (1, 2, 4, 8, 16, 32, 64, 128):
        height, width = (step * (length // step + 1) for length in size)
        if not refusal(network, 2, (height, width + 2 * step)):
            return "any" if step == 1 else f"multiples of {step}"
    return "this one"


def print_row(arch: str, encoder: str, options: argparse.Namespace) -> None:
    """`model_row` as JSON."""
    print(json.dumps(model_row(arch, encoder, options)))


def median_seconds(work: Callable, device: str, rounds: int) -> float:
    """The median time of a piece of work."""
    return statistics.median(seconds_of(work, device) for _ in range(rounds))


def measure_models(options: argparse.Namespace) -> dict[str, Any]:
    """{"Unet resnet18": measurements}, each in a process of its own."""
    import train  # once, before the children

    assert train
    pairs = [("Unet", encoder) for encoder in options.encoders.split(",")]
    pairs += [(arch, "resnet34") for arch in archs() if arch not in ("Unet", "DPT")]
    pairs.append(("DPT", "tu-vit_tiny_patch16_224"))
    rows = load_report("models").get("rows", {})
    for pair in pairs:
        name = " ".join(pair)
        if name in rows:
            continue
        status, text = in_child(functools.partial(print_row, *pair, options))
        last = (text.strip().splitlines() or [""])[-1]
        if status == 0:
            rows[name] = json.loads(last)
        print(f"{name}: {last}", flush=True)
        write_report("models", batch=options.batch, rows=rows)
    return rows


def write_models_page() -> None:
    """docs/models.md from bench_models.json and bench_sweep.json."""
    measured, swept = load_report("models"), load_report("sweep")
    lines = [
        "# Which encoder and architecture",
        "Written by `tools/bench.py models` and `tools/bench.py sweep`; every number is measured.",
    ]
    rows = measured.get("rows", {})
    if rows:
        lines += which_to_take(rows)
        columns = list(next(iter(rows.values())))
        lines += [
            "\n## Work, time and memory",
            f"Float32, no pretrained weights, ms per image in batches of {measured['batch']}.",
            "Times depend on what else the machine does: compare GMAC first.",
            f"`python tools/bench.py {measured['call']}` on {measured['machine']}.\n",
            f"| network | {' | '.join(columns)} |",
            f"| --- |{' --- |' * len(columns)}",
        ]
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |")
    pairs = swept.get("pairs", {})
    if pairs:
        names = list(dict.fromkeys(pair.split()[0] for pair in pairs))
        done = sum(not text for text in pairs.values())
        failed = sum(text.startswith("FAILED") for text in pairs.values())
        lines += [
            "\n## Which go together",
            "Two epochs on four images of 70x101 at automatic size, the export, predictions.",
            f"{len(pairs)} pairs tried on {swept['machine']}: {done} run,",
            f"{len(pairs) - done - failed} are refused in one line, {failed} fail.",
            "+ runs, - is refused, ! fails, blank: not tried.\n",
            f"| encoder | {' | '.join(names)} |",
            f"| --- |{' --- |' * len(names)}",
        ]
        for encoder in dict.fromkeys(pair.split()[1] for pair in pairs):
            texts = [pairs.get(f"{arch} {encoder}") for arch in names]
            signs = [sign_of(text) for text in texts]
            lines.append(f"| {encoder} | {' | '.join(signs)} |")
    lines += which_are_exported(load_report("export").get("pairs", {}))
    (HERE / "docs" / "models.md").write_text("\n".join(lines) + "\n")


def which_are_exported(pairs: dict[str, str]) -> list[str]:
    """What model.onnx of each architecture takes, and the largest difference."""
    if not pairs:
        return []
    texts = pairs.values()
    refused = [f"{pair} ({text})" for pair, text in pairs.items() if "wrote " not in text]
    of_any = sum("of any size" in text for text in texts)
    largest = max(float(text.rsplit(" is ", 1)[1]) for text in texts if " is " in text)
    fixed = {pair.split()[0] for pair, text in pairs.items() if "of any size" not in text}
    return [
        "\n## Which are exported",
        "`python tools/bench.py export`: `infer.py --export onnx` of untrained networks, compared",
        f"on noise. Of {len(pairs)} pairs {of_any} give a file that takes images of any",
        f"size (in the steps of the network), {len(pairs) - of_any - len(refused)} one of the size",
        f"of the training, {len(refused)} are refused{': ' * bool(refused)}{'; '.join(refused)}.",
        f"The largest difference of a probability is {largest:.1e}. One size: {sorted(fixed)}.",
    ]


def which_to_take(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The default's time in training, what is much faster, and what is much slower."""
    if "Unet resnet34" not in rows:
        return []
    default = rows["Unet resnet34"]["ms training"]
    part = {name: row["ms training"] / default for name, row in rows.items()}
    fast = [name for name in sorted(part, key=part.get) if part[name] < 0.6][:6]
    slow = [name for name in sorted(part, key=part.get) if part[name] > 2]
    named = lambda names: ", ".join(f"{name} ({part[name]:.2g})" for name in names)  # noqa: E731
    return [
        "\nTo begin take the default, `--arch Unet --encoder resnet34`. Times of a training step,",
        f"as parts of the default's: the fastest are {named(fast)}.",
        f"More than twice as slow: {named(slow)}.",
    ]


def sign_of(text: str | None) -> str:
    """What became of a pair, in one sign."""
    if text is None:
        return " "
    return "+" if not text else "!" if text.startswith("FAILED") else "-"


def run(options: argparse.Namespace) -> None:
    """One of the commands, and docs/models.md from all that was measured."""
    exports = functools.partial(sweep, name="export", work=export_pair)
    {"models": measure_models, "sweep": sweep, "export": exports}[options.command](options)
    write_models_page()
