"""The configuration of one run: a strict JSON file, checked before torch is imported."""

from imagen_scale.config.loading import dump_config as dump_config
from imagen_scale.config.loading import load_config as load_config
from imagen_scale.config.loading import parse_config as parse_config
from imagen_scale.config.network import ImagenConfig as ImagenConfig
from imagen_scale.config.network import ScheduleConfig as ScheduleConfig
from imagen_scale.config.network import UnetConfig as UnetConfig
from imagen_scale.config.recipes import told_of_recipe as told_of_recipe
from imagen_scale.config.schema import Config as Config
from imagen_scale.config.section import parse_bytes as parse_bytes
from imagen_scale.config.sections import DataConfig as DataConfig
from imagen_scale.config.sections import MemoryConfig as MemoryConfig
from imagen_scale.config.sections import TrainingConfig as TrainingConfig
from imagen_scale.config.stage import Network as Network
from imagen_scale.config.stage import StageConfig as StageConfig
