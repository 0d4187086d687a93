"""A task of another kind than classification: numbers from numbers, with a dict as batch and named losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data.samplers import Draw, EvalSampler, TrainSampler
from tasks import TASKS, Evaluation, Meter, Score, Task
from utils import sum_over_ranks


class Points(Dataset):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, draw: Draw) -> dict:
        x = torch.randn(4, generator=torch.Generator().manual_seed(draw.index))
        return {"x": x, "wanted": {"sum": x.sum(), "largest": x.max()}}


class Regression(Task):
    score = Score("rmse", "error", higher_is_better=False)

    def train_loader(self) -> DataLoader:
        size, steps = self.config.DATA.BATCH_SIZE, self.config.TRAIN.ACCUMULATION_STEPS
        ranks = {"rank": self.world.rank, "world_size": self.world.size}
        sampler = TrainSampler(256, batch_size=size, seed=self.config.SEED, accumulation_steps=steps, **ranks)
        return DataLoader(Points(), size, sampler=sampler, drop_last=True)

    def eval_loader(self) -> DataLoader:
        return DataLoader(Points(), 8, sampler=EvalSampler(256, rank=self.world.rank, world_size=self.world.size))

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2))

    def to_device(self, batch: dict, device: torch.device) -> dict:
        return {"x": batch["x"].to(device), "wanted": {k: v.to(device) for k, v in batch["wanted"].items()}}

    def loss(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        found = dict(zip(batch["wanted"], model(batch["x"]).unbind(1), strict=True))
        return {name: (found[name] - wanted).square().mean() for name, wanted in batch["wanted"].items()}

    def meter(self, samples: int, device: torch.device) -> Meter:
        return Error()


class Error(Meter):
    squares = count = 0.0

    def add(self, model: nn.Module, batch: dict) -> None:
        self.squares += (model(batch["x"])[:, 0] - batch["wanted"]["sum"]).square().sum().item()
        self.count += len(batch["x"])

    def result(self) -> Evaluation:
        squares, count = sum_over_ranks(torch.tensor([self.squares, self.count], dtype=torch.float64)).tolist()
        return Evaluation({"rmse": (squares / count) ** 0.5}, [f" * RMSE {(squares / count) ** 0.5:.3f}"])


def register() -> None:
    TASKS["regression"] = Regression
