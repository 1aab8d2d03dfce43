"""The result of one run, and the frame of all runs that tables, plots and paired tests are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from fourier_moe.errors import UserError

_LOAD = ("load_imbalance", "dead_experts")


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        method: class of the adapter, without `Config`.
        variant: name of the variant in the grid.
        seed: seed of the run.
        main_metric: the task's main test metric.
        metrics: all test metrics of the last step's weights.
        parameters: trained parameters by kind.
        seconds: duration of training, validation included.
        best_metrics: all test metrics of the checkpoint that was best on validation; None if none was kept.
        router: the last values that a RouterLoad callback logged during training; empty without one.
        size: field and value that set the number of parameters, `r=8`; None for a method without such a field.
        peak_memory: bytes during training, see PeakMemory; None if the system does not report it.
        data_order: digest of the order of the training examples.
        config_hash: hash of the resolved config without its logger.
        commit: commit of this repository, with `+dirty` for uncommitted changes; None outside of it.
        versions: versions of Python, the libraries and the device.
        partial: the limit that left out a part of the test examples; None if all were tested.
        lower_is_better: names of the metrics that are better when lower.
        not_shares: names of the metrics that percent cannot express.
    """

    method: str
    variant: str
    seed: int
    main_metric: str
    metrics: dict[str, float]
    parameters: dict[str, int]
    seconds: float
    best_metrics: dict[str, float] | None = None
    router: dict[str, float] = field(default_factory=dict)
    size: str | None = None
    peak_memory: int | None = None
    data_order: str = ""
    config_hash: str = ""
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    partial: str | None = None
    lower_is_better: list[str] = field(default_factory=lambda: ["loss"])
    not_shares: list[str] = field(default_factory=lambda: ["loss"])

    def minimizes(self, metric: str) -> bool:
        """Say whether a metric, such as `test/mae` or `test/cola/loss`, is better when lower."""
        return metric.rpartition("/")[2] in self.lower_is_better

    def is_share(self, metric: str) -> bool:
        """Say whether a metric is a share, which tables show in percent."""
        return metric.rpartition("/")[2] not in self.not_shares


def result_frame(results: Sequence[Result], metric: str | None = None) -> pd.DataFrame:
    """Return a frame with a row per run.

    Metrics are as they are logged, not in percent. `last` is the metric of the last step's weights, `best` that of the
    best checkpoint. `attrs["kinds"]` lists the columns of parameters by kind, `attrs["versions"]` those of versions;
    `attrs["minimizes"]` and `attrs["is_share"]` describe the metric.

    Args:
        results: at least one.
        metric: a test metric, as `--metric` names it: `loss`, `cola/matthews`; None for the main one.

    Raises:
        UserError: if a run was not tested for the metric.
    """
    first = results[0]
    wanted = f"test/{metric}" if metric else first.main_metric
    missing = next((result for result in results if wanted not in result.metrics), None)
    if missing:
        raise UserError(f"--metric {metric!r}: {missing.variant} was tested for {', '.join(missing.metrics)}")
    kinds = list(dict.fromkeys(kind for result in results for kind in result.parameters))
    versions = list(dict.fromkeys(name for result in results for name in result.versions))
    rows = []
    for result in results:
        rows.append(
            {
                "method": result.method,
                "variant": result.variant,
                "size": result.size,
                "seed": result.seed,
                "metric": wanted,
                "last": result.metrics[wanted],
                "best": result.best_metrics[wanted] if result.best_metrics else None,
                "trained": sum(result.parameters.values()),
                **{kind: result.parameters.get(kind, 0) for kind in kinds},
                **{measure: result.router.get(f"router/{measure}") for measure in _LOAD},
                "seconds": round(result.seconds, 1),
                "peak_memory": result.peak_memory,
                "partial": result.partial,
                "data_order": result.data_order,
                "config_hash": result.config_hash,
                "commit": result.commit,
                **{library: result.versions.get(library) for library in versions},
            }
        )
    numbers = {"best": float, **dict.fromkeys(_LOAD, float), "peak_memory": "Int64"}
    frame = pd.DataFrame(rows).astype(numbers)
    frame.attrs = {
        "kinds": kinds,
        "versions": versions,
        "minimizes": first.minimizes(wanted),
        "is_share": first.is_share(wanted),
    }
    return frame
