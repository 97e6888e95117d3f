"""Settings: a dataclass is a command line, model.pt keeps a ModelConfig, a checkpoint its run."""

import dataclasses
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from conftest import TINY, run, succeed

import infer
import train
from kit import cli
from kit.config import ModelConfig
from kit.errors import UserError, first_five, one_line_errors
from kit.network import model
from kit.results import oof
from kit.training import callbacks, resume
from kit.training.resume import Identity


@dataclass(frozen=True)
class Settings:
    """What a fork may write in `Config`."""

    # --- a section ---
    share: float = 0.5  # [0..1] of something, in 100 %
    # [-1..3] the comment on the line above
    level: int = 2
    free: float = 1.0  # a number without limits
    bare: float = 1.0
    also_bare: int = 3

    at_least: int = 1  # [1..] of them
    at_most: float = -1.0  # [..0] below nothing
    negative: float = -2.5  # [-1e3..-1e-3] small
    # a comment that belongs to nothing, far above

    word: str = "none"
    switch: bool = False  # on or off
    kind: Literal["bce", "focal"] = "bce"  # of the loss
    factor: Literal[1, 2, 4] = 1  # a number of a list
    size: int | Literal["auto"] = "auto"  # [32..512] of the input
    rate: float | Literal["auto", "find"] = 5e-4  # [1e-9..10] of learning
    mode: bool | Literal["auto"] = "auto"  # true, false or auto
    both: Literal["all"] | int = 0  # [0..9] or all
    long: Literal["automatic", "by_hand", "not_at_all"] | float = (
        "automatic"  # [0..1] where the value is on a line of its own
    )
    names: list[str] = field(default_factory=lambda: ["out"])  # one or more


def parse(*argv):
    return cli.parse(Settings, "A test.", list(argv))


def refused(*argv):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
#  A dataclass is a command line
# --------------------------------------------------------------------------------------------------


def test_without_flags_all_is_default():
    assert parse() == Settings()


TAKEN = [
    ("share", "1", 1.0),
    ("level", "-1", -1),
    ("free", "-1000.5", -1000.5),
    ("free", "1e300", 1e300),
    ("bare", "2.5", 2.5),
    ("also_bare", "-100", -100),
    ("at_least", "1000000000000", 10**12),
    ("at_most", "-1000000000", -1e9),
    ("negative", "-1000", -1000.0),
    ("word", "nan", "nan"),
    ("switch", "true", True),
    ("switch", "True", True),
    ("kind", "focal", "focal"),
    ("factor", "4", 4),
    ("size", "auto", "auto"),
    ("size", "64", 64),
    ("rate", "find", "find"),
    ("rate", "1e-3", 1e-3),
    ("mode", "true", True),
    ("mode", "false", False),
    ("mode", "False", False),
    ("mode", "auto", "auto"),
    ("both", "3", 3),
    ("both", "all", "all"),
    ("long", "by_hand", "by_hand"),
    ("long", "0.25", 0.25),
]


@pytest.mark.parametrize(("name", "text", "value"), TAKEN)
def test_a_flag_takes_what_its_type_allows(name, text, value):
    taken = getattr(parse(f"--{name}", text), name)
    assert taken == value
    assert type(taken) is type(value)
    assert parse(f"--{name}={text}") == dataclasses.replace(Settings(), **{name: value})


REFUSED = [
    ("share", "1.01", ["from 0 to 1"]),
    ("share", "-0.01", ["from 0 to 1"]),
    ("level", "-2", ["whole number", "from -1 to 3"]),
    ("level", "4", ["from -1 to 3"]),
    ("level", "2.5", ["whole number"]),
    ("bare", "much", ["a number"]),
    ("also_bare", "1.0", ["whole number"]),
    ("at_least", "0", ["from 1"]),
    ("at_most", "0.1", ["to 0"]),
    ("negative", "0", ["from -1000 to -0.001"]),
    ("switch", "yes", ["true", "false"]),
    ("switch", "1", ["true", "false"]),
    ("kind", "dice", ["bce", "focal"]),
    ("factor", "3", ["1", "2", "4"]),
    ("size", "16", ["whole number", "from 32 to 512", "auto"]),
    ("rate", "0", ["a number", "auto", "find"]),
    ("mode", "maybe", ["true", "false", "auto"]),
    ("both", "10", ["from 0 to 9", "all"]),
    ("long", "2", ["from 0 to 1", "automatic", "by_hand", "not_at_all"]),
]


