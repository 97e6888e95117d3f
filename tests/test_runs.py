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


def seed_noise(count, images=60, chance=0.01, seed=0):
    """Dice of so many trainings that differ in the seed alone: chance of each and its images."""
    rng = np.random.default_rng(seed)
    dice = rng.uniform(0.6, 0.9, images)
    return [dice + rng.normal(0, chance) + rng.normal(0, 0.01, images) for _ in range(count)]


def test_runs_that_differ_in_the_seed_alone_are_never_better_or_worse(tmp_path):
    for pair, dice in enumerate(zip(*[iter(seed_noise(40))] * 2, strict=True)):
        folder = tmp_path / str(pair)
        tops = {"why": {"top": "down to the highest mask"}}  # of another split
        for seed, values in enumerate(dice):
            write_run(folder / f"seed{seed}", values, seed=seed, top=0.4 + seed / 10, **tops)
        table = runs.compare([str(folder / "*")], str(tmp_path / "table"))
        told = table["to the best"].tolist()
        assert told[0] == "best"
        assert told[1].startswith("other seed (-")
    write_run(tmp_path / "again", dice[1], seed=1, top=0.5, **tops)
    again = [str(tmp_path / "19" / "seed1"), str(tmp_path / "again")]
    table = runs.compare(again, str(tmp_path / "table"))
    assert table["to the best"][1] == "same settings (+0.00 ± 0.00)"


def test_the_chance_of_a_training_is_part_of_each_difference(tmp_path, capsys):
    gain = 0.015
    for seed, values in enumerate(seed_noise(8, seed=1)):
        kind = "ab"[seed % 2]  # b is as good as a, c is worse
        write_run(tmp_path / f"{kind}{seed}", values, seed=seed, augment="ab".index(kind))
        write_run(tmp_path / f"c{seed}", values - 5 * gain, seed=seed, augment=2)
    table = runs.compare([str(tmp_path / "??")], str(tmp_path / "table"))
    best = table.run[0][-2]
    alike = table[table.run.str.contains(r"/[ab]\d$")]["to the best"][1:]
    own = table.run[alike.index].str[-2] == best
    assert alike[own].str.startswith("other seed").all()
    assert alike[~own].str.startswith("no difference").all()
    worse = table[table.run.str.contains(r"/c\d$")]["to the best"]
    assert worse.str.match(r"-\d").all()
    assert "from 13 repetitions with another seed" in capsys.readouterr().out
    chance, freedom = runs.training_chance(
        [runs.read_run(path) for path in sorted(tmp_path.glob("[ab]?"))], "Dice"
    )
    assert freedom == 6
    assert 0.7 < chance < 3  # drawn with one point, of eight runs
    pair = [str(tmp_path / "a0"), str(tmp_path / "c0")]
    runs.compare(pair, str(tmp_path / "pair"))
    assert "one seed each: repeat the best with --seed 1" in capsys.readouterr().out


def test_few_repetitions_and_many_runs_make_the_chance_larger(tmp_path):
    for seed, shift in enumerate((0.0, 0.02)):
        write_run(tmp_path / f"a{seed}", np.linspace(0.6, 0.9, 30) + shift, seed=seed)
        write_run(tmp_path / f"b{seed}", np.linspace(0.6, 0.9, 30) + shift, seed=seed, lr=1)
    read = [runs.read_run(path) for path in sorted(tmp_path.glob("??"))]
    spread = 2 / 2**0.5
    chance, freedom = runs.training_chance(read[:2], "Dice")
    assert (freedom, chance > 6 * spread) == (1, True)
    chance, freedom = runs.training_chance(read, "Dice")
    assert (freedom, 3 * spread < chance < 5 * spread) == (2, True)
    assert runs.training_chance([read[0], read[0], read[2]], "Dice") == (0.0, 0)  # the same seed


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
