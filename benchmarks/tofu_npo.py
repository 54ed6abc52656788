"""NPO on TOFU forget10: python benchmarks/tofu_npo.py [--set key=value ...]

The 9M-parameter Llama that memorised TOFU forgets forget10, beside a model retrained without it.
Prints what is left on the forget set and kept on the retain set, time and peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from common import bench_data, publish


def main() -> None:
    """Run the command line as a user would, and read its report."""
    root = bench_data()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, "-m", "unlearn", "run", str(root / "models/tofu-llama-9m/full"),
            "--method", "npo",
            "--forget", str(root / "data/tofu/forget10.json"),
            "--retain", str(root / "data/tofu/retain90.json"),
            "--retrained", str(root / "models/tofu-llama-9m/retain90"),
            "--out", str(out), "--json", *sys.argv[1:],
        ]  # fmt: skip
        start = perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = perf_counter() - start
    result = json.loads(done.stdout)
    rows = [
        {
            "set": f["subset"],
            "finding": f["title"].split(",")[0],
            "n": f["n"],
            **{
                role: f[role]["value"] if f[role] else None
                for role in ("original", "unlearned", "retrained")
            },
            "rule": f["criterion"],
            "verdict": f["verdict"],
        }
        for f in result["findings"]
    ]
    rows.append({"finding": "whole command, seconds", "unlearned": seconds})
    rows.append({"finding": "peak memory, GiB", "unlearned": result["peak_memory_bytes"] / 2**30})
    columns = ["set", "finding", "n", "original", "unlearned", "retrained", "rule", "verdict"]
    publish("tofu_npo", columns, rows)


if __name__ == "__main__":
    main()
