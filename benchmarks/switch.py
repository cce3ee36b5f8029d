"""The command behind scripts/bench_switch.py."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from rlswitch.processes.exit import DONE, NOT_PROVEN
from rlswitch.switch.device import Device

from . import charts, tables
from .experiment import Experiment
from .models import model_path
from .settings import BenchSettings

TABLE_WIDTH = 160


def bench_switch(settings: BenchSettings) -> int:
    """Measures, prints the tables, writes switch.json, .png and .html. Returns the exit code."""
    console = Console(highlight=False, markup=False)
    device, directory = Device.detect(), Path(settings.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    models = {
        label: model_path(name, directory / "models")
        for label, name in (("A", settings.model_a), ("B", settings.model_b))
    }
    experiment = Experiment(settings, models, device, console.print)
    result = experiment.run()
    facts = tables.document(result, settings, device, experiment.paths)
    (directory / "switch.json").write_text(json.dumps(facts, indent=1) + "\n")
    wide = Console(highlight=False, markup=False, width=max(console.width, TABLE_WIDTH))
    for part in tables.render(result, settings):
        wide.print(part, soft_wrap=isinstance(part, str))
    names = ", ".join(
        f"{label} = {it['name']} ({it['checkpoint_bytes'] / 2**20:,.0f} MiB)"
        for label, it in facts["models"].items()
    )
    written = charts.write(result, settings, f"{names}; {device.name}", directory)
    console.print(f"written: {', '.join(map(str, [directory / 'switch.json', *written]))}", soft_wrap=True)
    return NOT_PROVEN if result.differing else DONE
