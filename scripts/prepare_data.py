"""Fill data/: `python scripts/prepare_data.py NAME ... | --all | --list [--from DIR] [--data data]`.

Copies or downloads each dataset, checks rows and classes against the official numbers, counts images that its splits
share, and writes a manifest.json with checksums that every later run is held to. What is ready is left alone; an
interrupted or second call does the rest.
"""

import argparse
import sys
from pathlib import Path

import flora.launch.installed  # noqa: F401

from flora.errors import DataError
from flora.launch.entry import main
from flora.tasks import manifest
from flora.tasks.prepare.folder import prepare, state
from flora.tasks.prepare.items import catalogue, find


def prepare_data() -> None:
    """Parse the command line, then list or prepare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="datasets as --list shows them, e.g. eurosat glue/rte boolq")
    parser.add_argument("--all", action="store_true", help="every dataset that can be reached")
    parser.add_argument("--list", action="store_true", help="say how each dataset stands, and do nothing")
    parser.add_argument("--from", dest="source", type=Path, help="a folder that holds dataset folders, to copy from")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder to fill (paths.data)")
    arguments = parser.parse_args()
    if arguments.list:
        for name, item in catalogue().items():
            rows = manifest.read(arguments.data / name).get("rows") or {}
            shown = ", ".join(f"{split} {count}" for split, count in (rows or item.rows).items())
            print(f"{state(item, arguments.data):17} {name:22} {'' if rows else 'officially '}{shown}")
        return
    items = catalogue().values() if arguments.all else [find(name) for name in arguments.names]
    if not items:
        parser.error("name a dataset, or --all, or --list")
    failed = []
    for item in items:
        try:
            facts = prepare(item, arguments.data, arguments.source)
        except DataError as error:
            failed.append(item.name)
            print(f"{item.name}: {error}", file=sys.stderr)
            continue
        rows = ", ".join(f"{split} {count}" for split, count in facts["rows"].items())
        print(f"{item.name}: {rows} ({facts['source']}) in {arguments.data / item.name}")
        for splits, shared in facts.get("shared_texts", {}).items():
            if shared["exact"]:
                print(f"{item.name}: {shared['exact']} rows stand in both of {splits}; they stay, and are counted")
        for pair, found in (facts.get("shared_images") or {}).items():
            if any(found.values()):
                print(f"{item.name}: {pair}: {found['exact']} equal images, {found['near']} more alike")
        for warning in facts["warnings"]:
            print(f"{item.name}: warning: {warning}", file=sys.stderr)
    if failed:
        raise DataError(f"{len(failed)} of {len(list(items))} datasets could not be prepared: {', '.join(failed)}")


if __name__ == "__main__":
    main(prepare_data, trace=lambda: False)
