"""The simulator's seconds follow from its counts and figures; the page holds what the command writes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.scale.__main__ import PAGE, main
from bench.scale.costs import GRAD_NORM, ROTATIONS, Method, Work, at_refresh, every_step, state
from bench.scale.machines import H100, Reached, all_reduce, exchange, sent
from bench.scale.report import page, short, written
from bench.scale.shapes import LLAMA_7B, LLAMA_70B
from bench.scale.simulate import GPUS, PERCENT, Setting, least_every, least_tokens, seconds, simulate, training_step

SETTING = Setting(H100)
ROTATION = Method(ROTATIONS, every=10, parts=4)


def test_a_training_steps_seconds_are_its_flops_over_the_reached_peak() -> None:
    setting = replace(SETTING, reached=Reached(training=0.5), tokens=1000)
    wanted = 1000 * LLAMA_7B.flops_per_token / (16 * 0.5 * 989.5e12)
    assert training_step(LLAMA_7B, 16, setting) == pytest.approx(wanted, rel=1e-12)
    # 6 per parameter that a token meets, and attention's half of all pairs, q·k and the mixing of values, forward and twice backward
    attention = 3 * 2 * (2 * 4096) * 4096 / 2 * 32
    assert LLAMA_7B.flops_per_token == 6 * (LLAMA_7B.parameters - LLAMA_7B.other - 32000 * 4096) + attention


def test_what_is_shared_out_falls_with_ranks_and_what_is_repeated_does_not() -> None:
    work = Work(products=1e15, own_factorisations=1e12, streamed=1e12, alone_products=1e13)
    few, many = seconds(work, 10, SETTING), seconds(work, 1000, SETTING)
    assert few["products"] == pytest.approx(1e14 / (67e12 * 0.7)) and many["products"] == pytest.approx(1e13 / (67e12 * 0.7))
    assert few["factorisations"] == many["factorisations"] == pytest.approx(1e12 / (67e12 * 0.1))
    assert few["memory"] == pytest.approx(100 * many["memory"])
    assert few["network"] == many["network"] == 0


def test_collectives_cost_nothing_alone_and_keep_to_the_slowest_link() -> None:
    reached = Reached(latency=0.0, message=0.0, network=1.0)
    assert all_reduce(H100, reached, 1e9, 1) == exchange(H100, reached, 1e9, 1) == 0
    assert all_reduce(H100, reached, 1e9, 8) == pytest.approx(2e9 * 7 / 8 / 450e9)
    assert all_reduce(H100, reached, 1e9, 64) == pytest.approx(2e9 * 63 / 64 / 400e9)
    assert exchange(H100, reached, 64e9, 64) == pytest.approx(sent(64e9, 64) / 50e9) == pytest.approx(63 / 64 / 50)


@pytest.mark.parametrize("method", [ROTATION, Method(GRAD_NORM, every=100), Method("Rotated", every=3, parts=3, layout="dealt")])
def test_a_refresh_is_spread_over_its_steps(method: Method) -> None:
    one = seconds(every_step(LLAMA_7B, method, 64), 64, SETTING)
    refresh = seconds(at_refresh(LLAMA_7B, method, 64), 64, SETTING)
    found = simulate(LLAMA_7B, method, 64, SETTING)
    assert found.seconds == pytest.approx({part: one[part] + refresh[part] / method.every for part in one})
    assert found.share == pytest.approx(sum(found.seconds.values()) / training_step(LLAMA_7B, 64, SETTING))


def test_the_least_k_and_the_least_tokens_are_where_the_share_falls_below_one_percent() -> None:
    least = least_every(LLAMA_7B, ROTATION, 512, SETTING)
    assert least is not None and least > 1
    shares = [simulate(LLAMA_7B, replace(ROTATION, every=k), 512, SETTING).share for k in (least - 1, least)]
    assert shares[1] < PERCENT <= shares[0]
    assert least_every(LLAMA_7B, Method("Rotated", hidden=True, max_side=11008), 512, SETTING) is None
    tokens = least_tokens(LLAMA_7B, ROTATION, 64, SETTING)
    at, below = (simulate(LLAMA_7B, ROTATION, 64, replace(SETTING, tokens=n)).share for n in (tokens, tokens - 2))
    assert at <= PERCENT < below


def test_state_lies_on_every_rank_in_shards_and_on_one_where_it_is_dealt() -> None:
    shards, dealt = Method("Rotated", max_side=8192), Method("Rotated", max_side=8192, layout="dealt")
    assert simulate(LLAMA_70B, shards, 4096, SETTING).state == state(LLAMA_70B, shards)
    assert simulate(LLAMA_70B, dealt, 8, SETTING).state == state(LLAMA_70B, dealt) / 8
    # no rank has less than a matrix with its bases: 8192² and 448 of 64² twice over
    assert simulate(LLAMA_70B, dealt, 4096, SETTING).state == 8 * (8192**2 + 448 * 64**2)


def test_figures_have_two_digits_and_no_exponent() -> None:
    assert [short(x) for x in (0.0, 0.00123, 2.345, 99.6, 12345.0)] == ["0", "0.0012", "2.3", "100", "12,000"]


def test_the_page_is_what_the_command_writes() -> None:
    text = PAGE.read_text()
    assert written(text, page()) == text, "docs/scale.md is older than the simulator: python -m bench.scale --write"
    with pytest.raises(ValueError, match="must hold"):
        written("# no marks", "")


def test_the_command_prints_a_table_and_refuses_an_impossible_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "7B", "--gpus", "8,64", "--every", "3,10"]) == 0
    printed = capsys.readouterr().out
    assert "| 8 GPUs | 64 GPUs |" in printed and "70.55B" not in printed
    assert main(["--training", "1.5"]) == 2
    assert "training must be in (0, 1], got 1.5" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        simulate(LLAMA_7B, ROTATION, 0, SETTING)
    assert max(GPUS) == 4096
