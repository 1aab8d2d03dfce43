import pytest
import yaml
from support import REPOSITORY

from datamodules.glue.benchmarks import TASKS

CONFIGS = REPOSITORY / "configs"

# The paper's Table 15.
TABLE_15 = {
    #        expert lr, router lr, head lr, length, epochs, alpha, balance
    "cola": (5e-2, 1.5e-4, 1e-2, 256, 80, 115, 1.5e-3),
    "sst2": (1.2e-1, 1e-4, 5e-4, 128, 10, 138, 1.5e-3),
    "mrpc": (9e-2, 2e-4, 1e-3, 512, 30, 160, 2e-3),
    "qqp": (1e-1, 3.9e-4, 8.4e-4, 128, 15, 64, 2.5e-3),
    "mnli": (1e-5, 2e-4, 5e-3, 512, 10, 96, 3.5e-3),
    "qnli": (9e-2, 1.5e-4, 1e-3, 512, 30, 72, 2.5e-3),
    "rte": (1e-1, 1.5e-4, 6.5e-3, 512, 60, 136, 1.7e-3),
}


@pytest.mark.parametrize("name", TASKS)
def test_config_has_the_values_of_table_15_and_the_tasks_own_metrics(name):
    config = yaml.safe_load((CONFIGS / f"glue_{name}.yaml").read_text(encoding="utf-8"))
    optimization, data, adapter = (
        config["model"]["optimization"],
        config["data"]["init_args"],
        config["model"]["adapter"]["init_args"],
    )
    values = (
        optimization["experts"]["lr"],
        optimization["router"]["lr"],
        optimization["head"]["lr"],
        data["max_length"],
        config["trainer"]["max_epochs"],
        adapter["scaling"],
        adapter["balance_weight"],
    )
    assert values == TABLE_15[name]
    assert (optimization["schedule"], optimization["warmup_ratio"]) == ("linear", 0.06)
    assert (data["dataset"], data["batch_size"], data["tokenizer"], data["selection"]) == (name, 32, None, "train")
    assert config["trainer"]["accumulate_grad_batches"] == 1
    assert config["trainer"]["logger"]["init_args"]["name"] == f"glue_{name}"
    common = {"targets": ["query", "value"], "num_coefficients": 1008, "num_experts": 8, "top_k": 2, "dropout": 0}
    assert {key: adapter[key] for key in common} == common
    task = config["model"]["task"]["init_args"]
    assert (task["model"], tuple(task["metrics"])) == ("FacebookAI/roberta-large", TASKS[name].metrics)
