"""Both commands run end to end on tiny settings, and the methods that are compared are the same function. No test of speed."""

import csv
import json
import math
import os
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks import adapters as adapters_command
from benchmarks import scaling as scaling_command
from benchmarks.flops import count_flops, product_backward_flops, product_forward_flops
from benchmarks.methods import adapt, usable_methods
from benchmarks.models import MODELS, build_model, copy_with_shared_backbone, make_batch
from benchmarks.routing import BalancedRouter
from benchmarks.steps import Setting, Trial
from benchmarks.timing import paired_ratio, time_interleaved
from fourier_moe import TopKRouter, recording
from fourier_moe.spectral.kernels import OPT_IN
from fourier_moe.spectral.product import routed_spectral_product

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapters")
    adapters_command.main(["--model", "tiny", "--repeats", "3", "--threads", "1", "--output", str(output)])
    return output


@pytest.mark.slow
def test_table_holds_every_method_with_finite_positive_numbers(table: Path) -> None:
    methods = json.loads((table / "results.json").read_text())["methods"]
    assert list(methods) == usable_methods("cpu")
    for method in methods.values():
        for column in ("training_step", "inference"):
            assert len(method[column]["samples"]) == 3
            assert all(math.isfinite(value) and value > 0 for value in method[column]["samples"])
        assert method["peak_memory"] > 0
        assert method["flops_per_step"] > methods["head_only"]["flops_per_step"] or method is methods["head_only"]
        assert method["trained_parameters"]["head"] == 64 * 64 + 64 + 64 * 2 + 2


@pytest.mark.slow
def test_table_ratios_are_medians_of_the_rounds_ratios(table: Path) -> None:
    methods = json.loads((table / "results.json").read_text())["methods"]
    for reference in ("lora", "head_only"):
        for method in methods.values():
            for column in ("training_step", "inference"):
                pairs = zip(method[column]["samples"], methods[reference][column]["samples"], strict=True)
                assert method["ratios"][reference][column]["median"] == pytest.approx(median(a / b for a, b in pairs))
            expected = method["peak_memory"] / methods[reference]["peak_memory"]
            assert method["ratios"][reference]["peak_memory"] == pytest.approx(expected)


@pytest.mark.slow
def test_table_counts_each_method_s_parameters(table: Path) -> None:
    counts = {m: v["trained_parameters"] for m, v in json.loads((table / "results.json").read_text())["methods"].items()}
    projections, n, routers = 4, 64, 4 * 64
    assert counts["head_only"]["adapters"] == counts["head_only"]["router"] == 0
    assert counts["lora"]["adapters"] == projections * 8 * (64 + 64)
    assert counts["fourierft"]["adapters"] == projections * n
    assert counts["fourier_moe"] == counts["dense"]
    assert (counts["fourier_moe"]["adapters"], counts["fourier_moe"]["router"]) == (projections * n, projections * routers)


@pytest.mark.slow
def test_markdown_table_has_a_row_per_method(table: Path) -> None:
    lines = [line for line in (table / "results.md").read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == usable_methods("cpu")


@pytest.mark.slow
def test_machine_and_setting_are_stored(table: Path) -> None:
    results = json.loads((table / "results.json").read_text())
    assert results["setting"]["model"] == "tiny"
    assert {"torch", "peft"} <= results["machine"]["versions"].keys()
    assert results["rounds"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "clip-vit-b-32", "--length", "128"), "--length has no effect"),
        (("--model", "tiny", "--methods", "fourier_moe_triton"), "fourier_moe_triton needs a GPU and Triton"),
    ],
)
def test_an_option_without_effect_is_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        adapters_command.main(options)
    assert message in capsys.readouterr().err


def test_operations_of_the_product_equal_a_count_by_hand() -> None:
    """3 tokens, 8 features in and 16 out, 2 experts of 5 positions each: 10 positions for each token."""
    rfft_8, rfft_16 = 5 * 8 * 3 // 2, 5 * 16 * 4 // 2
    forward = 3 * (rfft_8 + 10 * (6 + 2 + 2) + rfft_16 + 16)
    h_x, gates, coefficients = rfft_16 + rfft_8 + 10 * 6, 10 * 4, 10 * (2 + 2)
    x = 10 * (6 + 2 + 2) + rfft_8 + 8
    assert product_forward_flops(3, 8, 16, 2, 5) == forward == 1008
    assert product_backward_flops(3, 8, 16, 2, 5, [True] * 3) == 3 * (h_x + gates + coefficients + x) == 1584
    assert product_backward_flops(3, 8, 16, 2, 5, [False, True, False]) == 3 * (h_x + gates)
    assert product_backward_flops(3, 8, 16, 2, 5, [True, False, False]) == 3 * (rfft_16 + x)
    # The counter finds the operators, and a matrix product and a transform beside them.
    leaves = [torch.randn(3, 8), torch.rand(3, 2), torch.randn(4, 5, 2)]
    x, gates, coefficients = (leaf.requires_grad_() for leaf in leaves)
    experts, frequencies = torch.tensor([[0, 3]] * 3), torch.zeros(4, 5, 2, dtype=torch.int32)

    def step() -> None:
        y = routed_spectral_product(x, gates, experts, coefficients, frequencies, 16, 1.0)
        y.sum().backward()

    assert count_flops(step) == 1008 + 1584
    assert count_flops(lambda: torch.zeros(2, 3) @ torch.zeros(3, 5)) == 2 * 2 * 3 * 5
    plane = torch.zeros(4, 8, dtype=torch.complex64)
    assert count_flops(lambda: torch.fft.ifft2(plane)) == 5 * 32 * (2 + 3)
    assert count_flops(lambda: torch.fft.irfft(torch.fft.rfft(torch.zeros(2, 8)))) == 2 * 2 * rfft_8