@pytest.mark.parametrize(("name", "text", "words"), REFUSED)
def test_a_flag_refuses_the_rest_and_says_what_it_takes(name, text, words):
    message = refused(f"--{name}", text)
    for word in (f"--{name} {text}", *words):
        assert word in message


FLOATS = ("share", "free", "bare", "at_most", "negative", "rate", "long")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "NaN", "1e999"])
def test_no_number_is_nan_or_infinite(name, text):
    assert f"--{name}" in refused(f"--{name}", text)


def test_a_list_takes_several_words():
    assert parse("--names", "a", "b", "--level", "0").names == ["a", "b"]


def test_unknown_flags_are_named_with_what_was_meant():
    assert "--share" in refused("--shaer", "1")
    assert refused("--zzz", "1").startswith("unknown flag --zzz")
    assert "pictures" in refused("pictures")
    assert "--level" in refused("--level")
    assert "--lev" in refused("--lev", "1"), "no abbreviations: a fork's new flag could change one"


def test_a_comment_is_the_help_and_may_be_absent(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A test." in text
    for setting in dataclasses.fields(Settings):
        assert f"--{setting.name} " in text
    for words in (
        "of something, in 100 % (from 0 to 1) [0.5]",
        "the comment on the line above (from -1 to 3) [2]",
        "--bare X [1.0]",
        "--also_bare X [3]",
        "--word X [none]",
        "on or off [false]",
        "or all (from 0 to 9, all) [0]",
        "where the value is on a line of its own "
        "(from 0 to 1, automatic, by_hand, not_at_all) [automatic]",
    ):
        assert words in text
    assert "belongs to nothing" not in text


@pytest.mark.parametrize("settings", [train.Config, infer.Options, ModelConfig])
def test_every_setting_of_the_kit_has_its_comment(settings):
    """ruff may move a value, and the comment behind it, to a line of its own."""
    helps = cli.field_help(settings)
    assert list(helps) == [one.name for one in dataclasses.fields(settings)]
    without = {name for name, comment in helps.items() if not comment.text}
    assert without <= {"precision"}
    assert not [comment.text for comment in helps.values() if comment.text.startswith("[")]


def test_limits_are_where_a_number_could_do_harm():
    for settings, name, low in (
        (train.Config, "folds", 2),
        (train.Config, "top", -1),
        (train.Config, "min_pixels", -1),
        (infer.Options, "threshold", 0),
        (infer.Options, "min_pixels", -1),
        (infer.Options, "batch_size", 0),
    ):
        assert cli.field_help(settings)[name].low == low
        with pytest.raises(UserError, match=f"--{name}"):
            cli.parse(settings, "", [f"--{name}", str(low - 1)])


def test_a_long_list_names_the_first_five_and_the_count():
    files = [f"p{number}.png" for number in range(84)]
    text = first_five(files)
    assert all(name in text for name in files[:5])
    assert "p5.png" not in text
    assert "84" in text
    assert first_five(files[:5]) == "p0.png, p1.png, p2.png, p3.png, p4.png"
    assert first_five(files[:2], " | ") == "p0.png | p1.png"


def test_only_a_users_mistake_loses_its_traceback(capsys):
    with pytest.raises(SystemExit) as done, one_line_errors():
        raise UserError("--data x", "not found", "name a folder")
    assert done.value.code == 2
    assert capsys.readouterr().err == "error: --data x: not found; name a folder\n"
    with pytest.raises(ZeroDivisionError), one_line_errors():
        print(1 / 0)


# --------------------------------------------------------------------------------------------------
#  ModelConfig and model.pt
# --------------------------------------------------------------------------------------------------

WRONG = [
    {"height": "64"},
    {"height": 64.0},
    {"height": 0},
    {"width": -32},
    {"width": 10**6},
    {"width": None},
    {"arch": 3},
    {"arch": None},
    {"class_names": ()},
    {"class_names": (1,)},
    {"class_values": (1.5,)},
    {"class_values": ("1", "2")},
    {"exclusive": 1},
    {"mean": (0.5, 0.5)},
    {"mean": (0.5, 0.5, "0.5")},
    {"mean": (0.5, 0.5, float("nan"))},
    {"std": (0.2, 0.2, 0.0)},
    {"std": (0.2, 0.2, 0.2, 0.2)},
    {"top": 0.95},
    {"top": -1.0},
    {"top": "auto"},
    {"tiles": "auto"},
    {"tiles": 1},
    {"tta": "true"},
    {"tta": 0},
    {"precision": 32},
    {"precision": "8"},
    {"temperature": 0.0},
    {"temperature": float("inf")},
    {"thresholds": (1.5,)},
    {"thresholds": (float("nan"),)},
    {"thresholds": (True,)},
    {"thresholds": (0.5, 0.5)},
    {"areas": (-1,)},
    {"areas": (2.5,)},
    {"areas": ()},
]


MANY_PLANES = {
    "class_names": tuple(f"class {number}" for number in range(1000)),
    "class_values": tuple(map(str, range(1000))),
    "thresholds": (0.5,) * 1000,
    "areas": (0,) * 1000,
}


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_a_model_config_refuses_wrong_types_and_ranges(values):
    (name,) = values
    words = "thresholds and minimum areas" if name in ("thresholds", "areas") else name
    with pytest.raises((ValueError, UserError), match=f"{name}|{words}"):
        ModelConfig(**values)


def test_a_model_config_takes_what_is_possible():
    assert ModelConfig() == ModelConfig(**dataclasses.asdict(ModelConfig()))
    for values in (
        {"height": 1, "width": 16384},
        {"top": 0, "thresholds": (0,), "temperature": 100},
        {"mean": (0, 0.5, 1), "std": (1, 1, 1)},  # whole numbers
        {"thresholds": (1,), "areas": (10**9,)},
        {"tiles": True, "tta": False, "precision": "bf16-mixed"},
        MANY_PLANES,
        MANY_PLANES | {"exclusive": True, "thresholds": (), "areas": ()},
    ):
        config = ModelConfig(**values)
        assert {name: getattr(config, name) for name in values} == values
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().height = 64


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return model.build_network(ModelConfig(encoder="resnet18"))


def save(path, network, settings=None, **changes):
    """Write a model.pt whose ModelConfig is changed; None takes a key away. Returns its path."""
    config = ModelConfig(encoder="resnet18", height=64, width=96)
    scores = {"all": {"MaxF": 90.0}}
    model.save_model(path, model.TrainedModel(network, config, settings or {}, scores))
    content = torch.load(path, weights_only=True)
    assert content["format"] == 3
    content["model"] |= {name: value for name, value in changes.items() if value is not None}
    for name in [name for name, value in changes.items() if value is None]:
        del content["model"][name]
    torch.save(content, path)
    return path


def test_a_model_file_gives_back_what_was_saved(network, tmp_path):
    trained = model.load_model(save(tmp_path / "model.pt", network), "cpu")
    assert trained.config == ModelConfig(encoder="resnet18", height=64, width=96)
    assert trained.metrics == {"all": {"MaxF": 90.0}}
    for name, value in network.state_dict().items():
        assert torch.equal(value, trained.network.state_dict()[name])


def test_a_missing_key_takes_its_default(network, tmp_path):
    """A model that was saved before a setting existed still loads."""
    without = {"temperature": None, "top": None, "mean": None, "precision": None}
    config = model.load_model(save(tmp_path / "model.pt", network, **without), "cpu").config
    assert (config.temperature, config.top, config.precision) == (3.0, 0.0, "auto")
    assert config.mean == (0.485, 0.456, 0.406)


def test_a_model_with_a_forks_setting_loads(network, tmp_path):
    """The settings of the training are for people: no table has to know them."""
    settings = dataclasses.asdict(train.Config()) | {"pos_weight": 2.0, "loss": "focal", "n": -7}
    path = save(tmp_path / "model.pt", network, settings)
    trained = model.load_model(path, "cpu")
    assert trained.settings == settings
    tuned = dataclasses.replace(trained.config, thresholds=(0.25,), areas=(9,))
    oof.export(trained._replace(config=tuned), tmp_path)
    again = model.load_model(path, "cpu")
    assert again.settings == settings
    assert (again.config.thresholds, again.config.areas) == ((0.25,), (9,))
    assert json.loads((tmp_path / "config.json").read_text())["pos_weight"] == 2.0


@pytest.mark.parametrize(
    "changes", [{"height": "64"}, {"thresholds": (7.0,)}, {"tta": 1}, {"unheard_of": 1}], ids=str
)
def test_a_damaged_model_file_is_refused_in_one_line(network, tmp_path, changes):
    path = save(tmp_path / "model.pt", network, **changes)
    with pytest.raises(UserError, match=r"model\.pt.*; train again") as caught:
        model.load_model(path, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [1, 2])
def test_an_earlier_format_is_refused_with_the_remedy(network, tmp_path, number):
    """The files of the kit's earlier versions, the first with `config` for inference too."""
    config = {"arch": "Unet", "encoder": "resnet18", "height": 64, "width": 96, "classes": 1}
    settings = {"model" if number == 2 else "config": config | {"threshold": 0.5}}
    content = {"format": number, "state_dict": network.state_dict(), "metrics": {}}
    torch.save(content | settings, tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"format 3.*has {number}.*train again") as caught:
        model.load_model(tmp_path / "model.pt", "cpu")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
#  Which run a checkpoint belongs to
# --------------------------------------------------------------------------------------------------

DEFAULTS = dataclasses.asdict(train.Config())
RUN = DEFAULTS | {"data": "here", "out": "out", "epochs": 3, "height": 64, "width": 96}
CODE, SAMPLES = {"train.py: loss": "digest"}, {"p0": [1, 0], "p1": [2, 1]}


def decide(out, settings, wanted="auto", defaults=DEFAULTS):
    """What --resume means for a run with these settings in a folder."""
    return resume.decide(Identity(settings, CODE, SAMPLES), str(wanted), out, out, defaults)


@pytest.fixture
def checkpoint(tmp_path):
    """The last.ckpt of a run of two epochs, as far as `resume.decide` looks at it."""
    clock = callbacks.Clock(3, 0.0, 0.0)
    callback = callbacks.TrainingCallback(tmp_path, tmp_path, clock, RUN, None)
    callback.identity = Identity(RUN, CODE, SAMPLES)
    callback.rows = [{"epoch": 1, "MaxF": 40.0}, {"epoch": 2, "MaxF": 60.0}]
    torch.save({"callbacks": {"TrainingCallback": callback.state_dict()}}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_the_same_run_is_resumed_with_its_rows_and_seconds(checkpoint, tmp_path):
    assert decide(tmp_path, RUN).checkpoint == checkpoint
    clock = callbacks.Clock(3, 0.0, 0.0)
    callback = callbacks.TrainingCallback(tmp_path, tmp_path, clock, RUN, None)
    callback.identity = Identity(RUN, CODE, SAMPLES)
    callback.find_checkpoint("auto", DEFAULTS)
    assert callback.checkpoint == checkpoint
    assert [row["epoch"] for row in callback.rows] == [1, 2]
    assert clock.earlier > 0 and clock.begun == 0


def test_the_schedule_starts_with_the_first_step_and_ends_with_the_minutes(tmp_path, monkeypatch):
    """Twenty of sixty seconds pass before the first step, ten are kept for the end."""
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    clock, reached = callbacks.Clock(0, 1.0, now[0]), []
    callback = callbacks.TrainingCallback(tmp_path, tmp_path, clock, RUN, None)
    callback.identity = Identity(RUN, CODE, SAMPLES)
    trainer = SimpleNamespace(
        current_epoch=0,
        global_step=0,
        num_training_batches=4,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    module = SimpleNamespace(set_progress=reached.append, device=torch.device("cpu"))
    callback.measure_step = lambda *_: None  # it would change what is kept
    clock.reserve = 10.0
    for index, seconds in enumerate((20, 35, 50)):
        now[0] = 100.0 + seconds
        callback.on_train_batch_start(trainer, module, {"name": ["a"]}, index)
    assert reached == [0.0, 0.5, 1.0] and trainer.should_stop
    assert callback.state_dict()["clock"] == (50.0, 20.0, 10.0)


def test_a_setting_that_the_checkpoint_lacks_counts_as_its_default(checkpoint, tmp_path):
    """A fork adds a setting and resumes what it trained before."""
    defaults = DEFAULTS | {"pos_weight": 1.0}
    for wanted in ("auto", checkpoint):
        decision = decide(tmp_path, RUN | {"pos_weight": 1.0}, wanted, defaults)
        assert decision.checkpoint == checkpoint
        with pytest.raises(UserError, match="--pos_weight") as caught:
            decide(tmp_path, RUN | {"pos_weight": 2.0}, wanted, defaults)
        assert "--resume none" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_setting_that_is_no_longer_there_is_no_obstacle(checkpoint, tmp_path):
    settings = {name: value for name, value in RUN.items() if name != "weight_decay"}
    defaults = {name: value for name, value in DEFAULTS.items() if name != "weight_decay"}
    assert decide(tmp_path, settings, defaults=defaults).checkpoint == checkpoint


def test_another_run_is_refused_with_the_names_of_its_flags(checkpoint, tmp_path):
    with pytest.raises(UserError, match="--seed.*--encoder|--encoder.*--seed") as caught:
        decide(tmp_path, RUN | {"encoder": "resnet18", "seed": 1})
    assert "--epochs" not in str(caught.value)


def test_what_does_not_change_the_weights_may_differ(checkpoint, tmp_path):
    changes = {"data": "there", "out": "other", "epochs": 9, "max_minutes": 5.0, "workers": 2}
    changes |= {"resume": str(checkpoint), "tta": False, "precision": "32"}
    assert decide(tmp_path, RUN | changes).checkpoint == checkpoint


def test_what_is_no_checkpoint_is_refused(network, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    save(tmp_path / "model.pt", network)
    for name in ("other.ckpt", "text.ckpt", "model.pt", "missing.ckpt"):
        with pytest.raises(UserError, match=f"--resume .*{name}"):
            decide(tmp_path, RUN, tmp_path / name)


def test_a_run_is_replayed_from_its_settings(roads, tmp_path):
    flags = ("--data", roads, "--epochs", 1, "--lr", "3e-3", *TINY)
    succeed("train.py", *flags, "--out", tmp_path / "a")
    recipe = tmp_path / "a" / "config.json"
    replay = ("train.py", "--config", recipe, "--out")
    succeed(*replay, tmp_path / "b")
    scores = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in "ab"]
    assert scores[0] == scores[1]
    succeed(*replay, tmp_path / "c", "--augment", 0)
    settings = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (settings["lr"], settings["augment"], settings["width"]) == (3e-3, 0, 96)
    content = json.loads(recipe.read_text())
    for changes, message in (
        ({"gamma": 2}, "has settings that there are not: gamma; take them out"),
        ({"height": "tall"}, "--height tall: takes a whole number"),
    ):
        recipe.write_text(json.dumps(content | changes))
        refused = run(*replay, tmp_path / "d")
        assert refused.returncode == 2
        assert message in refused.stderr
    recipe.write_text("[1")
    assert "name the config.json of a run" in run(*replay, tmp_path / "d").stderr
