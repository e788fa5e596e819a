"""The words of `Trainer(strategy=...)` that this package adds."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from sat_lightning.training.deepspeed import SATDeepSpeedStrategy

#: Name, what it is, and the arguments of `SATDeepSpeedStrategy`.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero_0": ("DeepSpeed without sharding", {"stage": 0}),
    "zero_1": ("ZeRO with the optimizer's state sharded", {"stage": 1}),
    "zero_2": ("ZeRO with gradients sharded too", {"stage": 2}),
    "zero_2_offload": ("ZeRO 2 with the optimizer on the host", {"stage": 2, "offload_optimizer": True}),
    "zero_3": ("ZeRO with weights sharded too", {"stage": 3}),
    "zero_3_offload": (
        "ZeRO 3 with optimizer and weights on the host",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
}


def register_strategies() -> None:
    """Make the names known to Lightning; a second call changes nothing."""
    for name, (description, arguments) in STRATEGIES.items():
        StrategyRegistry.register(name, SATDeepSpeedStrategy, description, override=True, **arguments)
