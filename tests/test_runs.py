"""The table of runs: who is better, and whether that is more than chance."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, run, succeed

from kit.errors import UserError
from kit.extra import runs


def write_run(folder, dice, **settings):
    """A finished run whose images have these values of Dice, each of 2,000 foreground pixels."""
    folder.mkdir(parents=True)
    tp = (np.array(dice) * 2000).round().astype(int)  # fp = fn: Dice is tp / 2000
    rows = {"id": [f"i{n}" for n in range(len(tp))], "class": "foreground"}
    table = pd.DataFrame(rows | {"tp": tp, "fp": 2000 - tp, "fn": 2000 - tp})
    table.to_csv(folder / "scores.csv", index=False)
    pd.DataFrame({"epoch": [1, 2], "seconds": [60, 120]}).to_csv(
        folder / "metrics.csv", index=False
    )
    (folder / "config.json").write_text(json.dumps({"metric": "dice", "lr": 1e-3} | settings))


def test_a_difference_is_told_from_chance(tmp_path, capsys):
    dice = np.random.default_rng(0).uniform(0.6, 0.95, 50)
    noise = np.random.default_rng(1).normal(0, 0.02, 50)
    write_run(tmp_path / "a", dice)
    write_run(tmp_path / "b", dice + noise - noise.mean() - 0.001, dropout=0.1)
    write_run(tmp_path / "c", dice - 0.05 + noise, lr=1e-2)
    table = runs.compare([str(tmp_path / "?")], str(tmp_path / "table")).set_index("run")
    rows = [table.loc[str(tmp_path / name)] for name in "abc"]
    assert [row["Dice"] for row in rows] == sorted(table.Dice, reverse=True)
    assert rows[0]["Dice"] == pytest.approx(100 * dice.mean(), abs=0.02)
    assert rows[0]["error"] == pytest.approx(100 * dice.std(ddof=1) / 50**0.5, abs=0.02)
    assert rows[0]["to the best"] == "best"
    assert rows[1]["to the best"].startswith("no difference (-0.1")
    assert rows[2]["to the best"].startswith("-5.")
    assert {"lr", "dropout"} <= set(table.columns)
    assert (rows[2]["epochs"], rows[2]["minutes"]) == (2, 2.0)
    assert (tmp_path / "table" / "runs.png").stat().st_size > 5000
    assert pd.read_csv(tmp_path / "table" / "runs.csv").shape == (3, len(table.columns) + 1)
    assert "no difference" in capsys.readouterr().out


def test_runs_on_other_images_or_masks_are_marked_and_not_compared(tmp_path):
    write_run(tmp_path / "a", [0.9, 0.8, 0.85])
    write_run(tmp_path / "b", [0.9, 0.8])
    write_run(tmp_path / "c", [0.8, 0.7, 0.75])
    table = pd.read_csv(tmp_path / "c" / "scores.csv")
    table.fn += 7  # another ground truth
    table.to_csv(tmp_path / "c" / "scores.csv", index=False)
    table = runs.compare([str(tmp_path / "?")], str(tmp_path / "table"))
    assert sorted(table["to the best"]) == ["best", "other images", "other images"]


def test_the_leaderboard_is_typed_into_notes(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, [0.9, 0.8, 0.85])
    flags = [str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "table")
    assert list(runs.compare(*flags).leaderboard) == ["", ""]
    notes = tmp_path / "table" / "notes.csv"
    notes.write_text(notes.read_text().replace(f"{tmp_path}/b,", f"{tmp_path}/b,0.7312"))
    table = runs.compare(*flags).set_index("run")
    assert table.loc[str(tmp_path / "b"), "leaderboard"] == "0.7312"
    notes.write_text("a,b\n")
    with pytest.raises(UserError, match=r"notes\.csv: its columns are not run,leaderboard"):
        runs.compare(*flags)


def test_the_mean_of_the_pooled_f1_is_the_pooled_f1():
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([range(30), ["road"]], names=["id", "class"])
    pixels = pd.DataFrame(rng.integers(1, 900, (30, 3)), index, ["tp", "fp", "fn"])
    total = pixels.sum()
    pooled = 200 * total.tp / (2 * total.tp + total.fp + total.fn)
    assert runs.image_values(pixels, "F1").mean() == pytest.approx(pooled)
    empty = pd.DataFrame(0, index, ["tp", "fp", "fn"])
    assert (runs.image_values(empty, "Dice") == 100).all()


def test_two_trainings_are_compared(roads, tmp_path):
    for name in ("a", "b"):
        flags = ("--data", roads, "--epochs", 1, "--lr", f"1e-{ord(name) - 95}", *TINY)
        succeed("train.py", *flags, "--out", tmp_path / name)
    printed = succeed(
        "train.py", "--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "table"
    )
    assert "F1" in printed  # KITTI's metric
    assert " lr " in printed
    scores = pd.read_csv(tmp_path / "a" / "scores.csv")
    assert list(scores.columns) == ["id", "class", "tp", "fp", "fn"]
    measured = json.loads((tmp_path / "a" / "metrics.json").read_text())["mean"]["Dice"]
    dice = 2 * scores.tp / (2 * scores.tp + scores.fp + scores.fn)
    assert 100 * dice.mean() == pytest.approx(measured, abs=1e-3)
    refused = run("train.py", "--compare", tmp_path / "a", tmp_path / "x", "--out", tmp_path)
    assert refused.returncode == 2
    assert "1 runs; name two folders or more" in refused.stderr
    (tmp_path / "a" / "scores.csv").unlink()
    refused = run("train.py", "--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path)
    assert "is no finished run (FileNotFoundError" in refused.stderr
