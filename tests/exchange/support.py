"""Folders as the released training leaves them, made of a checkpoint of ours.

DeepSpeed writes `mp_rank_00_model_states.pt` with the weights under `module` beside the state of the run; Lightning
puts that into `NAME.ckpt/checkpoint/` and adds its own; the run's folder has `config.py`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file

from xr0_engine.model.weights import TIED_LM_HEAD

EMBEDDINGS = "vlm.model.language_model.embed_tokens.weight"
BF16_ROUNDING = 1e-6
"""Robot units of order 0.1: the weights are the same bits, 1e-6 is added to std and a std of 0 or more is used."""


def module_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The state dict of the released trainer's module: `model.` before every name, the tied head among them."""
    stored = {name: it for file in checkpoint.glob("*.safetensors") for name, it in load_file(file).items()}
    return {f"model.{name}": value for name, value in {**stored, TIED_LM_HEAD: stored[EMBEDDINGS]}.items()}


def model_states(folder: Path, module: dict[str, torch.Tensor]) -> None:
    """One step's folder: weights in the file that matters, an optimiser's shard beside it that nobody may open."""
    folder.mkdir(parents=True)
    state = {
        "module": OrderedDict(module),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, it.shape) for name, it in module.items() if isinstance(it, torch.Tensor))],
        "lr_scheduler": None,
        "sparse_tensor_module_names": set(),
        "global_steps": 1000,
        "dp_world_size": 8,
        "ds_config": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        "ds_version": "0.17.0",
        "pytorch-lightning_version": "2.5.0",
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"objects of another program")


def write_run(folder: Path, module: dict[str, torch.Tensor], statistics_of: Path) -> Path:
    """A run of Lightning and DeepSpeed: one step, last.ckpt, and the statistics of a checkpoint's bimanual robot."""
    model_states(folder / "last.ckpt" / "checkpoint", module)
    (folder / "last.ckpt" / "latest").write_text("checkpoint")
    (folder / "config.py").write_text(config_py(statistics_of))
    return folder


def config_py(checkpoint: Path, is_async: bool | None = True, window: int = 4) -> str:
    """As the released training prints its configuration: assignments of dict(...) calls."""
    entry = json.loads((checkpoint / "preprocessor_config.json").read_text())["action_config"]["bimanual"]
    return (
        f"data = dict(\n    params=dict(\n        train_datasets=dict(\n            action_length=30,\n"
        f"            mean={entry['mean']},\n            std={entry['std']})),\n    type='BaseDataModule')\n"
        f"model = dict(\n    params=dict(\n        model=dict(\n            async_train={is_async},\n"
        f"            local_window={window},\n            type='XR0'),\n        pretrained=None))\n"
    )
