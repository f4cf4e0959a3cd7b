"""Everything that can be known to be wrong before anything is started."""

import socket
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deploy.errors import UsageError
from model.cache import bytes_per_page
from model.checkpoint import check
from model.config import CheckpointError, ModelConfig
from model.layout import Layout
from model.quantize import FP8
from model.tokenizer import Tokenizer
from serving.config import Settings
from serving.ingress.auth import ApiKeys, KeysError


def load_settings(file: Path | None, flags: dict[str, dict[str, Any]]) -> Settings:
    """Settings from a YAML or JSON file, with the given flags over it.

    Args:
        flags: section → setting → value; None stands for "not given".

    Raises:
        UsageError: unreadable file, unknown key, value out of bounds.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{file}: cannot be read as YAML ({type(error).__name__})") from error
        if not isinstance(tree, dict):
            raise UsageError(f"{file}: expected a mapping of sections")
    for section, values in flags.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            tree[section] = {**(tree.get(section) or {}), **given}
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"setting {name}: {first['msg']}") from error


def check_model(settings: Settings) -> ModelConfig:
    """Checkpoint, layout and tokenizer.

    Raises:
        UsageError: what is wrong, in one line.
    """
    directory = settings.model.directory
    try:
        config = ModelConfig.from_directory(directory)
        Layout(config, settings.gang.stages, settings.gang.expert_parallel)
        check(directory, config)
        if settings.gang.cache_dtype == "fp8":
            bytes_per_page(config, 1, FP8)
        Tokenizer.from_directory(directory, config)
        ApiKeys(settings.ingress.api_keys_file)
    except (CheckpointError, KeysError) as error:
        raise UsageError(str(error)) from error
    return config


def check_port(host: str, port: int) -> None:
    """Raises UsageError when somebody else listens there or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port"
            ) from error
