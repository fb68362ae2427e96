import pytest

from edgebolt.common.federated import common_target, read_rounds, time_to


def rows(values, name="val_acc"):
    """A round every 10 s with 3 bytes up and 5 down; None: not measured."""
    table = []
    for number, value in enumerate(values):
        end = number + 1
        row = {"round": number, "round/sim_time": 10.0 * end, "bytes_up_total": 3 * end, "bytes_down_total": 5 * end}
        table.append(row if value is None else {**row, name: value})
    return table


def write(folder, text):
    path = folder / "rounds.csv"
    path.write_text(text, encoding="utf-8")
    return path


# reading


def test_a_file_its_folder_and_its_rows_are_the_same(tmp_path):
    path = write(tmp_path, "round,round/sim_time,val_acc\n0,1.5,\n1,3.0,0.25\n")
    expected = [{"round": 0, "round/sim_time": 1.5}, {"round": 1, "round/sim_time": 3.0, "val_acc": 0.25}]
    for rounds in (path, str(path), tmp_path, expected):
        assert read_rounds(rounds) == expected
    assert [type(cell) for cell in read_rounds(path)[1].values()] == [int, float, float]


def test_rows_are_copied():
    table = rows([0.5])
    read_rounds(table)[0]["val_acc"] = 0.0
    assert table[0]["val_acc"] == 0.5


def test_numbers_keep_their_kind(tmp_path):
    path = write(tmp_path, "a,b,c,d\n-3,-inf,1e-05,9007199254740993\n")
    assert read_rounds(path) == [{"a": -3, "b": -float("inf"), "c": 1e-05, "d": 9007199254740993}]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rounds\.csv"):
        read_rounds(tmp_path / "rounds.csv")


# time to a target


def test_the_target_is_reached_by_the_mean_of_three():
    table = rows([0.9, 0.3, 0.3, 0.6, 0.75, 0.75, 0.9])  # means from the third on: 0.5 0.4 0.55 0.7 0.8
    assert time_to(table, "val_acc", 0.5) == (2, 30.0, 24)
    assert time_to(table, "val_acc", 0.56) == (5, 60.0, 48)
    assert time_to(table, "val_acc", 0.79) == (6, 70.0, 56)
    assert time_to(table, "val_acc", 0.81) is None  # 0.9 once is not enough


def test_fewer_than_three_measurements_reach_nothing():
    assert time_to(rows([0.9, 0.9]), "val_acc", 0.1) is None
    assert time_to(rows([0.9, 0.9, 0.9]), "val_acc", 0.1) == (2, 30.0, 24)


def test_rounds_without_a_measurement_are_passed_over():
    table = rows([None, 0.6, None, 0.6, None, 0.6, None])
    assert time_to(table, "val_acc", 0.5) == (5, 60.0, 48)


def test_a_loss_is_reached_from_above():
    table = rows([3.0, 2.0, 1.0, 0.0], name="val_loss")
    assert time_to(table, "val_loss", 2.0, mode="min") == (2, 30.0, 24)
    assert time_to(table, "val_loss", 1.5, mode="min") == (3, 40.0, 32)
    assert time_to(table, "val_loss", 0.9, mode="min") is None


def test_nan_reaches_nothing():
    assert time_to(rows([float("nan")] * 4), "val_acc", 0.0) is None


def test_a_file_will_do(tmp_path):
    head = "round,round/sim_time,bytes_up_total,bytes_down_total,val_acc\n"
    path = write(tmp_path, head + "".join(f"{n},{n}.0,{n},{n},0.5\n" for n in range(4)))
    assert time_to(path, "val_acc", 0.5) == time_to(tmp_path, "val_acc", 0.5) == (2, 2.0, 4)


@pytest.mark.parametrize(
    ("metric", "mode", "message"),
    [("val_f1", "max", r"'val_f1' is in no round.*'val_acc'"), ("val_acc", "best", "mode='best'")],
)
def test_bad_arguments_are_refused(metric, mode, message):
    with pytest.raises(ValueError, match=message):
        time_to(rows([0.5] * 3), metric, 0.5, mode=mode)


# a target for several runs


def test_the_common_target_is_what_the_weakest_run_reaches():
    runs = {"fast": rows([0.5, 0.7, 0.9, 0.9]), "slow": rows([0.3, 0.6, 0.6, 0.3])}
    target = common_target(runs)
    assert target == pytest.approx(0.5)
    assert [time_to(table, "val_acc", target)[0] for table in runs.values()] == [2, 2]
    losses = {"a": rows([3.0, 2.0, 1.0, 0.5], "loss"), "b": rows([3.0, 3.0, 3.0], "loss")}
    assert common_target(losses, "loss", mode="min") == 3.0


def test_a_common_target_needs_runs_that_are_long_enough():
    with pytest.raises(ValueError, match=r"3 measurements.*\['short'\]"):
        common_target({"long": rows([0.5] * 3), "short": rows([0.5] * 2)})
    with pytest.raises(ValueError, match="3 measurements"):
        common_target({})
