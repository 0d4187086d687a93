"""Running statistics of batch norms; `test_custom_task.py` trains some on two processes."""

from __future__ import annotations

import torch
from torch import nn

from training.running_statistics import RunningStatistics


def test_statistics_of_an_update_that_was_not_finite_are_dropped() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    statistics, norm = RunningStatistics(network), network[1]
    network(torch.randn(8, 3))
    collected = norm.running_mean.clone(), norm.running_var.clone()
    statistics.agree(1, broken=torch.zeros(()))
    network(torch.full((8, 3), torch.nan))
    assert norm.running_mean.isnan().all()
    statistics.agree(1, broken=torch.ones(()))
    assert torch.equal(norm.running_mean, collected[0])
    assert torch.equal(norm.running_var, collected[1])


def test_a_network_without_statistics_is_left_alone() -> None:
    network = nn.Linear(3, 4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    RunningStatistics(network).agree(1, broken=torch.ones(()))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
