"""Training: recipes from standard to certified, one loop, one config."""

from models.training.adversarial import Fast, Free, NoisyFGSM, PGDTraining, Standard, Trades
from models.training.certified import CrownIBPTraining, IBPTraining, MtlIBP, Sabr
from models.training.config import Augment, Engine, Optimizer, Penalties, Schedule, TrainConfig, Watch, load_config
from models.training.group import launched
from models.training.loop import train
from models.training.noise import NoiseTraining
from models.training.rangefinder import RateCurve, find_rate
from models.training.recipe import RECIPES, Batch, Outcome, Recipe, register_recipe
from models.training.records import EpochRecord, TrainingResult

__all__ = [
    "RECIPES",
    "Augment",
    "Batch",
    "CrownIBPTraining",
    "Engine",
    "EpochRecord",
    "Fast",
    "Free",
    "IBPTraining",
    "MtlIBP",
    "NoiseTraining",
    "NoisyFGSM",
    "Optimizer",
    "Outcome",
    "PGDTraining",
    "Penalties",
    "RateCurve",
    "Recipe",
    "Sabr",
    "Schedule",
    "Standard",
    "Trades",
    "TrainConfig",
    "TrainingResult",
    "Watch",
    "find_rate",
    "launched",
    "load_config",
    "register_recipe",
    "train",
]
