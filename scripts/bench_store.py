"""How long reading many records into a table takes: `python scripts/bench_store.py [--records 10000]`."""

import argparse
import json
import tempfile
import time
from pathlib import Path

import flora.launch.installed  # noqa: F401

from flora.bench.report import main, positive
from flora.config import recorded_id
from flora.errors import DataError
from flora.results.store import Store


def bench_store() -> None:
    """Write records like those of results/measured to a temporary folder, read them cold and from the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--like", type=Path, default=Path("results/measured"), help="folder with a record to copy")
    arguments = parser.parse_args()
    positive(records=arguments.records)
    record = min(arguments.like.glob("*.json"), default=None)
    if record is None:
        raise DataError(f"--like {arguments.like}: there is no record")
    template = json.loads(record.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.records):
            config = template["config"] | {"seed": number}
            made = template | {"run_id": recorded_id(config), "seed": number, "config": config}
            (Path(folder) / f"{made['run_id']}.json").write_text(json.dumps(made))
        for what in ("without cache", "from the cache"):
            started = time.perf_counter()
            count = len(Store(folder).read_all().records)
            print(f"{count} records {what}: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main(bench_store)
