"""What a run of a sweep would have found, and the table that was written."""

from lightning_modules.experiments.results import Result

PARAMETERS = {"experts": 4096, "router": 4096, "head": 650, "backbone": 0}
RESULT = Result("FourierMoE", "full", 0, "test/accuracy", {"test/accuracy": 0.5}, PARAMETERS, 2.0)
ROUTER = {"router/load_imbalance": 1.5, "router/dead_experts": 0.125}


def table_of(output):
    """The rows of results.md, as dictionaries."""
    lines = [line for line in (output / "results.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]
