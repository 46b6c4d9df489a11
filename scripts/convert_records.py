"""Convert records of schema 1, whose ids did not depend on the data: `python scripts/convert_records.py FOLDER`.

No number changes. What a record says of its data and weights becomes part of its id, and its file gets that name.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import flora.launch.installed  # noqa: F401

from flora import inputs
from flora.config import recorded_cell, recorded_id
from flora.errors import DataError
from flora.files import read_object, write_json
from flora.launch.entry import main
from flora.results.record import SCHEMA_VERSION
from flora.results.store import read


def convert_records() -> None:
    """Parse the command line, convert every record of schema 1, name those that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the records: results/measured, or your paths.results")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    converted, left = 0, list[str]()
    for path in sorted(folder.glob("*.json")):
        try:
            record = read_object(path)
            if record.get("schema_version") != 1:
                continue
            convert(path, record)
            converted += 1
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            left.append(f"{path}: not converted ({error})")
    print(f"{converted} records of {folder} converted to schema {SCHEMA_VERSION}", file=sys.stderr)
    if left:
        raise DataError("; ".join([f"{len(left)} records are left as they were", *left[:3]]))


def convert(path: Path, record: dict[str, Any]) -> Path:
    """Write a record of schema 1 as one of this schema, in the place of its file; returns the new path.

    Raises:
        ValueError: the record is not what it says, its config is not whole, or its new file exists.
    """
    before = record["run_id"]
    record = upgraded(record)
    if (cell := recorded_cell(record["config"])) != before or path.stem != before:
        raise ValueError(f"its config is that of run {cell}")
    place = path.with_name(f"{record['run_id']}.json")
    if place.exists() and place != path:
        raise ValueError(f"{place} exists")
    write_json(place, record)
    if place != path:
        path.unlink()
    if (wrong := read(place)[1]) is not None:
        print(f"warning: {wrong}", file=sys.stderr)
    said = Path(record.get("adapter_path") or path) / "run.json"
    if said.is_file() and (facts := json.loads(said.read_bytes())).get("run_id") == before:
        write_json(said, facts | {"run_id": record["run_id"], "cell_id": cell})
    return place


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """A record of schema 1 as it would be written today."""
    config = record["config"]
    adapter, trainer = dict(config["adapter"]), dict(config["trainer"])
    if "head_lr" in adapter:  # the first records hold rates as well that decided nothing
        if adapter["name"] == "linear_probe":
            trainer.pop("head_lr", None)  # it trained with trainer.lr
        adapter = {key: value for key, value in adapter.items() if key not in ("lr", "head_lr")}
    config = config | {"adapter": adapter, "trainer": trainer}
    config["inputs"] = inputs.of_record(record.get("data") or {}, record.get("weights") or {})
    return record | {"schema_version": SCHEMA_VERSION, "run_id": recorded_id(config), "config": config}


if __name__ == "__main__":
    main(convert_records, trace=lambda: False)
