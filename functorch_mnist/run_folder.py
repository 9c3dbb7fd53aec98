"""The folder of a run: `config.json`, `metrics.jsonl`, `checkpoints/`, of a private one `unpublished.json`, of a tuned
one `tuning.jsonl`.

That of a sweep or comparison has a `config.json` of its own, and its best run in the folder `best/`.

Nothing here imports torch.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import options as opt
from .files import write

CHECKPOINTS = "checkpoints"
"""The name of the folder of checkpoints in a run's folder."""

BEST = "best"
"""The name of the folder of the best run in the folder of a sweep or comparison."""

TUNING = "tuning.jsonl"
"""The file of the rounds of `train --tune`."""

UNPUBLISHED = "unpublished.json"
"""The file of a private run that depends on single images: whoever publishes the run leaves it out."""

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_MAX_CONFIG_BYTES = 1 << 20


def exists(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / _CONFIG).exists()


def create(folder: Path, options: opt.Train) -> None:
    """Makes the folder of a new run and writes its options.

    Raises:
        UsageError: the folder holds a run already, or a part of one.
        OSError: it cannot be made or written.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, options)


def check_free(folder: Path) -> None:
    """Refuses a folder that holds a run already, or a part of one.

    Raises:
        UsageError: it does.
    """
    for name in (_CONFIG, _METRICS, CHECKPOINTS):
        if (folder / name).exists():
            raise opt.UsageError(
                f"{folder} holds a run already. Found {name}. Resume it with --resume, or choose another --out."
            )


def write_config(folder: Path, options: opt.Train | opt.Search) -> None:
    """Writes the options, whole or not at all; with the data's absolute path, so that they hold in any folder."""
    training = options if isinstance(options, opt.Train) else options.training
    training = replace(training, data_dir=training.data_dir and training.data_dir.absolute())
    options = training if isinstance(options, opt.Train) else replace(options, training=training)
    write(folder / _CONFIG, (json.dumps(opt.to_json(options), indent=2, allow_nan=False) + "\n").encode())


def read_config(folder: Path) -> opt.Train:
    """The options of the run in a folder.

    Raises:
        UsageError: there is no run, or its options cannot be read.
    """
    values = _config(folder)
    if "command" in values:
        raise opt.UsageError(
            f"{folder} must hold a run. Found a {values['command']!s:.20}; its best is {folder / BEST}."
        )
    return opt.from_json(values)


def read_search(folder: Path) -> opt.Search:
    """The options of the sweep or comparison in a folder.

    Raises:
        UsageError: there is none, or its options cannot be read.
    """
    values = _config(folder)
    if "command" not in values:
        raise opt.UsageError(f"{folder} must hold a sweep or comparison. Found a run.")
    return opt.search_from_json(values)


def resumed(options: opt.Search) -> opt.Search:
    """The options of the sweep or comparison in the folder that is to be resumed, on the machine of these options.

    Raises:
        UsageError: there is none, or an option is given that it does not have.
    """
    folder = options.training.resume
    if folder is None:
        return options
    saved = read_search(folder)
    if type(saved) is not type(options):
        raise opt.UsageError(f"{folder} must hold a {opt.command_of(options)}. Found a {opt.command_of(saved)}.")
    machine = {name: getattr(options.training, name) for name in ("device", "threads", "processes", "timeout")}
    return replace(saved, training=replace(saved.training, **machine, out=folder))


def check_same(folder: Path, options: opt.Search) -> None:
    """Refuses a folder that holds another sweep or comparison than that of these options.

    Raises:
        UsageError: it does, or holds a run.
    """
    differing = opt.search_differences(options, read_search(folder))
    if differing:
        named = ", ".join(map(opt.flag, differing))
        raise opt.UsageError(f"{folder} holds another sweep. Found other {named}. Choose another --out.")


def run_of(folder: Path) -> Path:
    """The folder itself, or the best run's in that of a sweep or comparison.

    Raises:
        UsageError: the sweep has no best run yet.
    """
    if not exists(folder) or "command" not in (values := _config(folder)):
        return folder
    if not exists(folder / BEST):
        command = f"functorch-mnist {values['command']!s:.20} --resume {folder}"
        raise opt.UsageError(
            f"{folder} must hold a finished {values['command']!s:.20}. Found no best run. Try {command}"
        )
    return folder / BEST


def _config(folder: Path) -> dict[str, Any]:
    """The values in a folder's options.

    Raises:
        UsageError: there are none, or they cannot be read.
    """
    path = folder / _CONFIG
    try:
        if not path.is_file():
            raise opt.UsageError(f"{folder} holds no run. Found no file {path}.")
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        if len(text) > _MAX_CONFIG_BYTES:
            raise opt.UsageError(f"{path} must be at most {_MAX_CONFIG_BYTES} bytes. Found more.")
        values = json.loads(text)
    except OSError as error:
        raise opt.UsageError(f"{path} must be readable. Found: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise opt.UsageError(f"{path} must be JSON. Found: {error}.") from error
    if not isinstance(values, dict):
        raise opt.UsageError(f"{path} must be a JSON object. Found {type(values).__name__}.")
    return values


def start_tuning(folder: Path) -> None:
    """Makes the folder of a run that is tuned first, with an empty `tuning.jsonl`.

    Raises:
        UsageError: the folder holds a run already, or a part of one.
        OSError: it cannot be made or written.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / TUNING, b"")


def append_metrics(folder: Path, record: Mapping[str, Any], *, name: str = _METRICS) -> None:
    """Adds one record as a line of `metrics.jsonl`, or of another file."""
    path = folder / name
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk comes without a name


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; a line that is none, such as one that was cut off by a kill, is left out."""
    path = folder / _METRICS
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and "kind" in record:
            records.append(record)
    return records


def write_unpublished(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes what a private run must know and nobody else may see, whole or not at all."""
    write(folder / UNPUBLISHED, (json.dumps(values, allow_nan=False) + "\n").encode())


def read_unpublished(folder: Path) -> dict[str, Any]:
    """What `write_unpublished` wrote; nothing where there is none that can be read."""
    try:
        values = json.loads((folder / UNPUBLISHED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def forget_metrics_after(folder: Path, step: int) -> None:
    """Drops the records of steps that a resumed run will make again."""
    records = [record for record in read_metrics(folder) if record["step"] <= step and record["kind"] != "test"]
    write(folder / _METRICS, "".join(json.dumps(record) + "\n" for record in records).encode())
