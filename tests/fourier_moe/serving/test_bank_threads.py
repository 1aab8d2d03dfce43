"""A bank that threads and tasks share: every answer is that of its own adapters, while others come and go."""

import asyncio
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.models import Tower, Transformer, config, tokens
from support.threads import THREADS, together
from torch import nn

from fourier_moe import FourierMoEConfig, LoRAConfig, inject, save_adapter
from fourier_moe.serving.bank import AdapterBank

NAMES = ["a", "b", None]


def adapter(directory, model, settings, seed):
    inject(model, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    return save_adapter(model, directory)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    settings = {
        "a": config(head=["classifier"]),
        "b": LoRAConfig(targets=["q_proj", "out_proj"], r=2, head=["classifier"]),
        "c": config(targets=["k_proj", "v_proj"], head=["classifier"]),
    }
    return {name: adapter(root / name, Transformer(), own, seed) for seed, (name, own) in enumerate(settings.items())}


@pytest.fixture
def bank(directories):
    bank = AdapterBank(Transformer())
    for name in ("a", "b"):
        bank.load(name, directories[name])
    return bank


def answer(bank, names, x):
    with torch.no_grad(), bank.per_example(names):
        return bank.model(x)


def requests(number):
    """Names and inputs of mixed batches."""
    names = [[NAMES[(number + row * step) % 3] for row in range(5)] for step in range(3)]
    return [(own, tokens(5, 3, 16, seed=10 * number + step)) for step, own in enumerate(names)]


def test_mixed_batches_of_eight_threads_are_answered_as_by_one(bank):
    expected = {number: [answer(bank, *request) for request in requests(number)] for number in range(THREADS)}

    def serve(number):
        return [[answer(bank, *request) for request in requests(number)] for _ in range(8)]

    rounds = together(serve)
    wrong = sum(
        not torch.equal(output, right)
        for number, served in enumerate(rounds)
        for outputs in served
        for output, right in zip(outputs, expected[number], strict=True)
    )
    assert wrong == 0


@pytest.mark.parametrize("change", ["load", "unload"])
@pytest.mark.parametrize("part", ["layers.0.attention.q_proj", "classifier"])
def test_what_is_activated_while_a_layer_asks_is_what_it_gives(directories, monkeypatch, change, part):
    """In passes through parts of the model, which are not tied to the adapter that they begin with."""
    bank, x = AdapterBank(Transformer()), tokens(2, 16)
    bank.load("a", directories["a"])
    bank.activate("a")
    if change == "unload":
        bank.load("b", directories["b"])
    layer = bank.model.get_submodule(part)
    with torch.no_grad():
        old = layer(x)
        ask = bank._selection.groups

        def meanwhile(*arguments):
            monkeypatch.setattr(bank._selection, "groups", ask)
            if change == "unload":
                groups = ask(*arguments)
                bank.activate("b")
                bank.unload("a")
                return groups
            bank.load("b", directories["b"])
            bank.activate("b")
            return ask(*arguments)

        monkeypatch.setattr(bank._selection, "groups", meanwhile)
        given, new = layer(x), layer(x)
    assert torch.equal(given, old if change == "unload" else new)
    assert not torch.equal(old, new)


def test_nobody_notices_that_adapters_are_loaded_and_unloaded(bank, directories):
    x = tokens(4, 3, 16)
    choices = [["a", "b", None, "a"], ["b"] * 4, [None] * 4, ["a"] * 4]
    expected = [answer(bank, names, x) for names in choices]
    bank.load("c", directories["c"])
    of_c = answer(bank, ["c"] * 4, x)
    bank.unload("c")
    done = threading.Event()

    def work(number):
        if number:
            count = 0
            while not (done.is_set() and count > 20):
                assert torch.equal(answer(bank, choices[number % 4], x), expected[number % 4])
                count += 1
            return
        try:
            for _ in range(8):
                bank.load("c", directories["c"])
                assert torch.equal(answer(bank, ["c"] * 4, x), of_c)
                bank.unload("c")
        finally:
            done.set()

    together(work, 4)
    assert bank.names == ("a", "b")
    assert bank._selection.open_choices == bank._selection._passes == set()


def test_fused_attention_is_split_and_fused_under_running_passes(tmp_path):
    def tower():
        return Tower().float().eval()

    settings = FourierMoEConfig(targets=["q_proj", "linear1"], num_coefficients=32, num_experts=2, head=["head"])
    directory = adapter(tmp_path / "a", tower(), settings, 0)
    bank, x, done = AdapterBank(tower()), torch.randn(3, 4, 16), threading.Event()
    with torch.no_grad():
        plain = bank.model(x)

    def work(number):
        if number:
            while not done.is_set():
                torch.testing.assert_close(answer(bank, [None] * 3, x), plain)
            return
        try:
            for _ in range(6):
                bank.load("a", directory)
                assert not torch.allclose(answer(bank, ["a"] * 3, x), plain, atol=1e-3)
                bank.unload("a")
        finally:
            done.set()

    together(work, 3)
    assert str(bank.model) == str(tower())
    with torch.no_grad():
        assert torch.equal(bank.model(x), plain)


class Slow(nn.Module):
    """Two projections, between which another thread may do something."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = lambda: None

    def forward(self, x):
        x = self.first(x)
        self.between()
        return self.second(x)


def test_a_pass_keeps_the_active_adapter_that_it_began_with(tmp_path):
    bank, x = AdapterBank(Slow()), torch.randn(2, 8)
    for seed, name in enumerate("ab"):
        bank.load(name, adapter(tmp_path / name, Slow(), LoRAConfig(targets=["first", "second"], r=2), seed))

    def change():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(bank.activate, "b").result()
            with pytest.raises(ValueError, match="'a' is active"):  # by the running pass
                pool.submit(bank.unload, "a").result()

    with torch.no_grad():
        with bank.using("a"):
            of_a = bank.model(x)
        with bank.using("b"):
            of_b = bank.model(x)
        bank.activate("a")
        bank.model.between = change
        assert torch.equal(bank.model(x), of_a)
        bank.model.between = lambda: None
        assert torch.equal(bank.model(x), of_b)
    assert not torch.allclose(of_a, of_b)
    bank.unload("a")


def test_a_thread_that_chose_nothing_is_refused_while_another_has_chosen(bank):
    x = tokens(2, 3, 16)
    expected = answer(bank, ["a", "b"], x)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        with bank.per_example(["a", "b"]):
            for run in (bank.model, bank.model.layers):
                with pytest.raises(ValueError, match=r"this thread has chosen no adapter, .*copy_context\(\)\.run"):
                    pool.submit(run, x).result()
            handed_over = contextvars.copy_context()

            def disabled():
                with bank.disabled():
                    return bank.model(x)

            plain = pool.submit(disabled).result()
            with torch.inference_mode():
                assert torch.equal(pool.submit(handed_over.run, bank.model, x).result(), expected)
        assert torch.equal(pool.submit(bank.model, x).result(), plain)
        with pytest.raises(ValueError, match=r"was started inside `per_example`.* has ended"):
            pool.submit(handed_over.run, bank.model, x).result()


def test_asyncio_tasks_choose_apart(bank):
    x = tokens(5, 3, 16)
    expected = [answer(bank, names, x) for names, _ in requests(0)]

    async def serve(names):
        with bank.per_example(names):
            await asyncio.sleep(0)
            output = bank.model(x)
            await asyncio.sleep(0)
            return output

    async def run():
        return await asyncio.gather(*(serve(names) for names, _ in requests(0) * 3))

    with torch.no_grad():
        outputs = asyncio.run(run())
    assert all(torch.equal(*pair) for pair in zip(outputs, expected * 3, strict=True))


def test_two_banks_and_a_copied_model_choose_apart(bank, directories):
    other, x = AdapterBank(Transformer()), tokens(2, 3, 16)
    other.load("a", directories["c"])
    alone = [answer(bank, ["a", "a"], x), answer(other, ["a", "a"], x)]
    copied = copy.deepcopy(bank.model)
    with torch.no_grad(), bank.using("a"), other.using("a"):
        assert torch.equal(bank.model(x), alone[0])
        assert torch.equal(other.model(x), alone[1])
    bank.activate("b")
    with torch.no_grad():
        assert torch.equal(copied(x), answer(bank, [None, None], x))


def test_an_error_in_a_pass_leaves_nothing_chosen(bank):
    bank.activate("a")
    with pytest.raises(RuntimeError):
        bank.model(tokens(2, 3, 7))
    assert bank._selection._passes == set()
    bank.activate(None)
    bank.unload("a")


def test_data_parallel_is_refused(bank):
    for module in (bank.model.layers[0].attention.q_proj, bank.model.classifier):
        with pytest.raises(ValueError, match="DataParallel would separate the examples from their names"):
            module._replicate_for_data_parallel()