@pytest.mark.parametrize("balanced", [True, False])
def test_dense_and_ours_are_the_same_function(balanced: bool) -> None:
    entry = MODELS["tiny"]
    base = build_model(entry, 2, CPU, torch.float32)
    inputs, labels = make_batch(entry, 2, 16, CPU)
    plain = base(inputs)
    results = []
    for method in ("dense", "fourier_moe"):
        model = adapt(copy_with_shared_backbone(base), method, entry, balanced=balanced)
        for name, parameter in model.named_parameters():
            if name.endswith("coefficients"):
                parameter.data.mul_(50)  # an update that matters
        logits = model(inputs)
        nn.functional.cross_entropy(logits, labels).backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (dense, dense_grads), (ours, our_grads) = results
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)
    assert dense_grads.keys() == our_grads.keys()
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, dense_grads[name], rtol=1e-3, atol=1e-5, msg=f"gradient of {name} differs")


def test_the_triton_method_alone_asks_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    switches: list[str | None] = []
    monkeypatch.setattr("fourier_moe.spectral.product.use_triton", lambda _: switches.append(os.environ.get(OPT_IN)))
    monkeypatch.delenv(OPT_IN, raising=False)
    entry, setting = MODELS["tiny"], {"layers": 1, "batch": 2, "length": 4, "device": "cpu", "dtype": "float32"}
    base = build_model(entry, 1, CPU, torch.float32)
    for method, switch in (("fourier_moe", None), ("fourier_moe_triton", "1")):
        trial = Trial(base, method, Setting(model="tiny", balanced=True, threads=1, **setting))
        trial.training_step()
        trial.inference()
        assert switches == [switch] * 6  # query and value: forward, backward, inference
        switches.clear()
    assert OPT_IN not in os.environ


def test_methods_share_the_backbone_and_train_their_own_head() -> None:
    entry = MODELS["tiny"]
    base = build_model(entry, 1, CPU, torch.float32)
    copies = [copy_with_shared_backbone(base) for _ in range(2)]
    first, second = (adapt(m, name, entry, balanced=False) for m, name in zip(copies, ("lora", "fourier_moe"), strict=True))
    embeddings = [model.backbone.get_submodule("embeddings.word_embeddings").weight for model in (base, first, second)]
    assert embeddings[0] is embeddings[1] is embeddings[2]
    assert not any(p.requires_grad for p in base.parameters())
    heads = [next(model.head.parameters()) for model in (base, first, second)]
    assert len({id(parameter) for parameter in heads}) == 3
    assert torch.equal(heads[1], heads[2])


def test_balanced_router_serves_all_experts_alike_and_keeps_its_gradient() -> None:
    router = TopKRouter(16, 8, 2, generator=torch.Generator().manual_seed(0))
    balanced = BalancedRouter(router)
    x = torch.randn(4, 8, 16)
    with recording(balanced):
        gates = balanced(x).dense(8)
        assert balanced.balance_loss().item() == pytest.approx(2.0, abs=1e-5)
    assert torch.equal((gates > 0).sum((0, 1)), torch.full((8,), 8))
    torch.testing.assert_close(gates[gates > 0], torch.full((64,), 0.5))
    gates.square().sum().backward()
    assert balanced.weight is router.weight
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 0


def test_interleaving_times_every_task_once_per_round_in_changing_order() -> None:
    calls: list[str] = []
    samples = time_interleaved({name: partial(calls.append, name) for name in "abc"}, 3)
    rounds = ["".join(calls[i : i + 3]) for i in (0, 3, 6)]
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 3
    assert len({r[0] for r in rounds}) > 1
    assert all(len(values) == 3 for values in samples.values())
    assert paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])["median"] == 2.0


def test_interleaving_reads_the_clock_that_is_asked_for() -> None:
    ticks = iter(range(100))
    assert time_interleaved({"a": list, "b": list}, 2, clock=lambda: next(ticks)) == {"a": [1, 1], "b": [1, 1]}


@pytest.mark.parametrize("other", [("--threads", "2"), ("--threads", "1", "--device", "cuda")])
def test_scaling_refuses_processor_time_of_more_than_one_thread(
    other: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scaling_command.main(["--studies", "tiny", "--clock", "cpu", *other])
    assert "--clock cpu needs --device cpu --threads 1" in capsys.readouterr().err


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_scaling_writes_numbers_and_pictures(tmp_path: Path, clock: str) -> None:
    scaling_command.main(["--studies", "tiny", "--repeats", "3", "--threads", "1", "--clock", clock, "--output", str(tmp_path)])
    points = json.loads((tmp_path / "scaling.json").read_text())["studies"]["tiny"]["points"]
    assert [point["width"] for point in points] == [32, 64]
    for point in points:
        samples = {part: point[part]["samples"] for part in ("frozen", "product", "adapted")}
        assert all(math.isfinite(value) and value > 0 for values in samples.values() for value in values)
        ratios = [a / b for a, b in zip(samples["product"], samples["frozen"], strict=True)]
        assert point["product_to_frozen"]["median"] == pytest.approx(median(ratios))
    with (tmp_path / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["product_median"]) for row in rows] == pytest.approx([point["product"]["median"] for point in points])
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
