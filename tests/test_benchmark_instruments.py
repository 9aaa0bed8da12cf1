"""What the benchmarks measure with: memory, timing, devices and ceilings."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks import cases, ceilings, devices, memory, timing
from benchmarks.timing import Block, Spread

MIB = memory.MIB


@pytest.fixture
def cpu():
    return devices.Cpu()


def test_memory_meter_counts_known_allocations():
    def three_tensors():
        first = torch.empty(4 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(3 * MIB, dtype=torch.uint8)
        return second, third

    assert memory.peak_memory(three_tensors) == 6 * MIB


def test_memory_meter_sees_backward_and_is_the_same_every_time():
    x = torch.ones(MIB, requires_grad=True)  # 4 MiB

    def step():
        x.grad = None
        (x * x).sum().backward()

    peak = memory.peak_memory(step)
    # The product; then, when it is released, the gradients 2x in the making.
    assert 8 * MIB <= peak <= 17 * MIB
    x.grad = None
    assert memory.peak_memory(step) == peak


def test_memory_meter_credits_no_release_of_what_lived_before():
    held = [torch.empty(8 * MIB, dtype=torch.uint8)]

    def swap():
        held.clear()
        held.append(torch.empty(MIB, dtype=torch.uint8))

    assert memory.peak_memory(swap) == MIB


def test_memory_meter_sees_what_the_compiled_operators_allocate(compiled):
    from ehrseq_fast import visit_mean_pool

    codes, weight = torch.ones(1024, 4, dtype=torch.int64), torch.ones(2, 256)
    pooled_bytes = 1024 * 256 * 4
    peak = memory.peak_memory(lambda: visit_mean_pool(codes, weight))
    assert pooled_bytes <= peak < 1.5 * pooled_bytes


def test_what_does_not_fit_is_left_out_and_says_so(cpu):
    assert cases.fits(1, cpu) is None
    assert "GiB are free" in cases.fits(2**50, cpu).reason


def test_spread_gives_median_and_quartiles():
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.lower, spread.median, spread.upper, spread.count) == (2.0, 3.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_plan_times_quick_variants_more_often_within_the_budget():
    planned = timing.plan({"slow": 4.0, "quick": 0.4, "instant": 1e-6}, 60.0)
    assert planned.blocks == {
        "slow": Block(untimed=1, timed=2),
        "quick": Block(untimed=1, timed=5),
        "instant": Block(timing.MOST_UNTIMED, timing.MOST_TIMED),
    }
    assert planned.rounds == 4  # of 12 + 2.4 s
    assert timing.plan({"slow": 100.0}, 1.0).rounds == 1
    assert timing.plan({"instant": 1e-6}, 60.0).rounds == timing.MOST_ROUNDS


def test_plan_shortens_blocks_for_a_second_round():
    assert timing.plan({"slow": 4.0}, 24.0) == timing.Plan(2, {"slow": Block(1, 2)}, 24.0)
    assert timing.plan({"slow": 4.0}, 23.0) == timing.Plan(2, {"slow": Block(1, 1)}, 23.0)
    assert timing.plan({"slow": 4.0}, 9.0) == timing.Plan(1, {"slow": Block(1, 1)}, 9.0)


def in_seconds(name, run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_blocks_alternate_and_change_which_begins_their_first_calls_untimed():
    ran: list[str] = []
    variants = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    blocks = {"a": Block(1, 1), "b": Block(2, 2), "c": Block(1, 1)}
    heard: list[str] = []
    samples = timing.alternating_blocks(
        variants,
        timing.Plan(3, blocks),
        in_seconds,
        untimed=lambda name, run: ran.append(f"({name})"),
        after_each=heard.append,
    )
    a, b, c = "(a)a", "(b)(b)bb", "(c)c"
    assert "".join(ran) == a + b + c + b + c + a + c + a + b
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 6, "c": 3}
    assert "".join(heard) == "abbc" + "bbca" + "cabb"


def test_what_the_variant_before_left_behind_is_not_timed():
    last = [""]

    def variant(name):
        def run():
            time.sleep(0.05 if last[0] != name else 0.0)
            last[0] = name

        return run

    planned = timing.Plan(2, {"a": Block(1, 2), "b": Block(1, 2)})
    samples = timing.alternating_blocks({n: variant(n) for n in "ab"}, planned, in_seconds)
    assert max(samples["a"] + samples["b"]) < 0.05
    last[0] = ""
    without = timing.Plan(2, {"a": Block(0, 1), "b": Block(0, 1)})
    samples = timing.alternating_blocks({n: variant(n) for n in "ab"}, without, in_seconds)
    assert min([*samples["a"], samples["b"][0]]) >= 0.05  # the second round begins with b


def test_blocks_keep_to_the_budget():
    planned = timing.Plan(1000, {"nap": Block(1, 1)}, budget_s=0.2)
    samples = timing.alternating_blocks({"nap": lambda: time.sleep(0.02)}, planned, in_seconds)
    assert 1 <= len(samples["nap"]) < 10
    assert min(samples["nap"]) >= 0.02
    over = timing.Plan(5, {"nap": Block(1, 1)}, budget_s=0.0)
    assert len(timing.alternating_blocks({"nap": lambda: None}, over, in_seconds)["nap"]) == 1


def test_a_budget_passes_on_what_is_left_and_ends_where_it_ends():
    now = [0.0]
    budget = timing.Budget(100.0, lambda: now[0])
    assert budget.share(1, of=4).left == 25
    now[0] = 5.0  # the first part took 5 of its 25
    assert budget.share(1, of=3).left == pytest.approx(95 / 3)
    now[0] = 90.0  # the second overdrew
    assert budget.share(1, of=2).left == 5
    now[0] = 101.0
    assert budget.left == 0


def test_the_caches_are_emptied_through_more_than_they_hold(cpu):
    cpu.cache_bytes = 1024
    cpu.time(lambda: None, cold=True)
    assert cpu._stream.nbytes == 4 * 1024
    assert devices.last_level_cache() >= 2**20


def test_cuda_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="no GPU"):
        devices.device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_timed_captured_and_weighed():
    gpu = devices.device("cuda")
    x = torch.ones(2**20, device="cuda")
    taken = gpu.time(lambda: x * 2, cold=True)
    assert 0 < taken.seconds < 0.1
    assert taken.host > 0
    assert gpu.peak_memory(lambda: x * 2) == x.nbytes
    y = torch.zeros(1, device="cuda")
    replay = gpu.captured(lambda: y.add_(1))
    before = float(y)
    replay()
    assert float(y) == before + 1
    assert gpu.why_it_waits(lambda: x * 2) is None
    assert gpu.why_it_waits(lambda: x.sum().item()) is not None


def test_ceilings_are_measured_and_make_floors(cpu):
    found = ceilings.measure(cpu, quick=True)
    assert found.copy > 1e8
    assert found.cached_read > 1e8
    assert found.product["float32"] > 1e8
    assert 0 < found.empty_call_s < 1e-3
    large = ceilings.Work(bytes=1e9, working_set=1e12)
    assert found.floor(large) == pytest.approx(1e9 / found.copy)
    small = replace(large, working_set=1)
    assert found.floor(small) == pytest.approx(1e9 / found.cached_read)
    once = replace(small, working_set=1e6)
    again = (1e9 - 1e6) / found.cached_read
    assert found.floor(once, cold=True) == pytest.approx(1e6 / found.copy + again)
    assert found.floor(ceilings.Work()) == found.empty_call_s
    product = ceilings.Work(flops=1e12, dtype="bfloat16")
    assert found.floor(product) == pytest.approx(1e12 / found.product["bfloat16"])
