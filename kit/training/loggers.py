"""--logger: a run's scores, pictures, settings for TensorBoard, wandb or MLflow, below --out."""

import importlib.util
import json
import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from kit.errors import UserError, reason_of

PICTURES = ("examples.jpg", "augmented.jpg", "validation.jpg", "curves.png")

# --------------------------------------------------------------------------------------------------
#  Lightning's loggers
# --------------------------------------------------------------------------------------------------

# Each takes the run's folder, the name of the data, and the version that it continues, or None.


class TensorBoard(TensorBoardLogger):
    """Writes tensorboard/; `tensorboard --logdir FOLDER` shows it."""

    def __init__(self, out: Path, data: str, version: str | None) -> None:
        super().__init__(out, "tensorboard", "", default_hp_metric=False)

    def show(self, path: Path, epoch: int) -> None:
        pixels = np.array(Image.open(path).convert("RGB"))
        self.experiment.add_image(path.stem, pixels, epoch, dataformats="HWC")


class Wandb(WandbLogger):
    """Writes wandb/; online where wandb has a key, else `wandb sync` uploads it."""

    def __init__(self, out: Path, data: str, version: str | None) -> None:
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # they are below the home folder
            os.environ[name] = str(out.resolve() / "wandb" / "cache")
        os.environ |= {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        project = os.environ.get("WANDB_PROJECT", data)
        super().__init__(str(out), out, version, not has_wandb_key(), project=project)

    def show(self, path: Path, epoch: int) -> None:
        self.log_image(path.stem, [str(path)], epoch)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish()  # the next fold is a run of its own


class MLFlow(MLFlowLogger):
    """Writes mlflow.db and mlflow/, unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, out: Path, data: str, version: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        server = os.environ.get("MLFLOW_TRACKING_URI")
        where = {"tracking_uri": server or f"sqlite:///{out.resolve() / 'mlflow.db'}"}
        where["artifact_location"] = None if server else (out.resolve() / "mlflow").as_uri()
        super().__init__(data, str(out), run_id=version, **where)

    def show(self, path: Path, epoch: int) -> None:
        self.experiment.log_artifact(self.run_id, str(path))


LOGGERS = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLFlow}


def has_wandb_key() -> bool:
    """Whether wandb has a key, in WANDB_API_KEY or netrc."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return bool(known or os.environ.get("WANDB_API_KEY"))


def check(name: str) -> None:
    """Raise UserError for a --logger whose library is not installed."""
    if name != "none" and not importlib.util.find_spec(name):
        raise UserError(f"--logger {name}", "is not installed", f"pip install {name}")


# --------------------------------------------------------------------------------------------------
#  The log of a run
# --------------------------------------------------------------------------------------------------


class RunLog:
    """What a run gives to its logger, whose errors end the log and not the training."""

    def __init__(self, out: Path, settings: dict[str, Any], version: list[str] | None) -> None:
        """`version`: that the run which is resumed had. Raises UserError."""
        self.out, self.name, self.ended = out, settings["logger"], False
        same = version[1] if version and version[0] == self.name else None
        try:
            data = Path(settings["data"]).resolve().name
            self.logger: Any = LOGGERS[self.name](out, data, same)
            if not same:
                self.logger.log_hyperparams(settings)
            self.version = [self.name, self.logger.version]  # wandb's is there only now
        except Exception as error:  # the loggers raise anything
            problem = f"cannot start ({reason_of(error)})"
            raise UserError(f"--logger {self.name}", problem, "leave it out") from None

    def attempt(self, action: Callable, *values: Any) -> None:
        """Call a method of the logger; the first that fails is said, and is the last."""
        if self.ended:
            return
        try:
            action(*values)
        except Exception as error:  # the loggers raise anything
            self.ended = True
            print(f"--logger {self.name}: ENDS HERE ({reason_of(error)})", flush=True)

    def add(self, row: dict[str, float]) -> None:
        """A row of metrics.csv."""
        scores = {name: value for name, value in row.items() if name != "epoch"}
        self.attempt(self.logger.log_metrics, scores, int(row["epoch"]))

    def close(self, epoch: int) -> None:
        """Add the pictures and the final scores that are in the folder."""
        for path in (self.out / name for name in PICTURES):
            if path.exists():
                self.attempt(self.logger.show, path, epoch)
        scores = self.out / "metrics.json"
        mean = json.loads(scores.read_text())["mean"] if scores.exists() else {}
        self.add({f"final/{name}": value for name, value in mean.items()} | {"epoch": epoch})
        self.attempt(self.logger.finalize, "success")
