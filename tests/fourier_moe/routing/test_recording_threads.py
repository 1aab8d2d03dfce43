"""`recording` in threads and tasks: each sees its own tokens, the statistics count all of them."""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.models import Transformer, balance, config, randomize, router, tokens
from support.threads import THREADS, together

from fourier_moe import StatisticsReader, adapters, balance_loss, inject, recording

N = 6


def test_balance_losses_and_gradients_of_eight_threads_are_those_of_each_alone():
    model = Transformer()
    inject(model, config(balance_weight=0.3))
    randomize(model, 0.5)
    batches = [tokens(2, 3 + number, 16, seed=number) for number in range(THREADS)]
    masks = [torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.3 for x in batches]
    weights = [layer.router.weight for layer in adapters(model).values()]

    def step(number):
        with recording(model, masks[number]):
            model.layers(batches[number])
            loss = balance_loss(model)
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    alone = [step(number) for number in range(THREADS)]
    results = together(lambda number: [step(number) for _ in range(10)])
    wrong = [
        number
        for number, steps in enumerate(results)
        for result in steps
        if not all(torch.equal(a, b) for a, b in zip(result, alone[number], strict=True))
    ]
    assert wrong == []


def test_readers_count_every_token_of_eight_threads():
    layer = router()
    reader = StatisticsReader(layer)

    def step(number):
        for round_ in range(20):
            with recording(layer, None, [f"{number}", f"{round_ % 3}"]):
                layer(tokens(2, 5, N, seed=number))

    together(step)
    statistics = reader.read()[""]
    assert int(statistics.tokens) == THREADS * 20 * 10
    assert {int(statistics.by_task[f"{number}"].tokens) for number in range(3, THREADS)} == {100}
    assert layer.record.num_recordings == 0
    reader.close()
    assert layer.record.total is None


def test_a_thread_of_its_own_has_no_recording_and_a_copied_context_has():
    layer, x = router(), tokens(5, N)
    with recording(layer):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(layer, x).result()
            with pytest.raises(RuntimeError, match="saw no tokens"):
                layer.balance_loss()
            pool.submit(contextvars.copy_context().run, layer, x).result()
        inside = layer.balance_loss()
    assert torch.equal(inside, balance(layer, x))


def test_asyncio_tasks_keep_theirs_apart_and_outlive_the_recording_they_were_started_in():
    layer = router()
    expected = [balance(layer, tokens(4, N, seed=number)) for number in range(THREADS)]

    async def step(number):
        with recording(layer):
            await asyncio.sleep(0)
            layer(tokens(4, N, seed=number))
            await asyncio.sleep(0)
            return layer.balance_loss()

    async def later(closed):
        await closed.wait()
        layer(tokens(4, N))  # must not enter the closed recording
        with pytest.raises(RuntimeError, match="saw no tokens"):
            layer.balance_loss()
        return await step(0)

    async def run():
        losses = await asyncio.gather(*(step(number) for number in range(THREADS)))
        closed = asyncio.Event()
        with recording(layer):
            task = asyncio.create_task(later(closed))
            await asyncio.sleep(0)
        closed.set()
        return [*losses, await task]

    losses = asyncio.run(run())
    assert all(torch.equal(*pair) for pair in zip(losses, [*expected, expected[0]], strict=True))


def test_of_nested_recordings_the_inner_one_gets_the_tokens_of_its_routers():
    model = torch.nn.Sequential(router(), router(seed=1))
    first, second = tokens(5, N), tokens(9, N, seed=1)
    with recording(model):
        model[0](first)
        with recording(model[1], torch.ones(9)):
            model[0](second)
            model[1](second)
            inner = model[1].balance_loss()
        outer = model[0].balance_loss()
        with pytest.raises(RuntimeError, match="saw no tokens"):
            model[1].balance_loss()
        model[1](first)
        assert torch.equal(model[1].balance_loss(), balance(model[1], first))
    assert torch.equal(inner, balance(model[1], second))
    torch.testing.assert_close(outer, balance(model[0], torch.cat([first, second])))


def test_data_parallel_is_refused_while_recording():
    layer = router()
    with recording(layer), pytest.raises(ValueError, match=r"DataParallel .* use DistributedDataParallel"):
        layer._replicate_for_data_parallel()
    assert isinstance(layer._replicate_for_data_parallel(), type(layer))  # evaluation has nothing to record
