"""Adapted models in torch.export and in ONNX."""

import importlib.util

import pytest
import torch
from support.pages import section_code
from torch import nn

from fourier_moe import FourierMoEConfig, inject
from fourier_moe.integrations.onnx import onnx_program, real_product

EVERYTHING = {
    "num_coefficients": 80,
    "densities": [1, 2, 1, 1],
    "shared_coefficients": 8,
    "permute": True,
    "router_features": 6,
    "router_scope": "block",
}


def adapted(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 31)).eval()
    inject(model, FourierMoEConfig(targets=["0", "2"], **{"num_coefficients": 64, "num_experts": 4, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("coefficients"):
                parameter.normal_()
    return model


def test_an_exported_model_computes_the_same_to_the_bit_for_any_batch():
    model, x = adapted(**EVERYTHING), torch.randn(7, 3, 32)
    program = torch.export.export(model, (x[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("settings", [EVERYTHING, {"conjugate_symmetry": False}, {"top_k": 1, "coefficients": "real"}], ids=str)
def test_the_product_for_onnx_is_the_operator_s(settings, monkeypatch):
    model, x = adapted(**settings), torch.randn(7, 3, 32)
    expected = model(x)
    monkeypatch.setattr("fourier_moe.spectral.experts.routed_spectral_product", real_product)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_the_page_s_code_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = section_code("guides/serving", "torch.export and ONNX")
    if importlib.util.find_spec("onnxscript") is None:
        code = code.partition("torch.onnx.export")[0]
    model, x = adapted(), torch.randn(4, 3, 32)
    space = {"model": model, "x": x}
    exec(code, space)
    assert torch.equal(torch.export.load("model.pt2").module()(x), model(x))
    translated = onnx_program(space["program"])
    assert not [node for node in translated.graph.nodes if "fourier_moe" in str(node.target)]
    torch.testing.assert_close(translated.module()(x), model(x), rtol=1e-5, atol=1e-5)
    if (tmp_path / "model.onnx").exists():
        reference = pytest.importorskip("onnx.reference").ReferenceEvaluator("model.onnx")
        (output,) = reference.run(None, {reference.input_names[0]: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-5, atol=1e-5)
