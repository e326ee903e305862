"""TensorBoard's part of the configuration; `ConfigLoader.load_tensorboard_config` reads its file."""

from parameters import TensorBoardConfig as TensorBoardConfig
